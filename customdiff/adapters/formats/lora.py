"""Format `lora`: a LoRA for diffusers' `load_lora_weights`, and a textual inversion per token."""

from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import pad

from customdiff.adapters.adapter import LORA_WEIGHTS, SDXL_KEYS, embedding_tensors, token_file
from customdiff.adapters.config import AdapterConfig
from customdiff.adapters.formats.changes import ExportSource, LowRank, check_embeddings, check_weights, low_rank
from customdiff.errors import UserError
from customdiff.models.text import text_encoders


def check(config: AdapterConfig, rank: int | None) -> None:
    """Accept every adapter."""


def write(source: ExportSource, folder: Path, rank: int | None) -> float:
    """Write pytorch_lora_weights.safetensors, if the UNet changed, and <token>.safetensors."""
    change = low_rank(source, rank)
    if change.layers:
        source.pipe.save_lora_weights(folder, unet_lora_layers=equal_rank_factors(change))
    for token, embedding in source.adapter.embeddings.items():
        save_file(embedding_tensors(token, embedding), folder / f"{token_file(token)}.safetensors")
    return change.error


def verify(source: ExportSource, folder: Path, error: float) -> None:
    """Load all files with diffusers and compare the resulting weights with the adapter."""
    if (folder / f"{LORA_WEIGHTS}.safetensors").exists():
        load_lora(source.pipe, folder)
    check_weights(source.pipe.unet, source, error)
    for token in source.adapter.embeddings:
        load_embedding(source.pipe, folder / f"{token_file(token)}.safetensors", token)
    check_embeddings(source.pipe, source.adapter.embeddings)


def instructions(config: AdapterConfig, folder: Path) -> str:
    """The calls that load the files."""
    lines = ["in diffusers, on a pipeline of the base model:"]
    if (folder / f"{LORA_WEIGHTS}.safetensors").exists():
        lines.append(f'pipe.load_lora_weights("{folder}")')
    for concept in config.concepts.values():
        token = concept.modifier_token
        path = folder / f"{token_file(token)}.safetensors"
        if config.family != "Stable Diffusion XL":
            lines.append(f'pipe.load_textual_inversion("{path}")')
        else:
            lines.append(f'embeddings = safetensors.torch.load_file("{path}")')
            lines += [
                f'pipe.load_textual_inversion(embeddings["{key}"], token="{token}", '
                f"text_encoder=pipe.{name}, tokenizer=pipe.{name.replace('text_encoder', 'tokenizer')})"
                for name, key in SDXL_KEYS.items()
            ]
    if config.method == "custom_diffusion" and config.freeze_model == "crossattn":
        lines.append("# fuse_lora does not support its changes of biases; use --format pipeline for merged weights")
    return "\n  ".join(lines)


def equal_rank_factors(change: LowRank) -> dict[str, Tensor]:
    """Factors under PEFT's names, padded with zeros to one rank.

    All scales are then 1. With different alphas in kohya's format, diffusers 0.42 assigns some to the wrong layers.
    """
    rank = max(len(down) for _, down in change.layers.values())
    tensors = {}
    for layer, (up, down) in change.layers.items():
        tensors[f"{layer}.lora_A.weight"] = pad(down, (0, 0, 0, rank - len(down))).contiguous()
        tensors[f"{layer}.lora_B.weight"] = pad(up, (0, rank - len(down))).contiguous()
        if change.biases:  # PEFT supports biases for all layers or none
            tensors[f"{layer}.lora_B.bias"] = change.biases.get(layer, torch.zeros(len(up)))
    return tensors


def load_lora(pipe: DiffusionPipeline, file: Path | dict[str, Tensor]) -> None:
    """Load a LoRA with diffusers and add the changes that PEFT computes to the UNet's weights.

    `fuse_lora` is not used, because it rejects changes of biases if a layer has no bias.

    Raises:
        UserError: PEFT is not installed.
    """
    try:
        from peft.tuners.lora import LoraLayer
    except ImportError as error:
        raise UserError("--format: diffusers loads a LoRA through PEFT; install customdiff[pipeline]") from error
    pipe.load_lora_weights(file)
    for layer in [module for module in pipe.unet.modules() if isinstance(module, LoraLayer)]:
        (name,) = layer.active_adapters
        linear, bias = layer.get_base_layer(), layer.lora_B[name].bias
        linear.weight.data += layer.get_delta_weight(name)
        if linear.bias is not None and bias is not None:
            linear.bias.data += bias.detach() * layer.scaling[name]
    pipe.unload_lora_weights()


def load_embedding(pipe: DiffusionPipeline, path: Path, word: str) -> None:
    """Load a textual inversion into all text encoders with diffusers."""
    tensors = load_file(path)
    for name, (tokenizer, encoder) in text_encoders(pipe).items():
        vector = tensors[SDXL_KEYS[name]] if SDXL_KEYS[name] in tensors else next(iter(tensors.values()))
        pipe.load_textual_inversion(vector, token=word, tokenizer=tokenizer, text_encoder=encoder)
