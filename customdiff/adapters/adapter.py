"""An adapter: all that was learned, as one object of data. Save it, read it, put it into a pipeline, verify it.

On disk it is a folder that diffusers' own loaders read as well:

    pytorch_custom_diffusion_weights.safetensors / .bin   cross-attention weights, named as diffusers names them
    <new1>.safetensors / .bin                             one modifier token's embedding
    adapter.json                                          base model, concepts, what trained, seed, versions

The baselines of `methods` have `pytorch_lora_weights.safetensors` in place of the first, or no weights at all; a
compressed adapter has `compressed_weights.safetensors`, which diffusers does not know.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from customdiff.errors import UserError
from customdiff.models import attention, base, methods, modifier_tokens
from customdiff.models.modifier_tokens import Rows

CARD = "adapter.json"
WEIGHTS = "pytorch_custom_diffusion_weights"
LORA_WEIGHTS = "pytorch_lora_weights"
COMPRESSED_WEIGHTS = "compressed_weights"
# what SDXL's community calls the embeddings of its two text encoders in one file
SDXL_KEYS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}


@dataclass(frozen=True)
class Adapter:
    """What was learned.

    Attributes:
        weights: fp32 tensors by diffusers' names, `down_blocks....attn2.processor.to_k_custom_diffusion.weight`. In a
            compressed adapter `....to_k_custom_diffusion.up` (out, r) and `.down` (r, in) stand for the weight: their
            product is what is added to the base's own.
        rows: fp32 embedding (D,) by modifier token and text encoder (`text_encoder`; in SDXL `text_encoder_2` too).
        card: base model, concepts, method, freeze_model, seed, versions, and `fingerprint` of the base's own weights.
    """

    weights: dict[str, Tensor]
    rows: dict[str, Rows]
    card: dict


def from_pipeline(pipe: DiffusionPipeline, card: dict) -> Adapter:
    """Copy out what a pipeline with a method's weights and modifier tokens has learned, to the CPU in fp32."""
    return Adapter(
        weights={name: _plain(weight) for name, weight in methods.trainable(pipe.unet).items()},
        rows=modifier_tokens.learned_rows(pipe),
        card=card
        | {
            "family": base.family(pipe),
            "processors": attention.processor_names(pipe.unet),
            "fingerprint": fingerprint(pipe),
        },
    )


def save(adapter: Adapter, folder: Path | str, *, pickle_too: bool = True) -> None:
    """Write an adapter into `folder`, in the forms that diffusers reads.

    Args:
        pickle_too: write `.bin` files beside the safetensors, for programs that know no other. We never read them.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    name, bare = weights_name(adapter.card), _bare_layers(adapter)
    # diffusers demands an entry for each self-attention layer. A zero-length tensor is one that safetensors can hold
    # and that `load_attn_procs` takes for empty; in the .bin it is the empty dict that diffusers itself writes.
    if adapter.weights:
        save_file(adapter.weights | {layer: torch.zeros(0) for layer in bare}, folder / f"{name}.safetensors")
    if adapter.weights and pickle_too and name == WEIGHTS:
        torch.save(adapter.weights | {layer: {} for layer in bare}, folder / f"{name}.bin")
    for token, rows in adapter.rows.items():
        named = {token: rows["text_encoder"]} if len(rows) == 1 else {SDXL_KEYS[key]: row for key, row in rows.items()}
        save_file(named, folder / f"{token_file(token)}.safetensors")
        if pickle_too:
            torch.save(named, folder / f"{token_file(token)}.bin")
    (folder / CARD).write_text(json.dumps(adapter.card, indent=2) + "\n", encoding="utf-8")


def read(folder: Path | str) -> Adapter:
    """Read an adapter from its safetensors files.

    Raises:
        UserError: a file is missing, damaged, or not of an adapter.
    """
    folder = Path(folder)
    card = read_card(folder)
    try:
        weights = {}
        if methods.trains_unet(card):
            weights = load_file(folder / f"{weights_name(card)}.safetensors")
        return Adapter(
            weights={name: weight for name, weight in weights.items() if weight.numel()},
            rows={concept["modifier_token"]: _read_rows(folder, concept) for concept in card["concepts"].values()},
            card=card,
        )
    except (OSError, SafetensorError, KeyError) as error:
        raise UserError(f"{folder}: not a whole adapter ({error}); train it again with `dvc repro`") from error


def size(folder: Path | str) -> int:
    """Bytes of an adapter's safetensors files, which are all that is read."""
    return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))


def weights_name(card: dict) -> str:
    """Name, without its ending, of the file that holds an adapter's weights."""
    if card["method"] == "lora":
        return LORA_WEIGHTS
    return COMPRESSED_WEIGHTS if card.get("compressed") else WEIGHTS


def read_card(folder: Path | str) -> dict:
    """Read adapter.json alone: what was learned, on which base model.

    Raises:
        UserError: there is none, or it is damaged.
    """
    path = Path(folder) / CARD
    try:
        return {"method": "custom_diffusion"} | json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: there is no adapter here; `dvc repro` makes one in models/adapter") from error
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: damaged ({error}); train it again with `dvc repro`") from error


