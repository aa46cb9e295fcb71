"""Import of untrusted files of other programs: safe reading, validation against the base model, and conversion."""

import pickle
import re
import zipfile
from collections.abc import Mapping
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
from customdiff.models.attention import FreezeModel
from customdiff.models.modifier_tokens import TokenEmbedding
from customdiff.models.text import text_encoders


class ImportRequest(NamedTuple):
    """Arguments of a format's `read`.

    Attributes:
        tokens: modifier tokens, in order.
        pipe: pipeline of the base model.
        allow_pickle: whether to read pickles.
    """

    tokens: list[str]
    pipe: DiffusionPipeline
    allow_pickle: bool


class ImportedWeights(NamedTuple):
    """Contents of another program's file before validation.

    Attributes:
        weights: full weights or factors of their change, by their names in the UNet, of any shape and dtype.
        embeddings: embeddings by token and text encoder.
        file: file of the weights.
    """

    weights: Mapping[str, Tensor | LowRankFactors]
    embeddings: dict[str, TokenEmbedding]
    file: Path


def read_pickle(path: Path, request: ImportRequest) -> Any:
    """Read a `torch.save` file of tensors and plain containers with torch's restricted unpickler.

    The uncompressed size is checked before reading.

    Raises:
        UserError: pickles are not allowed; or the file is too large, damaged, or contains other objects.
    """
    if not request.allow_pickle:
        raise UserError(f"{path}: a pickle, which may contain code; --allow-pickle reads only the tensors in it")
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        if size > _max_bytes(request.pipe):
            raise UserError(f"{path}: {size:,} bytes, more than its base model has ({_max_bytes(request.pipe):,})")
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split()).split(". ")[0][:200]
        raise UserError(f"{path}: not a file of tensors that torch.save wrote ({reason})") from error


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not a valid safetensors file ({error})") from error


def string_keyed(contents: Any, path: Path) -> dict[str, Any]:
    """Return a file's contents after checking that they are a dict with string keys.

    Raises:
        UserError: they are something else.
    """
    if not isinstance(contents, dict) or not all(isinstance(name, str) for name in contents):
        raise UserError(f"{path}: contains no tensors by name")
    return contents


def section(contents: Any, key: str, path: Path) -> dict[str, Any]:
    """The dict with string keys under `key` of a file's contents.

    Raises:
        UserError: there is none.
    """
    part = string_keyed(contents, path).get(key)
    if not isinstance(part, dict):
        raise UserError(f"{path}: not a delta of the paper's code, because it has no {key!r}")
    return string_keyed(part, path)


def adapter_from(
    found: ImportedWeights, pipe: DiffusionPipeline, chosen: Base, concepts: list[ImportedConcept], form: str
) -> Adapter:
    """Make an adapter of imported weights after validating every tensor against the base model.

    Args:
        pipe: pipeline of the base model `chosen`.
        form: name of the format, for the config.

    Raises:
        UserError: a weight or token is missing, unknown, of another shape, or not finite.
    """
    freeze_model: FreezeModel = "crossattn" if any(".to_q." in name for name in found.weights) else "crossattn_kv"
    originals = {unet_name(name): (name, own) for name, own in attention.originals(pipe.unet, freeze_model).items()}
    unmatched = sorted(found.weights.keys() ^ originals.keys()) if found.weights else []
    if unmatched:
        problem = "lacks" if unmatched[0] in originals else "has an unknown weight"
        raise UserError(f"{found.file}: {problem} {unmatched[0]}; check that it was trained on {chosen.model}")
    weights: dict[str, Tensor] = {}
    for own_name, weight in found.weights.items():
        name, original = originals[own_name]
        if isinstance(weight, LowRankFactors) and original.ndim == 2:
            stem = name.removesuffix("weight")
            weights |= {f"{stem}{key}": part for key, part in _factors(weight, original, own_name, found.file).items()}
        else:
            weights[name] = _plain(weight, tuple(original.shape), own_name, found.file)
    embeddings = {concept.token: _embedding(found, concept.token, pipe) for concept in concepts}
    return Adapter(weights, embeddings, _config(found, pipe, chosen, concepts, form, freeze_model))


def _embedding(found: ImportedWeights, token: str, pipe: DiffusionPipeline) -> TokenEmbedding:
    """The validated embedding of a token for each text encoder of the base model."""
    embedding, encoders = found.embeddings.get(token, {}), text_encoders(pipe)
    if embedding.keys() != encoders.keys():
        raise UserError(
            f"{found.file}: lacks an embedding of {token} for each of {', '.join(encoders)}; "
            f"its tokens: {', '.join(found.embeddings) or 'none'}"
        )
    return {
        name: _plain(_flat(embedding[name]), (encoder.config.hidden_size,), f"{token} of {name}", found.file)
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


def _max_bytes(pipe: DiffusionPipeline) -> int:
    """Maximum size of an adapter file: that of the base model's UNet and text encoders in fp32, plus 1 MiB."""
    parts = [pipe.unet, *(encoder for _, encoder in text_encoders(pipe).values())]
    return 4 * sum(parameter.numel() for part in parts for parameter in part.parameters()) + 2**20


def _names(concepts: list[ImportedConcept]) -> list[str]:
    """Names of concepts from their classes: wooden-pot for `wooden pot`, wooden-pot-2 for a second one."""
    names: list[str] = []
    for concept in concepts:
        name = re.sub(r"[^a-z0-9]+", "-", concept.class_prompt.lower())[:60].strip("-") or "concept"
        used = sum(other == name or other.startswith(f"{name}-") for other in names)
        names.append(f"{name}-{used + 1}" if used else name)
    return names


def _factors(factors: LowRankFactors, original: Tensor, name: str, file: Path) -> dict[str, Tensor]:
    out, width = original.shape
    rank = factors.up.shape[-1] if isinstance(factors.up, Tensor) and factors.up.ndim == 2 else -1
    if rank == 0:  # the paper's compression stores rank 0 if the first singular value alone exceeds the share
        return {"up": torch.zeros(out, 1), "down": torch.zeros(1, width)}
    if rank > min(out, width):
        raise UserError(f"{file}: {name} has rank {rank}; at most {min(out, width)} is possible")
    return {
        "up": _plain(factors.up, (out, rank), f"{name} u", file),
        "down": _plain(factors.down, (rank, width), f"{name} v", file),
    }


def _flat(vector: Any) -> Any:
    """An embedding (1, D), as web UIs store it, as (D,)."""
    return vector[0] if isinstance(vector, Tensor) and vector.ndim == 2 and len(vector) == 1 else vector


def _plain(tensor: Any, shape: tuple[int, ...], name: str, file: Path) -> Tensor:
    """A copy of a tensor in fp32; its shape is checked before memory is allocated."""
    if not isinstance(tensor, Tensor) or tuple(tensor.shape) != shape:
        actual = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
        raise UserError(f"{file}: {name} is {actual} instead of {shape}; it was trained on another base model")
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or not tensor.is_floating_point():
        raise UserError(f"{file}: {name} is not a dense floating-point tensor")
    plain = tensor.detach().to(torch.float32, copy=True).contiguous()
    if not plain.isfinite().all():
        raise UserError(f"{file}: {name} has non-finite values")
    return plain
