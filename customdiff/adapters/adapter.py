"""Adapters: save, read, inject into a pipeline, and verify.

An adapter is a folder that diffusers' loaders can read:

    pytorch_custom_diffusion_weights.safetensors / .bin   cross-attention weights under diffusers' names
    <new1>.safetensors / .bin                             the embedding of one modifier token
    adapter.json                                          base model, concepts, method, seed, versions

Instead of the first file, adapters of method lora have `pytorch_lora_weights.safetensors`, and compressed adapters
have `compressed_weights.safetensors`, which diffusers cannot read. Textual inversion has neither.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from customdiff.adapters.config import CONFIG_FILE, AdapterConfig, read_config
from customdiff.errors import UserError
from customdiff.models import attention, base, methods, modifier_tokens, text
from customdiff.models.modifier_tokens import TokenEmbedding

WEIGHTS = "pytorch_custom_diffusion_weights"
LORA_WEIGHTS = "pytorch_lora_weights"
COMPRESSED_WEIGHTS = "compressed_weights"
# Keys of the two text encoders' embeddings in SDXL textual-inversion files.
SDXL_KEYS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}


@dataclass(frozen=True)
class Adapter:
    """Trained weights and token embeddings of one or more concepts.

    Attributes:
        weights: fp32 tensors under diffusers' names, `down_blocks....attn2.processor.to_k_custom_diffusion.weight`. A
            compressed adapter has `....to_k_custom_diffusion.up` (out, r) and `.down` (r, in) instead, whose product
            is added to the base model's weight.
        embeddings: fp32 embedding (D,) by modifier token and text encoder (`text_encoder`, in SDXL also
            `text_encoder_2`).
        config: contents of adapter.json.
    """

    weights: dict[str, Tensor]
    embeddings: dict[str, TokenEmbedding]
    config: AdapterConfig


def from_pipeline(pipe: DiffusionPipeline, config: AdapterConfig) -> Adapter:
    """Copy the trained weights and embeddings of a pipeline to the CPU in fp32; `config` gets the base's identity."""
    return Adapter(
        weights={name: _plain(weight) for name, weight in methods.trainable(pipe.unet).items()},
        embeddings=modifier_tokens.learned_embeddings(pipe),
        config=config.with_changes(
            family=base.family(pipe),
            processors=attention.processor_names(pipe.unet),
            fingerprint=fingerprint(pipe),
        ),
    )


def save(adapter: Adapter, folder: Path | str, *, with_pickle: bool = True) -> None:
    """Write an adapter to `folder` in the formats that diffusers reads.

    Args:
        with_pickle: also write `.bin` files, for programs that read no safetensors. `read` never opens them.

    Raises:
        UserError: a weight is NaN or infinite.
    """
    folder = Path(folder)
    check_values(adapter, str(folder))
    folder.mkdir(parents=True, exist_ok=True)
    name, missing = weights_name(adapter.config), _self_attention_layers(adapter)
    # diffusers requires an entry for each self-attention layer: in safetensors a zero-length tensor, which
    # `load_attn_procs` treats as empty; in .bin files the empty dict that diffusers itself writes.
    if adapter.weights:
        save_file(adapter.weights | {layer: torch.zeros(0) for layer in missing}, folder / f"{name}.safetensors")
    if adapter.weights and with_pickle and name == WEIGHTS:
        torch.save(adapter.weights | {layer: {} for layer in missing}, folder / f"{name}.bin")
    for token, embedding in adapter.embeddings.items():
        tensors = embedding_tensors(token, embedding)
        save_file(tensors, folder / f"{token_file(token)}.safetensors")
        if with_pickle:
            torch.save(tensors, folder / f"{token_file(token)}.bin")
    (folder / CONFIG_FILE).write_text(adapter.config.to_json(), encoding="utf-8")


def embedding_tensors(token: str, embedding: TokenEmbedding) -> dict[str, Tensor]:
    """One token's embedding under the keys of a textual-inversion file: the token, or SDXL's two keys."""
    if len(embedding) == 1:
        return {token: embedding["text_encoder"]}
    return {SDXL_KEYS[name]: vector for name, vector in embedding.items()}


