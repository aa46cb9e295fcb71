"""What comes from other programs: read without trust, seen to fit the base model, and made an adapter of ours."""

import pickle
import re
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from customdiff.adapters.adapter import Adapter, fingerprint
from customdiff.adapters.config import AdapterConfig
from customdiff.adapters.formats import ImportedConcept
from customdiff.adapters.formats.changes import LowRankFactors, unet_name
from customdiff.config import Base
from customdiff.errors import UserError
from customdiff.files import sha256
from customdiff.models import attention, base
from customdiff.models.modifier_tokens import TokenEmbedding
from customdiff.models.text import text_encoders


class ImportRequest(NamedTuple):
    """What a reader is asked for.

    Attributes:
        tokens: in order.
        pipe: of the base model.
        allow_pickle: whether pickles are read at all.
    """

    tokens: list[str]
    pipe: DiffusionPipeline
    allow_pickle: bool


class ImportedWeights(NamedTuple):
    """What a file of another program holds, not yet looked at.

    Attributes:
        weights: by the UNet's own names, whole or as factors of a change; the tensors are of any shape and dtype.
        embeddings: by token and text encoder.
        file: the one with the weights.
    """

    weights: dict[str, Tensor | LowRankFactors]
    embeddings: dict[str, TokenEmbedding]
    file: Path


def read_pickle(path: Path, request: ImportRequest) -> Any:
    """Read a file of `torch.save` that holds tensors and plain containers.

    torch's reader of weights makes nothing else and calls nothing; sizes are added up before it starts.

    Raises:
        UserError: pickles are not allowed; it is too large, or damaged, or holds anything else.
    """
    if not request.allow_pickle:
        raise UserError(f"{path}: a pickle, which can carry a program; --allow-pickle reads the tensors in it alone")
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        if size > _most(request.pipe):
            raise UserError(f"{path}: {size:,} bytes, more than its base model has ({_most(request.pipe):,})")
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split()).split(". ")[0][:200]
        raise UserError(f"{path}: not a file of tensors that torch.save wrote ({reason})") from error


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        UserError: it is damaged.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not a whole safetensors file ({error})") from error


def by_name(found: Any, path: Path) -> dict[str, Any]:
    """What was found, once it is seen to be a dict of names.

    Raises:
        UserError: it is something else.
    """
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise UserError(f"{path}: holds no tensors by name")
    return found


def named(found: Any, key: str, path: Path) -> dict[str, Any]:
    """A part of what was found, a dict of names too.

    Raises:
        UserError: there is none.
    """
    part = by_name(found, path).get(key)
    if not isinstance(part, dict):
        raise UserError(f"{path}: no delta of the paper's, for it has no {key!r}")
    return by_name(part, path)


def adapter_from(
    found: ImportedWeights, pipe: DiffusionPipeline, chosen: Base, concepts: list[ImportedConcept], form: str
) -> Adapter:
    """Make an adapter of what was found, once every tensor of it is seen to be one of the base model's.

    Args:
        pipe: of the base model, which `chosen` names.
        form: name of the format, for the config.

    Raises:
        UserError: names the first weight or token that is missing, unknown, of another shape, or not finite.
    """
    freeze_model = "crossattn" if any(".to_q." in name for name in found.weights) else "crossattn_kv"
    originals = {unet_name(name): (name, own) for name, own in attention.originals(pipe.unet, freeze_model).items()}
    strange = sorted(found.weights.keys() ^ originals.keys()) if found.weights else []
    if strange:
        what = "has no" if strange[0] in originals else "has a strange"
        raise UserError(f"{found.file}: {what} {strange[0]}; was it learned on {chosen.model}?")
    weights = {}
    for own_name, weight in found.weights.items():
        name, original = originals[own_name]
        if isinstance(weight, LowRankFactors) and original.ndim == 2:
            stem = name.removesuffix("weight")
            weights |= {f"{stem}{key}": part for key, part in _factors(weight, original, own_name, found.file).items()}
        else:
            weights[name] = _plain(weight, tuple(original.shape), own_name, found.file)
    rows = {concept.token: _row(found, concept.token, pipe) for concept in concepts}
    return Adapter(weights, rows, _config(found, pipe, chosen, concepts, form, freeze_model))


