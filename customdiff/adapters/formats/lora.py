"""A LoRA as diffusers' `load_lora_weights` reads it, by way of PEFT; each token as a textual inversion beside it."""

from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import pad

from customdiff.adapters.adapter import LORA_WEIGHTS, SDXL_KEYS, token_file
from customdiff.adapters.config import AdapterConfig
from customdiff.adapters.formats.changes import ExportSource, LowRank, check_embeddings, check_weights, low_rank
from customdiff.errors import UserError
from customdiff.models.text import text_encoders


def check(config: AdapterConfig, rank: int | None) -> None:
    """Every adapter can be a LoRA."""


def write(source: ExportSource, folder: Path, rank: int | None) -> float:
    """Write pytorch_lora_weights.safetensors, if anything of the UNet was learned, and <token>.safetensors."""
    found = low_rank(source, rank)
    if found.layers:
        source.pipe.save_lora_weights(folder, unet_lora_layers=one_rank(found))
    for token, rows in source.adapter.embeddings.items():
        named = {token: rows["text_encoder"]} if len(rows) == 1 else {SDXL_KEYS[key]: row for key, row in rows.items()}
        save_file(named, folder / f"{token_file(token)}.safetensors")
    return found.error


def verify(source: ExportSource, folder: Path, error: float) -> None:
    """Load all files as diffusers' documentation does, fold them in, and compare."""
    if (folder / f"{LORA_WEIGHTS}.safetensors").exists():
        load_lora(source.pipe, folder)
    check_weights(source.pipe.unet, source, error)
    for token in source.adapter.embeddings:
        load_embedding(source.pipe, folder / f"{token_file(token)}.safetensors", token)
    check_embeddings(source.pipe, source.adapter.embeddings)


def instructions(config: AdapterConfig, folder: Path) -> str:
    """The calls that open it."""
    lines = ["in diffusers, on a pipeline of the base model:"]
    if (folder / f"{LORA_WEIGHTS}.safetensors").exists():
        lines.append(f'pipe.load_lora_weights("{folder}")')
    for concept in config.concepts.values():
        token = concept.modifier_token
        path = folder / f"{token_file(token)}.safetensors"
        if config.family != "Stable Diffusion XL":
            lines.append(f'pipe.load_textual_inversion("{path}")')
        else:
            lines.append(f'rows = safetensors.torch.load_file("{path}")')
            lines += [
                f'pipe.load_textual_inversion(rows["{key}"], token="{token}", '
                f"text_encoder=pipe.{name}, tokenizer=pipe.{name.replace('text_encoder', 'tokenizer')})"
                for name, key in SDXL_KEYS.items()
            ]
    if config.method == "custom_diffusion" and config.freeze_model == "crossattn":
        lines.append("# its changes of biases cannot be fused by fuse_lora; --format pipeline is fused")
    return "\n  ".join(lines)


def one_rank(found: LowRank) -> dict[str, Tensor]:
    """Factors by PEFT's names, all of one rank, with zeros where a layer needs less of it.

    Every reader then multiplies by 1; where kohya's alphas differ, diffusers 0.42 gives some layers those of others.
    """
    rank = max(len(down) for _, down in found.layers.values())
    tensors = {}
    for layer, (up, down) in found.layers.items():
        tensors[f"{layer}.lora_A.weight"] = pad(down, (0, 0, 0, rank - len(down))).contiguous()
        tensors[f"{layer}.lora_B.weight"] = pad(up, (0, rank - len(down))).contiguous()
        if found.biases:  # PEFT knows them for all layers or for none
            tensors[f"{layer}.lora_B.bias"] = found.biases.get(layer, torch.zeros(len(up)))
    return tensors


def load_lora(pipe: DiffusionPipeline, file: Path | dict[str, Tensor]) -> None:
    """Load a LoRA by diffusers' own call, and fold what PEFT computes with it into the UNet.

    Not by `fuse_lora`, which refuses changes of biases where any of the layers has none.

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
        own, bias = layer.get_base_layer(), layer.lora_B[name].bias
        own.weight.data += layer.get_delta_weight(name)
        if own.bias is not None and bias is not None:
            own.bias.data += bias.detach() * layer.scaling[name]
    pipe.unload_lora_weights()


def load_embedding(pipe: DiffusionPipeline, path: Path, word: str) -> None:
    """Load a textual inversion by diffusers' own call, into both text encoders where there are two."""
    found = load_file(path)
    for name, (tokenizer, encoder) in text_encoders(pipe).items():
        row = found[SDXL_KEYS[name]] if SDXL_KEYS[name] in found else next(iter(found.values()))
        pipe.load_textual_inversion(row, token=word, tokenizer=tokenizer, text_encoder=encoder)
