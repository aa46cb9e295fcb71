"""delta.bin, as the paper's diffusers code writes and loads it (`src/diffusers_model_pipeline.py`).

{"unet": {"down_blocks....attn2.to_k.weight": (out, in), ...},    or {"u": (out, r), "v": (r, in)} for a change
 "modifier_token": {"<new1>": (D,)}}                              in SDXL a list of two
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from customdiff.adapters.config import AdapterConfig
from customdiff.adapters.formats.changes import ExportSource, LowRankFactors, low_rank
from customdiff.adapters.formats.foreign import ImportedWeights, ImportRequest, named, read_pickle
from customdiff.errors import UserError
from customdiff.models.modifier_tokens import TokenEmbedding

FILE = "delta.bin"


def check(config: AdapterConfig, rank: int | None) -> None:
    """Refuse a rank, and what is not of cross-attention.

    Raises:
        UserError: names what would hold it.
    """
    if rank is not None:
        raise UserError("--rank: a delta is written as it was learned; --format lora and kohya have a rank")
    if config.method == "lora":
        raise UserError(
            "--format: a delta holds cross-attention alone, and train.method lora changes self-attention too; use "
            "pipeline, lora or kohya"
        )


def write(source: ExportSource, folder: Path, rank: int | None) -> float:
    """Write delta.bin; that of a compressed adapter is compressed."""
    torch.save(content(source), folder / FILE)
    return 0.0


def verify(source: ExportSource, folder: Path, error: float) -> None:
    """Read the file again, and compare."""
    check_same(torch.load(folder / FILE, weights_only=True), content(source))


def instructions(config: AdapterConfig, folder: Path) -> str:
    """The paper's own command."""
    options = " --compress" if config.compressed else ""
    options += " --sdxl" if config.family == "Stable Diffusion XL" else ""
    return (
        "in the paper's repository (adobe-research/custom-diffusion):\n"
        f"  python src/diffusers_sample.py --ckpt {config.base.model} --delta_ckpt {folder / FILE}{options} "
        f'--prompt "{example(config)}"'
    )


def read(path: Path, request: ImportRequest) -> ImportedWeights:
    """Read a delta.bin, or the one in a folder; a trained text encoder is refused, for adapters here have none.

    Raises:
        UserError: it is not of this form.
    """
    path = path / FILE if path.is_dir() else path
    found = read_pickle(path, request)
    if isinstance(found, dict) and "state_dict" in found:
        raise UserError(f"{path}: of the paper's CompVis code; --format compvis reads it")
    weights = named(found, "unet", path)
    if "text_encoder" in found:
        raise UserError(f"{path}: holds a trained text encoder, which an adapter here has no place for")
    rows = {token: _rows(row) for token, row in named(found, "modifier_token", path).items()}
    return ImportedWeights({name: learned(weight) for name, weight in weights.items()}, rows, path)


def content(source: ExportSource) -> dict:
    """What delta.bin holds."""
    rows = {token: list(row.values()) for token, row in source.adapter.embeddings.items()}
    return {
        "unet": weights(source),
        "modifier_token": {token: row[0] if len(row) == 1 else row for token, row in rows.items()},
    }


def weights(source: ExportSource) -> dict[str, Tensor | dict[str, Tensor]]:
    """Weights by the UNet's own names; of a compressed adapter, keys and values as factors of their change.

    The paper's loader wants factors for all keys and values or for none, and for nothing else.
    """
    if not source.adapter.config.compressed:
        return source.after
    factors = low_rank(source, None).layers
    return {
        name: _factors(factors, name, weight) if ".to_k." in name or ".to_v." in name else weight
        for name, weight in source.after.items()
    }


def learned(weight: Any) -> Any:
    """A weight of a delta, {"u", "v"} of a compressed one as `LowRankFactors`."""
    return (
        LowRankFactors(weight["u"], weight["v"]) if isinstance(weight, dict) and weight.keys() == {"u", "v"} else weight
    )


def check_same(found: Any, written: Any) -> None:
    """Check that nested dicts and lists of tensors hold the same, bit for bit.

    Raises:
        UserError: they do not.
    """
    if isinstance(written, Tensor):
        same = isinstance(found, Tensor) and torch.equal(found, written)
    else:
        same = type(found) is type(written) and len(found) == len(written)
    if not same:
        raise UserError("the written file does not give back what was learned")
    if isinstance(written, dict):
        for key, part in written.items():
            check_same(found.get(key), part)
    elif isinstance(written, list):
        for one, part in zip(found, written, strict=True):
            check_same(one, part)


def _factors(factors: dict[str, LowRankFactors], name: str, weight: Tensor) -> dict[str, Tensor]:
    none = LowRankFactors(torch.zeros(weight.shape[0], 1), torch.zeros(1, weight.shape[1]))
    up, down = factors.get(name.removesuffix(".weight"), none)
    return {"u": up, "v": down}


def _rows(row: Any) -> TokenEmbedding:
    parts = row if isinstance(row, list) else [row]
    return dict(zip(("text_encoder", "text_encoder_2"), parts, strict=False))


def example(config: AdapterConfig) -> str:
    """A prompt for the first of an adapter's concepts."""
    concept = next(iter(config.concepts.values()))
    return concept.instance_prompt.replace("{}", concept.modifier_token)
