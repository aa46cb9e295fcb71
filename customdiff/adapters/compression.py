"""Compression of adapters by singular value decomposition of weight changes (Kumari et al. 2023, section 4.2).

The change W - W0 = U S V' that fine-tuning makes to a weight is close to low rank. It is truncated after its r largest
singular values, which gives the nearest matrix of rank r (Eckart and Young). The change is stored instead of the
weight, because W itself has full rank and users have the base model anyway.
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

HEADER_MARGIN = 64  # bytes; a weight's entry in the file header has more digits of shapes and offsets at higher ranks


@dataclass(frozen=True)
class SVD:
    """Singular value decomposition of one weight's change, float64.

    Attributes:
        left: (out, n) singular vectors, n = min(out, in).
        values: (n,) singular values, descending.
        right: (n, in) singular vectors.
    """

    left: Tensor
    values: Tensor
    right: Tensor

    def numbers_per_rank(self) -> int:
        """Numbers to store for each singular value."""
        return self.left.shape[0] + self.right.shape[1]

    def truncated(self, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Factors `up` (out, rank) and `down` (rank, in).

        Each gets the square roots of the singular values, which suits the range of half precision.
        """
        root = self.values[:rank].sqrt()
        up, down = self.left[:, :rank] * root, root[:, None] * self.right[:rank]
        return (
            up.to(dtype, memory_format=torch.contiguous_format),
            down.to(dtype, memory_format=torch.contiguous_format),
        )


def changes(pipe: DiffusionPipeline, learned: Adapter) -> dict[str, Tensor]:
    """Changes of the base model's matrices by an adapter: float64 (out, in) by name, without biases."""
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
    """Number of singular values needed for a share of their sum; at least one.

    The sum is over the values, not their squares, as in the paper's code, whose 60 % is an `energy` of 0.6. That code
    stops one value before the share is reached; this function reaches it.

    Args:
        values: (n,) descending.
        energy: above 0, at most 1.
    """
    kept = values.cumsum(0)
    return int((kept >= energy * kept[-1]).int().argmax()) + 1


def ranks_for(decompositions: Mapping[str, SVD], numbers: int) -> dict[str, int]:
    """Ranks that minimize the total squared error of all weights with at most `numbers` stored numbers.

    Every weight gets at least rank 1. Each further singular value reduces the error by its square and costs out + in
    numbers; values are added in descending order of reduction per number.
    """
    ranks = dict.fromkeys(decompositions, 1)
    remaining = numbers - sum(svd.numbers_per_rank() for svd in decompositions.values())
    gains = [
        (float(value) ** 2 / svd.numbers_per_rank(), name)
        for name, svd in decompositions.items()
        for value in svd.values[1:]
    ]
    full = set()
    for _, name in sorted(gains, key=lambda item: -item[0]):
        if name in full:
            continue
        if decompositions[name].numbers_per_rank() > remaining:
            full.add(name)  # a smaller value of the same weight must not be added before a larger one
            continue
        ranks[name] += 1
        remaining -= decompositions[name].numbers_per_rank()
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
    """Truncate an adapter's weight changes to low rank; `adapter.inject` expands them.

    Args:
        pipe: the adapter's base model, without an adapter.
        learned: adapter of method custom_diffusion, possibly compressed already.
        energy: share of each weight's sum of singular values to keep.
        rank: rank of each weight.
        size: maximum size of the weights file in bytes, distributed over weights for the smallest error.
        dtype: dtype of the factors, float32 or float16.

    Raises:
        UserError: the adapter has another method or base model, or `size` is too small.
        ValueError: not exactly one of `energy`, `rank` and `size` is given.
    """
    if [energy, rank, size].count(None) != 2:
        raise ValueError("give exactly one of energy, rank and size")
    check(learned)
    adapter.check_base(pipe, learned)
    decompositions = {name: decompose(change) for name, change in changes(pipe, learned).items()}
    others = {n: weight for n, weight in adapter.full_weights(learned, pipe).items() if n not in decompositions}
    if energy is not None:
        ranks = {name: rank_for_energy(svd.values, energy) for name, svd in decompositions.items()}
    elif rank is not None:
        ranks = {name: min(rank, len(svd.values)) for name, svd in decompositions.items()}
    elif size is not None:
        ranks = _ranks_for_size(decompositions, others, size, dtype)
    weights = _weights(decompositions, ranks, others, dtype)
    return Adapter(
        weights,
        learned.embeddings,
        learned.config.with_changes(
            compressed={"ranks": list(ranks.values()), "dtype": str(dtype).removeprefix("torch.")}
        ),
    )


def check(learned: Adapter) -> None:
    """Check that an adapter can be compressed.

    Raises:
        UserError: its method is not custom_diffusion.
    """
    method = learned.config.method
    if method == "lora":
        raise UserError("method lora: already low rank; train with a smaller train.lora_rank instead")
    if method != "custom_diffusion":
        raise UserError(f"method {method}: has no weights to compress; only custom_diffusion has")


def relative_error(pipe: DiffusionPipeline, original: Adapter, compressed: Adapter) -> float:
    """Frobenius norm of the error of the compressed changes over that of the original ones: 0 exact, 1 base model."""
    before, after = changes(pipe, original), changes(pipe, compressed)
    error = sum(float((before[name] - after[name]).square().sum()) for name in before)
    norm = sum(float(change.square().sum()) for change in before.values())
    return (error / norm) ** 0.5 if norm else 0.0


def _ranks_for_size(
    decompositions: Mapping[str, SVD], others: Mapping[str, Tensor], size: int, dtype: torch.dtype
) -> dict[str, int]:
    """Ranks with which the weights file, including names and biases, has at most `size` bytes."""
    minimum = len(serialized(_weights(decompositions, dict.fromkeys(decompositions, 1), others, dtype)))
    minimum += HEADER_MARGIN * len(decompositions)
    if size < minimum:
        smallest = math.ceil(minimum / 1e3) / 1e3
        raise UserError(f"--size-mb: {size / 1e6:g} is too small; rank 1 of each weight takes {smallest:g}")
    spare = (size - minimum) // dtype.itemsize
    return ranks_for(decompositions, spare + sum(svd.numbers_per_rank() for svd in decompositions.values()))


def _weights(
    decompositions: Mapping[str, SVD], ranks: Mapping[str, int], others: Mapping[str, Tensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    weights = dict(others)
    for name, svd in decompositions.items():
        stem = name.removesuffix("weight")
        weights[f"{stem}up"], weights[f"{stem}down"] = svd.truncated(ranks[name], dtype)
    return weights