def read(folder: Path | str) -> Adapter:
    """Read an adapter from its safetensors files.

    Raises:
        UserError: a file is missing, damaged or incomplete, or a weight is NaN or infinite.
    """
    folder = Path(folder)
    config = read_config(folder)
    try:
        weights = {}
        if methods.trains_unet(config):
            weights = load_file(folder / f"{weights_name(config)}.safetensors")
        adapter = Adapter(
            weights={name: weight for name, weight in weights.items() if weight.numel()},
            embeddings={token: _read_embedding(folder, token) for token in config.tokens},
            config=config,
        )
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{folder}: incomplete adapter ({reason}); train again with `dvc repro`") from error
    check_values(adapter, str(folder))
    return adapter


def check_values(adapter: Adapter, name: str) -> None:
    """Check that all weights and embeddings are finite floating-point numbers, and that embeddings are vectors.

    Raises:
        UserError: one is not; the message names it, and the adapter by `name`.
    """
    embeddings = {
        f"the embedding of {token} in {encoder}": vector
        for token, embedding in adapter.embeddings.items()
        for encoder, vector in embedding.items()
    }
    for key, tensor in (adapter.weights | embeddings).items():
        if not tensor.is_floating_point() or not bool(tensor.float().isfinite().all()):
            raise UserError(f"{name}: {key} has values that are not finite; train again with a lower learning rate")
    for key, vector in embeddings.items():
        if vector.ndim != 1:
            raise UserError(f"{name}: {key} has {vector.ndim} dimensions instead of 1; train again with `dvc repro`")


def size(folder: Path | str) -> int:
    """Size of an adapter's safetensors files in bytes."""
    return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))


def weights_name(config: AdapterConfig) -> str:
    """File name, without suffix, of an adapter's weights."""
    if config.method == "lora":
        return LORA_WEIGHTS
    return COMPRESSED_WEIGHTS if config.compressed else WEIGHTS


def load(pipe: DiffusionPipeline, folder: Path | str) -> Adapter:
    """Inject the adapter in `folder` into a pipeline of its base model.

    Diffusers' documented call, `pipe.unet.load_attn_procs(folder)`, returns without an error but changes nothing.
    Here every weight in the pipeline is compared with the file after loading.

    Args:
        pipe: a pipeline of the base model, on any device and in any dtype; changed in place.

    Raises:
        UserError: the folder contains no adapter, or the pipeline has another base model.
    """
    adapter = read(folder)
    inject(pipe, adapter)
    return adapter


def inject(pipe: DiffusionPipeline, adapter: Adapter) -> None:
    """Inject an adapter into a pipeline of its base model; see `load`."""
    check_base(pipe, adapter)
    modifier_tokens.add_tokens(pipe, adapter.embeddings)
    methods.inject(pipe.unet, adapter.config)
    weights, parameters = full_weights(adapter, pipe), methods.trainable(pipe.unet)
    for name, parameter in parameters.items():
        if name not in weights or weights[name].shape != parameter.shape:
            raise UserError(f"incomplete adapter: {name} is missing, or its shape differs from the base model's")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    verify(pipe, adapter)


def is_replaceable(injected: Adapter, other: Adapter) -> bool:
    """Whether `replace` can replace `injected` by `other`: same base, method, layers and tokens."""
    same_shapes = {name: weight.shape for name, weight in injected.weights.items()} == {
        name: weight.shape for name, weight in other.weights.items()
    }
    compressed = injected.config.compressed or other.config.compressed
    return (
        same_shapes
        and not compressed
        and list(injected.embeddings) == list(other.embeddings)
        and injected.config.fingerprint == other.config.fingerprint
        and _trained_part(injected) == _trained_part(other)
    )


def _trained_part(adapter: Adapter) -> tuple:
    return adapter.config.method, adapter.config.freeze_model, adapter.config.lora_rank


def replace(pipe: DiffusionPipeline, other: Adapter) -> None:
    """Replace the adapter in a pipeline by one for which `is_replaceable` holds, without loading the base again."""
    with torch.no_grad():
        for name, parameter in methods.trainable(pipe.unet).items():
            parameter.copy_(other.weights[name])
        for name, (tokenizer, encoder) in text.text_encoders(pipe).items():
            layer = encoder.get_input_embeddings()
            tokens = tokenizer.convert_ids_to_tokens(layer.ids.tolist())
            layer.trained.weight.copy_(torch.stack([other.embeddings[token][name] for token in tokens]))
    verify(pipe, other)


