"""delta.ckpt, as the paper's first code writes and loads it, by CompVis' names (`src/get_deltas.py`, `sample.py`).

{"state_dict": {"model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (out, in), ...,
                "embed": (tokens, D)}}                           or {"u": (out, r), "v": (r, in)} for a change
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from customdiff.adapters.config import AdapterConfig
from customdiff.adapters.formats import delta
from customdiff.adapters.formats.changes import ExportSource
from customdiff.adapters.formats.foreign import ImportedWeights, ImportRequest, named, read_pickle
from customdiff.errors import UserError
from customdiff.models.modifier_tokens import TokenEmbedding

FILE = "delta.ckpt"
PREFIX = "model.diffusion_model."
EMBED = "embed"
# CompVis' word, diffusers' word, and CompVis' number of the first block that may hold attention
_BLOCKS = (("input", "down", 1), ("output", "up", 0))


def check(config: AdapterConfig, rank: int | None) -> None:
    """Refuse what no delta holds."""
    delta.check(config, rank)


def write(source: ExportSource, folder: Path, rank: int | None) -> float:
    """Write delta.ckpt; that of a compressed adapter is compressed.

    Raises:
        UserError: CompVis' code does not load the base model.
    """
    family = source.adapter.config.family
    if family != "Stable Diffusion 1.x":
        raise UserError(f"--format: the paper's CompVis code loads no {family}; --format delta is for it")
    torch.save(content(source), folder / FILE)
    return 0.0


def verify(source: ExportSource, folder: Path, error: float) -> None:
    """Read the file again, and compare."""
    delta.check_same(torch.load(folder / FILE, weights_only=True), content(source))


def instructions(config: AdapterConfig, folder: Path) -> str:
    """The paper's own command."""
    tokens = "+".join(concept.modifier_token for concept in config.concepts.values())
    return (
        "in the paper's repository (adobe-research/custom-diffusion), with the base model as CompVis' checkpoint:\n"
        f"  python sample.py --ckpt sd-v1-4.ckpt --delta_ckpt {folder / FILE} --modifier_token '{tokens}' "
        f'{"--compress " if config.compressed else ""}--prompt "{delta.example(config)}"'
    )


def read(path: Path, request: ImportRequest) -> ImportedWeights:
    """Read a delta.ckpt, or the one in a folder; its tokens have no names, and are those asked for, in order.

    Raises:
        UserError: it is not of this form, or has another number of tokens.
    """
    path = path / FILE if path.is_dir() else path
    found = read_pickle(path, request)
    if isinstance(found, dict) and "unet" in found:
        raise UserError(f"{path}: of the paper's diffusers code; --format delta reads it")
    held = named(found, "state_dict", path)
    layers = request.pipe.unet.config.layers_per_block
    weights = {diffusers_name(name, layers): delta.learned(held[name]) for name in held if name != EMBED}
    return ImportedWeights(weights, _rows(held.get(EMBED), path, request), path)


def content(source: ExportSource) -> dict:
    """What delta.ckpt holds."""
    layers = source.pipe.unet.config.layers_per_block
    weights = {compvis_name(name, layers): weight for name, weight in delta.weights(source).items()}
    embed = torch.stack([row["text_encoder"] for row in source.adapter.embeddings.values()])
    return {"state_dict": weights | {EMBED: embed}}


def compvis_name(name: str, layers: int) -> str:
    """CompVis' name for a UNet's weight: `down_blocks.0.attentions.1.` is `model.diffusion_model.input_blocks.2.1.`

    CompVis counts through: conv_in, then each level's layers and its downsampler; on the way up layers + 1 to a level.

    Args:
        layers: the UNet's layers_per_block, 2 in Stable Diffusion.
    """
    name = name.replace("mid_block.attentions.0.", "middle_block.1.")
    for there, here, first in _BLOCKS:
        name = re.sub(
            rf"^{here}_blocks\.(\d+)\.attentions\.(\d+)\.",
            lambda found: f"{there}_blocks.{first + int(found[1]) * (layers + 1) + int(found[2])}.1.",  # noqa: B023
            name,
        )
    return PREFIX + name


def diffusers_name(name: str, layers: int) -> str:
    """The UNet's own name for one of CompVis': what `compvis_name` undoes."""
    name = name.removeprefix(PREFIX).replace("middle_block.1.", "mid_block.attentions.0.")
    for there, here, first in _BLOCKS:
        found = re.match(rf"{there}_blocks\.(\d+)\.1\.", name)
        if found:
            level, layer = divmod(int(found[1]) - first, layers + 1)
            name = f"{here}_blocks.{level}.attentions.{layer}.{name[found.end() :]}"
    return name


def _rows(embed: Any, path: Path, request: ImportRequest) -> dict[str, TokenEmbedding]:
    """The rows of `embed`, which the paper's `convert.py` writes flat."""
    width = request.pipe.text_encoder.config.hidden_size
    count = embed.numel() // width if isinstance(embed, Tensor) and embed.numel() % width == 0 else 0
    if count != len(request.tokens):
        raise UserError(f"{path}: has {count} tokens of {width} values; --token names {len(request.tokens)}, in order")
    return {token: {"text_encoder": row} for token, row in zip(request.tokens, embed.reshape(-1, width), strict=True)}
