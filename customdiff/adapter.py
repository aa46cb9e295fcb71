"""An adapter: all that was learned, as one object of data. Save it, read it, put it into a pipeline, verify it.

On disk it is a folder that diffusers' own loaders read as well:

    pytorch_custom_diffusion_weights.safetensors / .bin   cross-attention weights, named as diffusers names them
    <new1>.safetensors / .bin                             one modifier token's embedding
    adapter.json                                          base model, concepts, what trained, seed, versions
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from customdiff import attention, tokens
from customdiff.errors import UserError

CARD = "adapter.json"
WEIGHTS = "pytorch_custom_diffusion_weights"


@dataclass(frozen=True)
class Adapter:
    """What was learned.

    Attributes:
        weights: fp32 tensors by diffusers' names, `down_blocks....attn2.processor.to_k_custom_diffusion.weight`.
        rows: fp32 embedding (D,) by modifier token.
        card: base model, concepts, freeze_model, seed, versions, and `fingerprint` of the base's own weights.
    """

    weights: dict[str, Tensor]
    rows: dict[str, Tensor]
    card: dict


def from_pipeline(pipe: DiffusionPipeline, card: dict) -> Adapter:
    """Copy out what a pipeline with processors and modifier tokens has learned, to the CPU in fp32."""
    embedding = pipe.text_encoder.get_input_embeddings()
    names = pipe.tokenizer.convert_ids_to_tokens(embedding.ids.tolist())
    return Adapter(
        weights={name: _plain(weight) for name, weight in attention.trainable(pipe.unet).items()},
        rows={name: _plain(row) for name, row in zip(names, embedding.rows.weight, strict=True)},
        card=card | {"processors": attention.processor_names(pipe.unet), "fingerprint": fingerprint(pipe)},
    )


def save(adapter: Adapter, folder: Path | str, *, pickle_too: bool = True) -> None:
    """Write an adapter into `folder`, in the forms that diffusers reads.

    Args:
        pickle_too: write `.bin` files beside the safetensors, for programs that know no other. We never read them.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # diffusers demands an entry for each self-attention layer. A zero-length tensor is one that safetensors can hold
    # and that `load_attn_procs` takes for empty; in the .bin it is the empty dict that diffusers itself writes.
    bare = [
        name for name in adapter.card["processors"] if not any(key.startswith(f"{name}.") for key in adapter.weights)
    ]
    save_file(adapter.weights | {name: torch.zeros(0) for name in bare}, folder / f"{WEIGHTS}.safetensors")
    for token, row in adapter.rows.items():
        save_file({token: row}, folder / f"{token_file(token)}.safetensors")
    if pickle_too:
        torch.save(adapter.weights | {name: {} for name in bare}, folder / f"{WEIGHTS}.bin")
        for token, row in adapter.rows.items():
            torch.save({token: row}, folder / f"{token_file(token)}.bin")
    (folder / CARD).write_text(json.dumps(adapter.card, indent=2) + "\n", encoding="utf-8")


def read(folder: Path | str) -> Adapter:
    """Read an adapter from its safetensors files.

    Raises:
        UserError: a file is missing, damaged, or not of an adapter.
    """
    folder = Path(folder)
    card = read_card(folder)
    try:
        weights = load_file(folder / f"{WEIGHTS}.safetensors")
        rows = {
            concept["modifier_token"]: load_file(folder / f"{token_file(concept['modifier_token'])}.safetensors")
            for concept in card["concepts"].values()
        }
        return Adapter(
            weights={name: weight for name, weight in weights.items() if weight.numel()},
            rows={token: row[token] for token, row in rows.items()},
            card=card,
        )
    except (OSError, SafetensorError, KeyError) as error:
        raise UserError(f"{folder}: not a whole adapter ({error}); train it again with `dvc repro`") from error


def read_card(folder: Path | str) -> dict:
    """Read adapter.json alone: what was learned, on which base model.

    Raises:
        UserError: there is none, or it is damaged.
    """
    path = Path(folder) / CARD
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: there is no adapter here; `dvc repro` makes one in models/adapter") from error
    except ValueError as error:
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
    _check_base(pipe, adapter)
    tokens.add_tokens(pipe, list(adapter.rows), torch.stack(list(adapter.rows.values())))
    attention.put_processors(pipe.unet, adapter.card["freeze_model"])
    with torch.no_grad():
        for name, parameter in attention.trainable(pipe.unet).items():
            parameter.copy_(adapter.weights[name])
    verify(pipe, adapter)


def verify(pipe: DiffusionPipeline, adapter: Adapter) -> None:
    """Check that the pipeline computes with exactly the adapter's weights and tokens.

    Raises:
        UserError: names the first that is missing or different.
    """
    placed = attention.trainable(pipe.unet)
    for name, weight in adapter.weights.items():
        if name not in placed or not torch.equal(_plain(placed[name]), weight):
            raise UserError(f"the adapter is not in place: {name} is missing from the pipeline, or differs")
    embedding = pipe.text_encoder.get_input_embeddings()
    for token, row in adapter.rows.items():
        ids = pipe.tokenizer(token, add_special_tokens=False, return_tensors="pt").input_ids.to(embedding.weight.device)
        if not torch.equal(_plain(embedding(ids)[0, 0]), _plain(row.to(embedding.weight.dtype))):
            raise UserError(f"the adapter is not in place: {token} does not have its embedding")


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


def _check_base(pipe: DiffusionPipeline, adapter: Adapter) -> None:
    learned_on = adapter.card["base"]["model"]
    if attention.trainable(pipe.unet):
        raise UserError("the pipeline holds an adapter already; load the base model afresh")
    expected = torch.tensor(adapter.card["fingerprint"])
    here = torch.tensor(fingerprint(pipe))
    same_layers = attention.processor_names(pipe.unet) == adapter.card["processors"] and expected.shape == here.shape
    if not same_layers or torch.dist(expected, here) > 0.02 * expected.norm():
        raise UserError(
            f"this adapter was learned on {learned_on}; the pipeline is of another base model, so it is refused"
        )


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
