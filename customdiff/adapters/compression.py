"""Make an adapter smaller: the change of each weight by its largest singular values (Kumari et al. 2023, section 4.2).

The change that fine-tuning makes to a weight is close to low rank, so W - W0 = U S V' is cut off after r singular
values, which by Eckart and Young is the nearest matrix of that rank. What is kept is the change, not the weight: W
itself is of full rank, and the base is on the user's machine anyway.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save as serialized
from torch import Tensor

from customdiff.adapters import adapter
from customdiff.adapters.adapter import Adapter
from customdiff.errors import UserError
from customdiff.models import attention

ROOM = 64  # bytes by which a weight's entry in the file's head may grow with its rank: the digits of shapes and places


@dataclass(frozen=True)
class SVD:
    """The singular value decomposition of one weight's change, float64.

    Attributes:
        left: (out, n) singular vectors, n = min(out, in).
        values: (n,) singular values, falling.
        right: (n, in) singular vectors.
    """

    left: Tensor
    values: Tensor
    right: Tensor

    def cost(self) -> int:
        """Numbers that one more singular value adds to the file."""
        return self.left.shape[0] + self.right.shape[1]

    def cut(self, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """`up` (out, rank) and `down` (rank, in), the singular values shared evenly, for half precision."""
        root = self.values[:rank].sqrt()
        factors = self.left[:, :rank] * root, root[:, None] * self.right[:rank]
        return tuple(factor.to(dtype, memory_format=torch.contiguous_format) for factor in factors)


def changes(pipe: DiffusionPipeline, learned: Adapter) -> dict[str, Tensor]:
    """What an adapter adds to the base's matrices: float64 (out, in) by name. Biases are not among them."""
    weights = adapter.full_weights(learned, pipe)
    return {
        name: weights[name].double() - original.detach().cpu().double()
        for name, original in attention.originals(pipe.unet, learned.config.freeze_model).items()
        if original.ndim == 2
    }


def decompose(change: Tensor) -> SVD:
    """The thin singular value decomposition of a change (out, in)."""
    left, values, right = torch.linalg.svd(change.double(), full_matrices=False)
    return SVD(left, values, right)


def rank_for_energy(values: Tensor, energy: float) -> int:
    """How many singular values it takes to keep a share of their sum; at least one.

    The sum is of the values themselves, not of their squares, as in the paper's own code, whose 60 % is our `energy`
    of 0.6; that code stops one value short of the share, we reach it.

    Args:
        values: (n,) falling.
        energy: above 0, at most 1.
    """
    kept = values.cumsum(0)
    return int((kept >= energy * kept[-1]).int().argmax()) + 1


def ranks_for(factors: Mapping[str, SVD], numbers: int) -> dict[str, int]:
    """The ranks of least squared error over all weights together, with at most `numbers` numbers, but one at least.

    Every singular value is worth its square and costs out + in numbers; those worth most a number come first.
    """
    ranks = dict.fromkeys(factors, 1)
    left = numbers - sum(each.cost() for each in factors.values())
    worth = [(float(value) ** 2 / each.cost(), name) for name, each in factors.items() for value in each.values[1:]]
    full = set()
    for _, name in sorted(worth, key=lambda item: -item[0]):
        if name in full:
            continue
        if factors[name].cost() > left:
            full.add(name)  # a smaller value of the same weight must not overtake a larger one
            continue
        ranks[name] += 1
        left -= factors[name].cost()
    return ranks


def compress(
    pipe: DiffusionPipeline,
    learned: Adapter,
    *,
    energy: float | None = None,
    rank: int | None = None,
    size: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Adapter:
    """An adapter whose changes are cut to low rank; `adapter.inject` multiplies them out.

    Args:
        pipe: the adapter's base model, nothing put into it.
        learned: of method custom_diffusion, whole or compressed already.
        energy: share of each weight's sum of singular values to keep.
        rank: of each weight.
        size: bytes of the file of weights, names and biases included, at most; spent where it gains most.
        dtype: of what is stored, float32 or float16.

    Raises:
        UserError: the adapter is of another method or another base model, or `size` is too small.
        ValueError: not exactly one of `energy`, `rank` and `size` is given.
    """
    if [energy, rank, size].count(None) != 2:
        raise ValueError("one of energy, rank and size")
    check(learned)
    adapter.check_base(pipe, learned)
    factors = {name: decompose(change) for name, change in changes(pipe, learned).items()}
    others = {name: weight for name, weight in adapter.full_weights(learned, pipe).items() if name not in factors}
    if energy is not None:
        ranks = {name: rank_for_energy(each.values, energy) for name, each in factors.items()}
    elif rank is not None:
        ranks = {name: min(rank, len(each.values)) for name, each in factors.items()}
    else:
        ranks = dict.fromkeys(factors, 1)
        least = len(serialized(_weights(factors, ranks, others, dtype))) + ROOM * len(factors)
        if size < least:
            enough = math.ceil(least / 1e3) / 1e3
            raise UserError(f"--size-mb: {size / 1e6:g} is too small; at {enough:g} each weight has one singular value")
        spare = (size - least) // dtype.itemsize
        ranks = ranks_for(factors, spare + sum(each.cost() for each in factors.values()))
    weights = _weights(factors, ranks, others, dtype)
    return Adapter(
        weights,
        learned.embeddings,
        learned.config.with_changes(
            compressed={"ranks": list(ranks.values()), "dtype": str(dtype).removeprefix("torch.")}
        ),
    )


def check(learned: Adapter) -> None:
    """Refuse an adapter that cannot be compressed.

    Raises:
        UserError: it is of another method than custom_diffusion.
    """
    method = learned.config.method
    if method == "lora":
        raise UserError("a LoRA is of low rank already; train it anew with a smaller train.lora_rank")
    if method != "custom_diffusion":
        raise UserError(
            f"only adapters of method custom_diffusion are compressed; one of {method} holds its tokens alone"
        )


def relative_error(pipe: DiffusionPipeline, whole: Adapter, small: Adapter) -> float:
    """Frobenius norm of what compression lost over that of all changes: 0 is nothing lost, 1 the base model."""
    before, after = changes(pipe, whole), changes(pipe, small)
    lost = sum(float((before[name] - after[name]).square().sum()) for name in before)
    learned = sum(float(change.square().sum()) for change in before.values())
    return (lost / learned) ** 0.5 if learned else 0.0


def _weights(
    factors: Mapping[str, SVD], ranks: Mapping[str, int], others: Mapping[str, Tensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    weights = dict(others)
    for name, each in factors.items():
        stem = name.removesuffix("weight")
        weights[f"{stem}up"], weights[f"{stem}down"] = each.cut(ranks[name], dtype)
    return weights
