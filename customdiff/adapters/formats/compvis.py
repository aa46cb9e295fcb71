"""Format `compvis`: delta.ckpt of the paper's original code, with CompVis names (`src/get_deltas.py`, `sample.py`).

{"state_dict": {"model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (out, in), ...,
                "embed": (tokens, D)}}                           compressed: {"u": (out, r), "v": (r, in)}
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
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
    layers = _layers(request.pipe.unet)
    weights = {diffusers_name(name, layers): delta.learned(state[name]) for name in state if name != EMBED}
    return ImportedWeights(weights, _embeddings(state.get(EMBED), path, request), path)


def content(source: ExportSource) -> dict:
    """Contents of delta.ckpt."""
    layers = _layers(source.pipe.unet)
    weights = {compvis_name(name, layers): weight for name, weight in delta.weights(source).items()}
    embed = torch.stack([embedding["text_encoder"] for embedding in source.adapter.embeddings.values()])
    return {"state_dict": weights | {EMBED: embed}}


def compvis_name(name: str, layers: Sequence[int]) -> str:
    """CompVis' name for a UNet's weight: `down_blocks.0.attentions.1.` is `model.diffusion_model.input_blocks.2.1.`

    Args:
        layers: residual blocks of each level of the UNet, 2 in Stable Diffusion.
    """
    return PREFIX + _renamed(name, dict(_block_names(layers)))


def diffusers_name(name: str, layers: Sequence[int]) -> str:
    """The UNet's name for a weight of CompVis; the inverse of `compvis_name`."""
    return _renamed(name.removeprefix(PREFIX), {compvis: diffusers for diffusers, compvis in _block_names(layers)})


def _block_names(layers: Sequence[int]) -> Iterator[tuple[str, str]]:
    """The prefix of each attention block in diffusers and in CompVis.

    CompVis numbers blocks consecutively: conv_in, then the layers and the downsampler of each level. Output blocks
    have one layer more per level.
    """
    yield "mid_block.attentions.0.", "middle_block.1."
    inputs, outputs = itertools.count(1), itertools.count()
    for level, count in enumerate(layers):
        for layer in range(count):
            yield f"down_blocks.{level}.attentions.{layer}.", f"input_blocks.{next(inputs)}.1."
        next(inputs)  # the downsampler
    for level, count in enumerate(reversed(layers)):
        for layer in range(count + 1):
            yield f"up_blocks.{level}.attentions.{layer}.", f"output_blocks.{next(outputs)}.1."


def _renamed(name: str, prefixes: Mapping[str, str]) -> str:
    """A weight's name with another prefix of its attention block; unchanged if it has none of them."""
    found = next((prefix for prefix in prefixes if name.startswith(prefix)), "")
    return prefixes[found] + name.removeprefix(found) if found else name


def _layers(unet: UNet2DConditionModel) -> Sequence[int]:
    """Residual blocks of each level."""
    layers = unet.config.layers_per_block
    return [layers] * len(unet.config.block_out_channels) if isinstance(layers, int) else layers


def _embeddings(embed: Any, path: Path, request: ImportRequest) -> dict[str, TokenEmbedding]:
    """Embeddings of the requested tokens from `embed` (tokens, D), which the paper's `convert.py` flattens."""
    width = request.pipe.text_encoder.config.hidden_size
    count = embed.numel() // width if isinstance(embed, Tensor) and embed.numel() % width == 0 else 0
    if count != len(request.tokens):
        raise UserError(f"{path}: has {count} tokens of {width} values; --token names {len(request.tokens)}, in order")
    vectors = embed.reshape(-1, width)
    return {token: {"text_encoder": vector} for token, vector in zip(request.tokens, vectors, strict=True)}
