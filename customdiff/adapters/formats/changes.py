"""What an adapter changes in its UNet, whatever its method: as whole weights, and as factors of low rank."""

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

# Of a weight: what fp32 sums in another order, as another program makes them, may differ by.
ROUNDING = 1e-6


class ExportSource(NamedTuple):
    """What is exported.

    Attributes:
        adapter: what was learned.
        pipe: a plain pipeline of its base model, without it; an export may change it in place.
        before, after: fp32 weights on the CPU that training changed, by the UNet's own names for them,
            `down_blocks....attn2.to_k.weight`.
    """

    adapter: Adapter
    pipe: DiffusionPipeline
    before: dict[str, Tensor]
    after: dict[str, Tensor]


class LowRankFactors(NamedTuple):
    """A change of rank r: up (out, r) @ down (r, in), fp32."""

    up: Tensor
    down: Tensor


class LowRank(NamedTuple):
    """A UNet's change in factors.

    Attributes:
        layers: factors by the layer's name, `down_blocks....attn2.to_k`.
        biases: fp32 changes (out,) of biases, by the layer's name.
        error: norm of what the factors leave out, over the norm of the change.
    """

    layers: dict[str, LowRankFactors]
    biases: dict[str, Tensor]
    error: float


def source_of(adapter: Adapter, pipe: DiffusionPipeline) -> ExportSource:
    """An adapter beside its base model, without which neither whole weights nor changes of them can be had.

    Its config gets the base's `family`, which early adapters lack.
    """
    weights = {name: weight.float() for name, weight in adapter.weights.items()}  # a compressed one's may be fp16
    adapter = replace(adapter, weights=weights, config=adapter.config.with_changes(family=family(pipe)))
    own = dict(pipe.unet.named_parameters())
    if adapter.config.method == "lora":
        after = {
            f"{layer}.weight": own[f"{layer}.weight"].detach() + up @ down
            for layer, (up, down) in _learned_factors(adapter).items()
        }
    else:
        after = {unet_name(name): weight for name, weight in full_weights(adapter, pipe).items()}
    return ExportSource(adapter, pipe, {name: own[name].detach().clone() for name in after}, after)


def unet_name(name: str) -> str:
    """The UNet's own name for what an adapter's file calls `....attn2.processor.to_k_custom_diffusion.weight`."""
    return name.removeprefix("unet.").replace(".processor.", ".").replace("_custom_diffusion", "")


def low_rank(source: ExportSource, rank: int | None) -> LowRank:
    """The UNet's change as factors: those that were learned where there are any, else by its singular values.

    The best approximation of a matrix at a rank keeps its largest singular values (Eckart and Young 1936); the paper
    compresses its models so.

    Args:
        rank: the most that a layer may have; None: all of its change but what fp32 cannot tell from none.
    """
    learned = _learned_factors(source.adapter)
    layers, biases, left_out, whole = {}, {}, 0.0, 0.0
    for name, weight in source.after.items():
        layer, _, kind = name.rpartition(".")
        change = weight.double() - source.before[name].double()
        whole += change.square().sum().item()
        if not change.any():
            continue
        if kind == "bias":
            biases[layer] = change.float()
        elif layer in learned and (rank is None or len(learned[layer].down) <= rank):
            layers[layer] = learned[layer]
        else:
            # a singular value below this is lost in the rounding of the weight that the change is added to
            rounding = torch.finfo(torch.float32).eps * weight.abs().max().item() * max(weight.shape) ** 0.5
            layers[layer], squares = _factored(change, rank, rounding)
            left_out += squares
    return LowRank(layers, biases, (left_out / whole) ** 0.5 if whole else 0.0)


def check_weights(unet: UNet2DConditionModel, source: ExportSource, error: float) -> None:
    """Check that a UNet into which exported files were loaded has what was learned, but for `error`.

    Args:
        unet: with all that was loaded folded into its own weights.
        error: what `low_rank` said.

    Raises:
        UserError: it has not; names the weight that is furthest off.
    """
    found = dict(unet.named_parameters())
    off = {name: torch.dist(found[name].float(), weight).item() for name, weight in source.after.items()}
    change = _norm(torch.dist(weight, source.before[name]).item() for name, weight in source.after.items())
    allowed = 1.01 * error * change + ROUNDING * _norm(weight.norm().item() for weight in source.after.values())
    if not _norm(off.values()) <= allowed:  # not a number is no better than too much
        raise UserError(f"the written files do not give back what was learned: {max(off, key=off.get)} differs most")


def check_embeddings(pipe: DiffusionPipeline, rows: dict[str, TokenEmbedding]) -> None:
    """Check that each word has its embedding, bit for bit, in a pipeline into which exported files were loaded.

    Raises:
        UserError: names the word and the text encoder.
    """
    for name, (tokenizer, encoder) in text_encoders(pipe).items():
        table = encoder.get_input_embeddings().weight
        for word, row in rows.items():
            ids = tokenizer(word, add_special_tokens=False).input_ids
            if len(ids) != 1 or not torch.equal(table[ids[0]].float(), row[name]):
                raise UserError(f"the written files do not give back what was learned: {word} differs in {name}")


def _learned_factors(adapter: Adapter) -> dict[str, LowRankFactors]:
    """The factors that an adapter of train.method lora, or a compressed one, has itself, by the layer's name."""
    up, down = ("lora_B.weight", "lora_A.weight") if adapter.config.method == "lora" else ("up", "down")
    return {
        unet_name(name).removesuffix(f".{up}"): LowRankFactors(weight, adapter.weights[name.removesuffix(up) + down])
        for name, weight in adapter.weights.items()
        if name.endswith(f".{up}")
    }


def _factored(change: Tensor, rank: int | None, rounding: float) -> tuple[LowRankFactors, float]:
    """A change (out, in) as factors that share the singular values evenly, and the squared norm of what they lack."""
    found = compression.decompose(change)
    kept = max(1, min(int((found.values > rounding).sum()), rank or len(found.values)))
    return LowRankFactors(*found.cut(kept, torch.float32)), found.values[kept:].square().sum().item()


def _norm(parts) -> float:
    return sum(part**2 for part in parts) ** 0.5
