"""A LoRA under kohya's key names, and embeddings: what AUTOMATIC1111, Forge, ComfyUI and sd-scripts read.

Blocks keep diffusers' numbers (`down_blocks_1_attentions_0`) for SDXL too. sd-scripts itself writes `input_blocks_4_1`
there, yet reads both, as do the other three and diffusers.
"""

import re
from pathlib import Path

from diffusers.utils import convert_state_dict_to_kohya
from safetensors.torch import load_file, save_file
from torch import Tensor

from customdiff.adapters.adapter import SDXL_KEYS
from customdiff.adapters.config import AdapterConfig
from customdiff.adapters.formats.changes import ExportSource, LowRank, check_embeddings, check_weights, low_rank
from customdiff.adapters.formats.lora import load_embedding, load_lora, one_rank
from customdiff.errors import UserError

LORAS, EMBEDDINGS = "loras", "embeddings"
BIAS = ".diff_b"
# sd-scripts' names of base models, by which web UIs show a LoRA with the models that it fits
FAMILIES = {
    "Stable Diffusion 1.x": {"ss_base_model_version": "sd_v1", "ss_v2": "False"},
    "Stable Diffusion 2.x": {"ss_base_model_version": "sd_v2", "ss_v2": "True"},
    "Stable Diffusion XL": {"ss_base_model_version": "sdxl_base_v1-0", "ss_v2": "False"},
}


def check(config: AdapterConfig, rank: int | None) -> None:
    """Refuse tokens that come to the same word.

    Raises:
        UserError: names them.
    """
    words = _words(config)
    if not all(words.values()) or len(set(words.values())) < len(words):
        raise UserError(
            f"--format kohya: web UIs call an embedding by its file's name, and {', '.join(words)} make no names of "
            "their own without their signs; train with tokens such as <new1> and <new2>"
        )


def write(source: ExportSource, folder: Path, rank: int | None) -> float:
    """Write loras/<concepts>.safetensors, if anything of the UNet was learned, and embeddings/<word>.safetensors."""
    found = low_rank(source, rank)
    if found.layers:
        (folder / LORAS).mkdir()
        save_file(tensors(found), folder / _lora(source.adapter.config), _metadata(source.adapter.config, found))
    (folder / EMBEDDINGS).mkdir()
    for token, word in _words(source.adapter.config).items():
        rows = {key: row[None] for key, row in source.adapter.embeddings[token].items()}
        named = {"emb_params": rows["text_encoder"]} if len(rows) == 1 else {SDXL_KEYS[key]: rows[key] for key in rows}
        save_file(named, folder / _embedding(word))
    return found.error


def verify(source: ExportSource, folder: Path, error: float) -> None:
    """Load all files through diffusers' own converter of kohya's keys, fold them in, and compare."""
    if (folder / _lora(source.adapter.config)).exists():
        found = load_file(folder / _lora(source.adapter.config))
        load_lora(source.pipe, {name: tensor for name, tensor in found.items() if not name.endswith(BIAS)})
        for name, weight in source.pipe.unet.named_parameters():
            key = _module(name.removesuffix(".bias")) + BIAS
            if name.endswith(".bias") and key in found:
                weight.data += found[key]  # diffusers knows no such entry; ComfyUI adds it so
    check_weights(source.pipe.unet, source, error)
    words = _words(source.adapter.config)
    for word in words.values():
        load_embedding(source.pipe, folder / _embedding(word), word)
    check_embeddings(source.pipe, {word: source.adapter.embeddings[token] for token, word in words.items()})


def instructions(config: AdapterConfig, folder: Path) -> str:
    """Where the files go in each program, and what to write in a prompt."""
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
        lines.append("the changes of output biases (.diff_b) are applied by ComfyUI and Forge; others pass over them")
    return "\n".join(lines)


def tensors(found: LowRank) -> dict[str, Tensor]:
    """Factors under kohya's names: .lora_down.weight (r, in), .lora_up.weight (out, r), .alpha (r), .diff_b."""
    peft = {f"unet.{name}": tensor for name, tensor in one_rank(found).items()}
    named = convert_state_dict_to_kohya({name: tensor for name, tensor in peft.items() if not name.endswith(".bias")})
    named = {key: tensor.float() if key.endswith(".alpha") else tensor for key, tensor in named.items()}
    return named | {_module(layer) + BIAS: change for layer, change in found.biases.items()}


def _metadata(config: AdapterConfig, found: LowRank) -> dict[str, str]:
    rank = str(max(len(down) for _, down in found.layers.values()))
    names = {"ss_network_module": "networks.lora", "ss_network_dim": rank, "ss_network_alpha": rank}
    return {"format": "pt"} | names | FAMILIES.get(config.family or "", {})


def _module(layer: str) -> str:
    return f"lora_unet_{layer.replace('.', '_')}"


def _words(config: AdapterConfig) -> dict[str, str]:
    """Word by token: `<new1>` is new1, for a file's name, which not every system lets hold < and >."""
    tokens = [concept.modifier_token for concept in config.concepts.values()]
    return {token: re.sub(r"[^\w.-]", "", token) for token in tokens}


def _lora(config: AdapterConfig) -> Path:
    return Path(LORAS, f"{'-'.join(config.concepts)}.safetensors")


def _embedding(word: str) -> Path:
    return Path(EMBEDDINGS, f"{word}.safetensors")
