"""Format `compvis`: delta.ckpt of the paper's original code, with CompVis names (`src/get_deltas.py`, `sample.py`).

{"state_dict": {"model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (out, in), ...,
                "embed": (tokens, D)}}                           compressed: {"u": (out, r), "v": (r, in)}
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from customdiff.adapters.config import AdapterConfig
from customdiff.adapters.formats import delta
from customdiff.adapters.formats.changes import ExportSource
from customdiff.adapters.formats.foreign import ImportedWeights, ImportRequest, read_pickle, section
from customdiff.errors import UserError
from customdiff.models.modifier_tokens import TokenEmbedding

FILE = "delta.ckpt"
PREFIX = "model.diffusion_model."
EMBED = "embed"
# prefix of CompVis, prefix of diffusers, and CompVis' index of the first block that may have attention
_BLOCKS = (("input", "down", 1), ("output", "up", 0))


def check(config: AdapterConfig, rank: int | None) -> None:
    """Check that the format can hold the adapter; see `delta.check`."""
    delta.check(config, rank)


def write(source: ExportSource, folder: Path, rank: int | None) -> float:
    """Write delta.ckpt, compressed if the adapter is.

    Raises:
        UserError: CompVis' code does not support the base model.
    """
    family = source.adapter.config.family
    if family != "Stable Diffusion 1.x":
        raise UserError(f"--format: the paper's CompVis code does not support {family}; use --format delta")
    torch.save(content(source), folder / FILE)
    return 0.0


def verify(source: ExportSource, folder: Path, error: float) -> None:
    """Read the file again and compare it with the adapter."""
    delta.check_same(torch.load(folder / FILE, weights_only=True), content(source))


def instructions(config: AdapterConfig, folder: Path) -> str:
    """The sampling command of the paper's repository."""
    tokens = "+".join(concept.modifier_token for concept in config.concepts.values())
    return (
        "in the paper's repository (adobe-research/custom-diffusion), with the base model as CompVis' checkpoint:\n"
        f"  python sample.py --ckpt sd-v1-4.ckpt --delta_ckpt {folder / FILE} --modifier_token '{tokens}' "
        f'{"--compress " if config.compressed else ""}--prompt "{delta.example_prompt(config)}"'
    )


def read(path: Path, request: ImportRequest) -> ImportedWeights:
    """Read a delta.ckpt, or the one in a folder; its unnamed tokens are assigned to the requested ones in order.

    Raises:
        UserError: the file has another format or number of tokens.
    """
    path = path / FILE if path.is_dir() else path
    contents = read_pickle(path, request)
    if isinstance(contents, dict) and "unet" in contents:
        raise UserError(f"{path}: from the paper's diffusers code; --format delta reads it")
    state = section(contents, "state_dict", path)
    layers = request.pipe.unet.config.layers_per_block
    weights = {diffusers_name(name, layers): delta.learned(state[name]) for name in state if name != EMBED}
    return ImportedWeights(weights, _embeddings(state.get(EMBED), path, request), path)


def content(source: ExportSource) -> dict:
    """Contents of delta.ckpt."""
    layers = source.pipe.unet.config.layers_per_block
    weights = {compvis_name(name, layers): weight for name, weight in delta.weights(source).items()}
    embed = torch.stack([embedding["text_encoder"] for embedding in source.adapter.embeddings.values()])
    return {"state_dict": weights | {EMBED: embed}}


def compvis_name(name: str, layers: int) -> str:
    """CompVis' name for a UNet's weight: `down_blocks.0.attentions.1.` is `model.diffusion_model.input_blocks.2.1.`

    CompVis numbers blocks consecutively: conv_in, then the layers and the downsampler of each level. Output blocks have
    layers + 1 per level.

    Args:
        layers: the UNet's layers_per_block, 2 in Stable Diffusion.
    """
    name = name.replace("mid_block.attentions.0.", "middle_block.1.")
    for compvis, diffusers, first in _BLOCKS:
        match = re.match(rf"{diffusers}_blocks\.(\d+)\.attentions\.(\d+)\.", name)
        if match:
            block = first + int(match[1]) * (layers + 1) + int(match[2])
            name = f"{compvis}_blocks.{block}.1.{name[match.end() :]}"
    return PREFIX + name


def diffusers_name(name: str, layers: int) -> str:
    """The UNet's name for a weight of CompVis; the inverse of `compvis_name`."""
    name = name.removeprefix(PREFIX).replace("middle_block.1.", "mid_block.attentions.0.")
    for compvis, diffusers, first in _BLOCKS:
        match = re.match(rf"{compvis}_blocks\.(\d+)\.1\.", name)
        if match:
            level, layer = divmod(int(match[1]) - first, layers + 1)
            name = f"{diffusers}_blocks.{level}.attentions.{layer}.{name[match.end() :]}"
    return name


def _embeddings(embed: Any, path: Path, request: ImportRequest) -> dict[str, TokenEmbedding]:
    """Embeddings of the requested tokens from `embed` (tokens, D), which the paper's `convert.py` flattens."""
    width = request.pipe.text_encoder.config.hidden_size
    count = embed.numel() // width if isinstance(embed, Tensor) and embed.numel() % width == 0 else 0
    if count != len(request.tokens):
        raise UserError(f"{path}: has {count} tokens of {width} values; --token names {len(request.tokens)}, in order")
    vectors = embed.reshape(-1, width)
    return {token: {"text_encoder": vector} for token, vector in zip(request.tokens, vectors, strict=True)}
