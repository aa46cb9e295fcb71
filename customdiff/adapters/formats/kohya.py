"""Format `kohya`: a LoRA with kohya's key names, and embeddings, for AUTOMATIC1111, Forge, ComfyUI and sd-scripts.

Blocks have diffusers' numbers (`down_blocks_1_attentions_0`), also for SDXL. sd-scripts writes `input_blocks_4_1` for
SDXL but reads both, as do the other programs and diffusers.
"""

import re
from pathlib import Path

from diffusers.utils import convert_state_dict_to_kohya
from safetensors.torch import load_file, save_file
from torch import Tensor

from customdiff.adapters.adapter import embedding_tensors
from customdiff.adapters.config import AdapterConfig
from customdiff.adapters.formats.changes import ExportSource, LowRank, check_embeddings, check_weights, low_rank
from customdiff.adapters.formats.lora import equal_rank_factors, load_embedding, load_lora
from customdiff.errors import UserError

LORAS, EMBEDDINGS = "loras", "embeddings"
BIAS = ".diff_b"
MAX_NAME = 200  # characters of a file name, which most file systems limit to 255 bytes
# sd-scripts' names of base models, by which web UIs group LoRAs
FAMILIES = {
    "Stable Diffusion 1.x": {"ss_base_model_version": "sd_v1", "ss_v2": "False"},
    "Stable Diffusion 2.x": {"ss_base_model_version": "sd_v2", "ss_v2": "True"},
    "Stable Diffusion XL": {"ss_base_model_version": "sdxl_base_v1-0", "ss_v2": "False"},
}


def check(config: AdapterConfig, rank: int | None) -> None:
    """Check that the tokens give distinct file names.

    Raises:
        UserError: they do not.
    """
    words = _words(config)
    if not all(words.values()) or len(set(words.values())) < len(words):
        raise UserError(
            f"--format kohya: {', '.join(words)} do not give distinct file names without special characters; "
            "train with tokens such as <new1> and <new2>"
        )


def write(source: ExportSource, folder: Path, rank: int | None) -> float:
    """Write loras/<concepts>.safetensors, if the UNet changed, and embeddings/<word>.safetensors."""
    change = low_rank(source, rank)
    if change.layers:
        (folder / LORAS).mkdir()
        save_file(tensors(change), folder / _lora(source.adapter.config), _metadata(source.adapter.config, change))
    (folder / EMBEDDINGS).mkdir()
    for token, word in _words(source.adapter.config).items():
        vectors = embedding_tensors("emb_params", source.adapter.embeddings[token])
        save_file({key: vector[None] for key, vector in vectors.items()}, folder / _embedding(word))
    return change.error


def verify(source: ExportSource, folder: Path, error: float) -> None:
    """Load all files with diffusers' converter of kohya's keys and compare the resulting weights with the adapter."""
    if (folder / _lora(source.adapter.config)).exists():
        loaded = load_file(folder / _lora(source.adapter.config))
        load_lora(source.pipe, {name: tensor for name, tensor in loaded.items() if not name.endswith(BIAS)})
        for name, weight in source.pipe.unet.named_parameters():
            key = _module(name.removesuffix(".bias")) + BIAS
            if name.endswith(".bias") and key in loaded:
                weight.data += loaded[key]  # as ComfyUI does; diffusers ignores these entries
    check_weights(source.pipe.unet, source, error)
    words = _words(source.adapter.config)
    for word in words.values():
        load_embedding(source.pipe, folder / _embedding(word), word)
    check_embeddings(source.pipe, {word: source.adapter.embeddings[token] for token, word in words.items()})


def instructions(config: AdapterConfig, folder: Path) -> str:
    """Folders for the files in each program, and prompts."""
    words = zip(_words(config).values(), config.concepts.values(), strict=True)
    named = [(word, concept.class_prompt) for word, concept in words]
    lora = folder / _lora(config)
    name = f" <lora:{lora.stem}:1>" if lora.exists() else ""
    lines = [
        f"AUTOMATIC1111 and Forge: {folder / LORAS}/* to models/Lora, {folder / EMBEDDINGS}/* to embeddings;",
        f"  prompt: {', '.join(f'{word} {kind}' for word, kind in named)}{name}",
        f"ComfyUI: {folder / LORAS}/* to models/loras, {folder / EMBEDDINGS}/* to models/embeddings; node Load LoRA,",
        f"  strength 1; prompt: {', '.join(f'embedding:{word} {kind}' for word, kind in named)}",
    ]
    if lora.exists() and any(key.endswith(BIAS) for key in load_file(lora)):
        lines.append("ComfyUI and Forge apply the changes of output biases (.diff_b); other programs ignore them")
    return "\n".join(lines)


def tensors(change: LowRank) -> dict[str, Tensor]:
    """Factors under kohya's names: .lora_down.weight (r, in), .lora_up.weight (out, r), .alpha (r), .diff_b."""
    peft = {f"unet.{name}": tensor for name, tensor in equal_rank_factors(change).items()}
    named = convert_state_dict_to_kohya({name: tensor for name, tensor in peft.items() if not name.endswith(".bias")})
    named = {key: tensor.float() if key.endswith(".alpha") else tensor for key, tensor in named.items()}
    return named | {_module(layer) + BIAS: bias for layer, bias in change.biases.items()}


def _metadata(config: AdapterConfig, change: LowRank) -> dict[str, str]:
    rank = str(max(len(down) for _, down in change.layers.values()))
    names = {"ss_network_module": "networks.lora", "ss_network_dim": rank, "ss_network_alpha": rank}
    return {"format": "pt"} | names | FAMILIES.get(config.family or "", {})


def _module(layer: str) -> str:
    return f"lora_unet_{layer.replace('.', '_')}"


def _words(config: AdapterConfig) -> dict[str, str]:
    """Word by token: new1 for `<new1>`, because not every file system allows < and > in names."""
    tokens = [concept.modifier_token for concept in config.concepts.values()]
    return {token: re.sub(r"[^\w.-]", "", token) for token in tokens}


def _lora(config: AdapterConfig) -> Path:
    return Path(LORAS, f"{'-'.join(config.concepts)[:MAX_NAME]}.safetensors")


def _embedding(word: str) -> Path:
    return Path(EMBEDDINGS, f"{word}.safetensors")