def load(pipe: DiffusionPipeline, folder: Path | str) -> Adapter:
    """Put the adapter in `folder` into a pipeline of its base model, and verify that it is really in place.

    Diffusers' documented call, `pipe.unet.load_attn_procs(folder)`, returns without an error and changes nothing;
    here every trained weight is compared with the file after loading.

    Args:
        pipe: a pipeline of the base model, on any device and in any dtype; changed in place.

    Raises:
        UserError: the folder holds no adapter, or the pipeline is of another base model.
    """
    adapter = read(folder)
    put(pipe, adapter)
    return adapter


def put(pipe: DiffusionPipeline, adapter: Adapter) -> None:
    """Put an adapter into a pipeline of its base model; see `load`."""
    check_base(pipe, adapter)
    modifier_tokens.add_tokens(pipe, adapter.rows)
    methods.put(pipe.unet, adapter.card)
    weights, placed = full_weights(adapter, pipe), methods.trainable(pipe.unet)
    for name, parameter in placed.items():
        if name not in weights or weights[name].shape != parameter.shape:
            raise UserError(f"the adapter is not whole: {name} is missing, or has another shape than the base model's")
    with torch.no_grad():
        for name, parameter in placed.items():
            parameter.copy_(weights[name])
    verify(pipe, adapter)


def full_weights(adapter: Adapter, pipe: DiffusionPipeline) -> dict[str, Tensor]:
    """An adapter's weights, those of a compressed one multiplied out and added to the base's: fp32, on the CPU."""
    if not adapter.card.get("compressed"):
        return adapter.weights
    weights = {}
    for name, original in attention.originals(pipe.unet, adapter.card["freeze_model"]).items():
        stem = name.removesuffix("weight")
        if f"{stem}up" in adapter.weights:
            up, down = (adapter.weights[f"{stem}{factor}"].float() for factor in ("up", "down"))
            weights[name] = _plain(original) + up @ down
        else:
            weights[name] = adapter.weights.get(name, torch.zeros(0))
    return weights


def verify(pipe: DiffusionPipeline, adapter: Adapter) -> None:
    """Check that the pipeline computes with exactly the adapter's weights and tokens.

    Raises:
        UserError: names the first that is missing or different.
    """
    placed = methods.trainable(pipe.unet)
    for name, weight in full_weights(adapter, pipe).items():
        if name not in placed or not torch.equal(_plain(placed[name]), weight):
            raise UserError(f"the adapter is not in place: {name} is missing from the pipeline, or differs")
    for name, (tokenizer, encoder) in base.text_encoders(pipe).items():
        embedding = encoder.get_input_embeddings()
        for token, rows in adapter.rows.items():
            ids = tokenizer(token, add_special_tokens=False, return_tensors="pt").input_ids.to(embedding.weight.device)
            if not torch.equal(_plain(embedding(ids)[0, 0]), _plain(rows[name].to(embedding.weight.dtype))):
                raise UserError(f"the adapter is not in place: {token} does not have its embedding in {name}")


def fingerprint(pipe: DiffusionPipeline) -> list[float]:
    """Four of the base's own key weights from each cross-attention layer: which model this is, whatever its name.

    Values as they are, in the model's order; half precision changes them by less than the tolerance of `load`.
    """
    layers = [m for m in pipe.unet.modules() if getattr(m, "is_cross_attention", False)]
    samples = [layer.to_k.weight.detach().flatten()[:: max(1, layer.to_k.weight.numel() // 4)][:4] for layer in layers]
    return [round(value, 6) for value in torch.cat(samples).float().cpu().tolist()]


def token_file(token: str) -> str:
    """File name, without its ending, for a modifier token: `<new1>` as it is, a path separator never."""
    return token.replace("/", "_").replace("\\", "_")


def check_base(pipe: DiffusionPipeline, adapter: Adapter) -> None:
    """Refuse an adapter that was learned on another base model, and a pipeline that holds one already.

    Raises:
        UserError: says which.
    """
    learned_on = adapter.card["base"]["model"]
    if methods.trainable(pipe.unet):
        raise UserError("the pipeline holds an adapter already; load the base model afresh")
    expected = torch.tensor(adapter.card["fingerprint"])
    here = torch.tensor(fingerprint(pipe))
    same_layers = attention.processor_names(pipe.unet) == adapter.card["processors"] and expected.shape == here.shape
    if not same_layers or torch.dist(expected, here) > 0.02 * expected.norm():
        raise UserError(
            f"this adapter was learned on {learned_on}; the pipeline is of another base model, so it is refused"
        )


def _bare_layers(adapter: Adapter) -> list[str]:
    """The attention layers that a whole file of Custom Diffusion weights has nothing for: those of self-attention."""
    if weights_name(adapter.card) != WEIGHTS:
        return []
    held = {name.partition(".processor.")[0] + ".processor" for name in adapter.weights}
    return [name for name in adapter.card["processors"] if name not in held]


def _read_rows(folder: Path, concept: dict) -> Rows:
    token = concept["modifier_token"]
    found = load_file(folder / f"{token_file(token)}.safetensors")
    if token in found:
        return {"text_encoder": found[token]}
    return {name: found[key] for name, key in SDXL_KEYS.items()}


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