def _row(found: ImportedWeights, token: str, pipe: DiffusionPipeline) -> TokenEmbedding:
    """A token's embedding for each text encoder of the base model, and no other."""
    row, encoders = found.embeddings.get(token, {}), text_encoders(pipe)
    if row.keys() != encoders.keys():
        raise UserError(
            f"{found.file}: has no embedding of {token} for each of {', '.join(encoders)}; "
            f"its tokens: {', '.join(found.embeddings) or 'none'}"
        )
    return {
        name: _plain(_flat(row[name]), (encoder.config.hidden_size,), f"{token} of {name}", found.file)
        for name, (_, encoder) in encoders.items()
    }


def _config(
    found: ImportedWeights,
    pipe: DiffusionPipeline,
    chosen: Base,
    concepts: list[ImportedConcept],
    form: str,
    freeze_model: str,
) -> AdapterConfig:
    ranks = [max(1, weight.up.shape[1]) for weight in found.weights.values() if isinstance(weight, LowRankFactors)]
    values = {
        "base": {"model": chosen.model, "revision": chosen.revision, "variant": chosen.variant},
        "concepts": {
            name: {
                "modifier_token": concept.token,
                "initializer": None,
                "class_prompt": concept.class_prompt,
                "instance_prompt": concept.instance_prompt,
            }
            for name, concept in zip(_names(concepts), concepts, strict=True)
        },
        "method": "custom_diffusion" if found.weights else "textual_inversion",
        "freeze_model": freeze_model,
        **({"compressed": {"ranks": ranks, "dtype": "float32"}} if ranks else {}),
        "imported": {"format": form, "file": found.file.name, "sha256": sha256(found.file)},
        "family": base.family(pipe),
        "processors": attention.processor_names(pipe.unet),
        "fingerprint": fingerprint(pipe),
    }
    return AdapterConfig.model_validate(values)


def _most(pipe: DiffusionPipeline) -> int:
    """Bytes of a base model's UNet and text encoders in fp32, and a little: no adapter of it has a use for more."""
    parts = [pipe.unet, *(encoder for _, encoder in text_encoders(pipe).values())]
    return 4 * sum(parameter.numel() for part in parts for parameter in part.parameters()) + 2**20


def _names(concepts: list[ImportedConcept]) -> list[str]:
    """A concept's name from its class: `wooden pot` is wooden-pot, a second one wooden-pot-2."""
    names: list[str] = []
    for concept in concepts:
        name = re.sub(r"[^a-z0-9]+", "-", concept.class_prompt.lower()).strip("-") or "concept"
        taken = sum(other == name or other.startswith(f"{name}-") for other in names)
        names.append(f"{name}-{taken + 1}" if taken else name)
    return names


def _factors(factors: LowRankFactors, original: Tensor, name: str, file: Path) -> dict[str, Tensor]:
    out, width = original.shape
    rank = factors.up.shape[-1] if isinstance(factors.up, Tensor) and factors.up.ndim == 2 else -1
    if rank == 0:  # the paper's compression keeps nothing of a layer whose first singular value exceeds the share
        return {"up": torch.zeros(out, 1), "down": torch.zeros(1, width)}
    if rank > min(out, width):
        raise UserError(f"{file}: {name} has a rank of {rank}, more than its sides")
    return {
        "up": _plain(factors.up, (out, rank), f"{name} u", file),
        "down": _plain(factors.down, (rank, width), f"{name} v", file),
    }


def _flat(row: Any) -> Any:
    """A row (1, D), as web UIs have it, as (D,)."""
    return row[0] if isinstance(row, Tensor) and row.ndim == 2 and len(row) == 1 else row


def _plain(tensor: Any, shape: tuple[int, ...], name: str, file: Path) -> Tensor:
    """A tensor in fp32 and in memory of its own; its shape is seen before any memory is asked for."""
    if not isinstance(tensor, Tensor) or tuple(tensor.shape) != shape:
        here = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
        raise UserError(f"{file}: {name} is {here}, the base model's {shape}: it was learned on another base model")
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or not tensor.is_floating_point():
        raise UserError(f"{file}: {name} is not a plain tensor of floating point numbers")
    plain = tensor.detach().to(torch.float32, copy=True).contiguous()
    if not plain.isfinite().all():
        raise UserError(f"{file}: {name} has values that are not finite")
    return plain
