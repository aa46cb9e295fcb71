"""Format `delta`: delta.bin of the paper's diffusers code (`src/diffusers_model_pipeline.py`).

{"unet": {"down_blocks....attn2.to_k.weight": (out, in), ...},    compressed: {"u": (out, r), "v": (r, in)}
 "modifier_token": {"<new1>": (D,)}}                              SDXL: a list of two embeddings
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from customdiff.adapters.config import AdapterConfig
from customdiff.adapters.formats.changes import ExportSource, LowRankFactors, low_rank
from customdiff.adapters.formats.foreign import ImportedWeights, ImportRequest, read_pickle, section
from customdiff.errors import UserError
from customdiff.models.modifier_tokens import TokenEmbedding

FILE = "delta.bin"


def check(config: AdapterConfig, rank: int | None) -> None:
    """Check that the format can hold the adapter.

    Raises:
        UserError: a rank is given, or the adapter changes weights outside of cross-attention.
    """
    if rank is not None:
        raise UserError("--rank: not available for this format; use --format lora or kohya")
    if config.method == "lora":
        raise UserError(
            "--format: a delta can hold only cross-attention, but method lora also changes self-attention; "
            "use pipeline, lora or kohya"
        )


def write(source: ExportSource, folder: Path, rank: int | None) -> float:
    """Write delta.bin, compressed if the adapter is."""
    torch.save(content(source), folder / FILE)
    return 0.0


def verify(source: ExportSource, folder: Path, error: float) -> None:
    """Read the file again and compare it with the adapter."""
    check_same(torch.load(folder / FILE, weights_only=True), content(source))


def instructions(config: AdapterConfig, folder: Path) -> str:
    """The sampling command of the paper's repository."""
    options = " --compress" if config.compressed else ""
    options += " --sdxl" if config.family == "Stable Diffusion XL" else ""
    return (
        "in the paper's repository (adobe-research/custom-diffusion):\n"
        f"  python src/diffusers_sample.py --ckpt {config.base.model} --delta_ckpt {folder / FILE}{options} "
        f'--prompt "{example_prompt(config)}"'
    )


def read(path: Path, request: ImportRequest) -> ImportedWeights:
    """Read a delta.bin, or the one in a folder.

    Raises:
        UserError: the file has another format, or contains a trained text encoder, which is not supported.
    """
    path = path / FILE if path.is_dir() else path
    contents = read_pickle(path, request)
    if isinstance(contents, dict) and "state_dict" in contents:
        raise UserError(f"{path}: from the paper's CompVis code; --format compvis reads it")
    weights = section(contents, "unet", path)
    if "text_encoder" in contents:
        raise UserError(f"{path}: contains a trained text encoder, which adapters do not support")
    embeddings = {token: _embedding(vectors) for token, vectors in section(contents, "modifier_token", path).items()}
    return ImportedWeights({name: learned(weight) for name, weight in weights.items()}, embeddings, path)


def content(source: ExportSource) -> dict:
    """Contents of delta.bin."""
    vectors = {token: list(embedding.values()) for token, embedding in source.adapter.embeddings.items()}
    return {
        "unet": weights(source),
        "modifier_token": {token: parts[0] if len(parts) == 1 else parts for token, parts in vectors.items()},
    }


def weights(source: ExportSource) -> Mapping[str, Tensor | dict[str, Tensor]]:
    """Weights by their names in the UNet; for a compressed adapter, keys and values as factors of their change.

    The paper's loader requires factors for either all or none of the keys and values, and never for other weights.
    """
    if not source.adapter.config.compressed:
        return source.after
    factors = low_rank(source, None).layers
    return {
        name: _factors(factors, name, weight) if ".to_k." in name or ".to_v." in name else weight
        for name, weight in source.after.items()
    }


def learned(weight: Any) -> Any:
    """A weight of a delta; compressed ones, {"u", "v"}, as `LowRankFactors`."""
    if isinstance(weight, dict) and weight.keys() == {"u", "v"}:
        return LowRankFactors(weight["u"], weight["v"])
    return weight


def check_same(loaded: Any, written: Any) -> None:
    """Check that nested dicts and lists of tensors are equal, bit for bit.

    Raises:
        UserError: they differ.
    """
    if isinstance(written, Tensor):
        same = isinstance(loaded, Tensor) and torch.equal(loaded, written)
    else:
        same = type(loaded) is type(written) and len(loaded) == len(written)
    if not same:
        raise UserError("the exported file does not reproduce the adapter")
    if isinstance(written, dict):
        for key, part in written.items():
            check_same(loaded.get(key), part)
    elif isinstance(written, list):
        for loaded_part, part in zip(loaded, written, strict=True):
            check_same(loaded_part, part)


def _factors(factors: dict[str, LowRankFactors], name: str, weight: Tensor) -> dict[str, Tensor]:
    none = LowRankFactors(torch.zeros(weight.shape[0], 1), torch.zeros(1, weight.shape[1]))
    up, down = factors.get(name.removesuffix(".weight"), none)
    return {"u": up, "v": down}


def _embedding(vectors: Any) -> TokenEmbedding:
    parts = vectors if isinstance(vectors, list) else [vectors]
    return dict(zip(("text_encoder", "text_encoder_2"), parts, strict=False))


def example_prompt(config: AdapterConfig) -> str:
    """The instance prompt of an adapter's first concept."""
    concept = next(iter(config.concepts.values()))
    return concept.instance_prompt.replace("{}", concept.modifier_token)