def full_weights(adapter: Adapter, pipe: DiffusionPipeline) -> dict[str, Tensor]:
    """An adapter's weights, fp32 on the CPU; low-rank changes of a compressed one are added to the base's weights."""
    if not adapter.config.compressed:
        return adapter.weights
    weights = {}
    for name, original in attention.originals(pipe.unet, adapter.config.freeze_model).items():
        stem = name.removesuffix("weight")
        if f"{stem}up" in adapter.weights:
            weights[name] = _plain(original) + _product(adapter, stem, original.shape)
        else:
            weights[name] = adapter.weights.get(name, torch.zeros(0))
    return weights


def _product(adapter: Adapter, stem: str, shape: torch.Size) -> Tensor:
    """The product, of `shape`, of a weight's two factors in a compressed adapter."""
    up, down = (adapter.weights.get(f"{stem}{factor}", torch.zeros(0)).float() for factor in ("up", "down"))
    if up.ndim != 2 or down.ndim != 2 or up.shape[1] != down.shape[0] or (up.shape[0], down.shape[1]) != shape:
        raise UserError(f"incomplete adapter: the factors of {stem}weight do not have the base model's shape")
    return up @ down


def verify(pipe: DiffusionPipeline, adapter: Adapter) -> None:
    """Check that the pipeline has exactly the adapter's weights and embeddings.

    Raises:
        UserError: a weight or token is missing or differs; the message names the first.
    """
    parameters = methods.trainable(pipe.unet)
    for name, weight in full_weights(adapter, pipe).items():
        if name not in parameters or not torch.equal(_plain(parameters[name]), weight):
            raise UserError(f"adapter not injected: {name} is missing from the pipeline or differs")
    for name, (tokenizer, encoder) in text.text_encoders(pipe).items():
        table = encoder.get_input_embeddings()
        for token, embedding in adapter.embeddings.items():
            ids = tokenizer(token, add_special_tokens=False, return_tensors="pt").input_ids.to(table.weight.device)
            if not torch.equal(_plain(table(ids)[0, 0]), _plain(embedding[name].to(table.weight.dtype))):
                raise UserError(f"adapter not injected: the embedding of {token} in {name} differs")


def fingerprint(pipe: DiffusionPipeline) -> list[float]:
    """Samples that identify a base model by its weights: four key weights of each cross-attention layer, in order.

    Half precision changes them by less than the tolerance of `check_base`.

    Raises:
        UserError: one is NaN or infinite.
    """
    layers = [m for m in pipe.unet.modules() if getattr(m, "is_cross_attention", False)]
    samples = [layer.to_k.weight.detach().flatten()[:: max(1, layer.to_k.weight.numel() // 4)][:4] for layer in layers]
    values = torch.cat(samples).float().cpu()
    if not bool(values.isfinite().all()):
        raise UserError("base.model: its cross-attention has NaN or infinite weights; download it again")
    return [round(value, 6) for value in values.tolist()]


def token_file(token: str) -> str:
    """File name, without suffix, of a modifier token's embedding: the token, with path separators replaced by _."""
    return token.replace("/", "_").replace("\\", "_")


def check_base(pipe: DiffusionPipeline, adapter: Adapter) -> None:
    """Check that a pipeline has the adapter's base model and no adapter.

    Raises:
        UserError: the pipeline has another base model, or already has an adapter.
    """
    if methods.trainable(pipe.unet):
        raise UserError("the pipeline already has an adapter; load the base model again")
    expected = torch.tensor(adapter.config.fingerprint)
    actual = torch.tensor(fingerprint(pipe))
    same_layers = attention.processor_names(pipe.unet) == adapter.config.processors and expected.shape == actual.shape
    # The comparison is false for NaN.
    if not (same_layers and torch.dist(expected, actual) <= 0.02 * expected.norm()):
        raise UserError(
            f"the adapter was trained on {adapter.config.base.model}, but the pipeline is of another base model"
        )


def _self_attention_layers(adapter: Adapter) -> list[str]:
    """Attention layers without weights in a file of Custom Diffusion weights; none for other files."""
    if weights_name(adapter.config) != WEIGHTS:
        return []
    trained = {name.partition(".processor.")[0] + ".processor" for name in adapter.weights}
    return [name for name in adapter.config.processors if name not in trained]


def _read_embedding(folder: Path, token: str) -> TokenEmbedding:
    tensors = load_file(folder / f"{token_file(token)}.safetensors")
    if token in tensors:
        return {"text_encoder": tensors[token]}
    return {name: tensors[key] for name, key in SDXL_KEYS.items()}


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
