"""Changes of the UNet by an adapter of any method, as full weights and as low-rank factors."""

from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from torch import Tensor

from customdiff.adapters import compression
from customdiff.adapters.adapter import Adapter, full_weights
from customdiff.errors import UserError
from customdiff.models.base import family
from customdiff.models.modifier_tokens import TokenEmbedding
from customdiff.models.text import text_encoders

# Relative tolerance for weights that another program sums in fp32 in another order.
ROUNDING = 1e-6


class ExportSource(NamedTuple):
    """An adapter to export, with its base model.

    Attributes:
        adapter: the adapter.
        pipe: pipeline of its base model without an adapter; an export may change it in place.
        before, after: fp32 weights on the CPU before and after training, by their names in the UNet,
            `down_blocks....attn2.to_k.weight`.
    """

    adapter: Adapter
    pipe: DiffusionPipeline
    before: dict[str, Tensor]
    after: dict[str, Tensor]


class LowRankFactors(NamedTuple):
    """Factors of a change of rank r, up (out, r) @ down (r, in), fp32."""

    up: Tensor
    down: Tensor


class LowRank(NamedTuple):
    """Low-rank factors of the change of a UNet.

    Attributes:
        layers: factors by layer name, `down_blocks....attn2.to_k`.
        biases: fp32 changes (out,) of biases by layer name.
        error: norm of the approximation error over the norm of the change.
    """

    layers: dict[str, LowRankFactors]
    biases: dict[str, Tensor]
    error: float


def source_of(adapter: Adapter, pipe: DiffusionPipeline) -> ExportSource:
    """Combine an adapter with its base model, from which full weights and their changes are computed.

    The adapter's config gets the base's `family`, which old adapters lack.
    """
    weights = {name: weight.float() for name, weight in adapter.weights.items()}  # compressed weights may be fp16
    adapter = replace(adapter, weights=weights, config=adapter.config.with_changes(family=family(pipe)))
    base_weights = dict(pipe.unet.named_parameters())
    if adapter.config.method == "lora":
        after = {
            f"{layer}.weight": base_weights[f"{layer}.weight"].detach() + up @ down
            for layer, (up, down) in _learned_factors(adapter).items()
        }
    else:
        after = {unet_name(name): weight for name, weight in full_weights(adapter, pipe).items()}
    return ExportSource(adapter, pipe, {name: base_weights[name].detach().clone() for name in after}, after)


def unet_name(name: str) -> str:
    """The UNet's name of a weight that adapter files call `....attn2.processor.to_k_custom_diffusion.weight`."""
    return name.removeprefix("unet.").replace(".processor.", ".").replace("_custom_diffusion", "")


def low_rank(source: ExportSource, rank: int | None) -> LowRank:
    """The UNet's change as low-rank factors: learned factors if their rank is small enough, else truncated SVDs.

    The largest singular values give the best approximation of a rank (Eckart and Young 1936), as in the paper's
    compression.

    Args:
        rank: maximum rank of a layer; None: full rank, without singular values below fp32 rounding.
    """
    learned = _learned_factors(source.adapter)
    layers, biases, squared_error, squared_norm = {}, {}, 0.0, 0.0
    for name, weight in source.after.items():
        layer, _, kind = name.rpartition(".")
        change = weight.double() - source.before[name].double()
        squared_norm += change.square().sum().item()
        if not change.any():
            continue
        if kind == "bias":
            biases[layer] = change.float()
        elif layer in learned and (rank is None or len(learned[layer].down) <= rank):
            layers[layer] = learned[layer]
        else:
            # smaller singular values are lost in the rounding of the weight that the change is added to
            rounding = torch.finfo(torch.float32).eps * weight.abs().max().item() * max(weight.shape) ** 0.5
            layers[layer], squares = _factored(change, rank, rounding)
            squared_error += squares
    return LowRank(layers, biases, (squared_error / squared_norm) ** 0.5 if squared_norm else 0.0)


def check_weights(unet: UNet2DConditionModel, source: ExportSource, error: float) -> None:
    """Check that a UNet with loaded export files has the adapter's weights up to `error`.

    Args:
        unet: UNet with the files' changes added to its own weights.
        error: relative error of the change; see `LowRank`.

    Raises:
        UserError: the weights differ by more; the message names the one that differs most.
    """
    loaded = dict(unet.named_parameters())
    distances = {name: torch.dist(loaded[name].float(), weight).item() for name, weight in source.after.items()}
    change = _norm(torch.dist(weight, source.before[name]).item() for name, weight in source.after.items())
    allowed = 1.01 * error * change + ROUNDING * _norm(weight.norm().item() for weight in source.after.values())
    if not _norm(distances.values()) <= allowed:  # also true for NaN
        worst = max(distances, key=lambda name: distances[name])
        raise UserError(f"exported files do not reproduce the adapter: {worst} differs most")


def check_embeddings(pipe: DiffusionPipeline, embeddings: dict[str, TokenEmbedding]) -> None:
    """Check that each word has exactly its embedding in a pipeline with loaded export files.

    Raises:
        UserError: an embedding differs; the message names the word and the text encoder.
    """
    for name, (tokenizer, encoder) in text_encoders(pipe).items():
        table = encoder.get_input_embeddings().weight
        for word, embedding in embeddings.items():
            ids = tokenizer(word, add_special_tokens=False).input_ids
            if len(ids) != 1 or not torch.equal(table[ids[0]].float(), embedding[name]):
                raise UserError(f"exported files do not reproduce the adapter: {word} differs in {name}")


def _learned_factors(adapter: Adapter) -> dict[str, LowRankFactors]:
    """The factors that a LoRA or a compressed adapter contains, by layer name; empty for other adapters."""
    up, down = ("lora_B.weight", "lora_A.weight") if adapter.config.method == "lora" else ("up", "down")
    return {
        unet_name(name).removesuffix(f".{up}"): LowRankFactors(weight, adapter.weights[name.removesuffix(up) + down])
        for name, weight in adapter.weights.items()
        if name.endswith(f".{up}")
    }


def _factored(change: Tensor, rank: int | None, rounding: float) -> tuple[LowRankFactors, float]:
    """Factors of a change (out, in), and the squared norm of their error."""
    svd = compression.decompose(change)
    kept = max(1, min(int((svd.values > rounding).sum()), rank or len(svd.values)))
    return LowRankFactors(*svd.truncated(kept, torch.float32)), svd.values[kept:].square().sum().item()


def _norm(parts: Iterable[float]) -> float:
    return sum(part**2 for part in parts) ** 0.5
