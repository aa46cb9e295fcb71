"""Prepared set of one concept: VAE moments, masks and captions, in memory and on disk.

The reference encodes every image at every step, which is 40 % of the step's arithmetic. The VAE is frozen, so the mean
and standard deviation of its posterior are stored instead, and each step draws a new latent from them.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from customdiff.errors import UserError

TENSORS = ("mean", "std", "pixels", "mask", "framing", "subject")


@dataclass(frozen=True)
class PreparedSet:
    """Views of N images with their captions.

    Attributes:
        mean, std: (N, C, h, w) float32, moments of the VAE's posterior, unscaled; None if pixels are stored.
        pixels: (N, 3, H, W) uint8, instead of the moments with `cache_latents: false`.
        mask: (N, 1, h, w) bool, the valid region.
        framing: (N, 4) int32, px: height and width of the photo, top and left of the view; see `augmentation.View`.
        captions: N strings.
        subject: (N, 1, h, w) float32, the subject's share of each latent pixel; None where no mask is known.
    """

    mask: Tensor
    framing: Tensor
    captions: list[str]
    mean: Tensor | None = None
    std: Tensor | None = None
    pixels: Tensor | None = None
    subject: Tensor | None = None

    def __len__(self) -> int:
        return len(self.captions)


def encode(vae: AutoencoderKL, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, (B, C, h, w) float32, of the VAE's posterior for pixels (B, 3, H, W) in [-1, 1]."""
    with torch.inference_mode():
        posterior = vae.encode(pixels.to(vae.device, vae.dtype, memory_format=torch.channels_last)).latent_dist
    return posterior.mean.float().cpu().contiguous(), posterior.std.float().cpu().contiguous()


def sample(mean: Tensor, std: Tensor, scaling_factor: float, noise: Tensor) -> Tensor:
    """Scaled latents (B, C, h, w) drawn from the VAE's posterior with standard normal `noise` of the same shape."""
    return (mean + std * noise) * scaling_factor


def to_bytes(pixels: Tensor) -> Tensor:
    """Float pixels in [-1, 1] as uint8."""
    return ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def to_pixels(values: Tensor) -> Tensor:
    """uint8 pixels as float32 in [-1, 1]."""
    return values.float() / 127.5 - 1


def loss_weights(prepared: PreparedSet, index: list[int], outside: float) -> Tensor:
    """Weights (B, 1, h, w) float32 of the loss: 1 on the subject, `outside` around it, 0 outside the valid region.

    A view that shows nothing of its subject keeps the weight 1 everywhere, so that no weights are all 0.
    """
    valid = prepared.mask[index].float()
    if prepared.subject is None or outside == 1:
        return valid
    subject = prepared.subject[index] * valid
    shown = subject.amax((1, 2, 3), keepdim=True) > 0
    return torch.where(shown, subject + outside * (valid - subject), valid)


def save(prepared: PreparedSet, path: Path) -> None:
    """Write a prepared set to `path`.safetensors, and its captions to `path`.json."""
    tensors = {name: getattr(prepared, name) for name in TENSORS}
    save_file(
        {name: tensor for name, tensor in tensors.items() if tensor is not None},
        path.with_suffix(".safetensors"),
    )
    path.with_suffix(".json").write_text(
        json.dumps(prepared.captions, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )


def load(path: Path) -> PreparedSet:
    """Read what `save` wrote.

    Raises:
        UserError: the files are missing, damaged, or of different lengths.
    """
    try:
        tensors = load_file(path.with_suffix(".safetensors"))
        captions = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        length = len(tensors["mask"])
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read ({error}); run `dvc repro -f prepare`") from error
    if len(captions) != length:
        raise UserError(f"{path}: {len(captions)} captions for {length} views; run `dvc repro -f prepare`")
    return PreparedSet(captions=captions, **tensors)


def join(sets: list[PreparedSet]) -> PreparedSet:
    """Concatenate the sets of several concepts; a set without subject masks counts as all subject."""
    if any(one.subject is not None for one in sets):
        sets = [one if one.subject is not None else replace(one, subject=one.mask.float()) for one in sets]
    return PreparedSet(
        captions=[caption for prepared in sets for caption in prepared.captions],
        **{
            name: torch.cat([getattr(prepared, name) for prepared in sets])
            for name in TENSORS
            if getattr(sets[0], name) is not None
        },
    )


def epoch_order(length: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of `range(length)` that depends only on the arguments, so that a resumed run repeats it."""
    return np.random.default_rng([seed, epoch]).permutation(length)


def batch_indices(length: int, batch_size: int, seed: int, batch: int) -> list[int]:
    """Indices of batch number `batch` in an endless sequence of shuffled epochs.

    A batch may span two epochs, so all batches have the same size. Every image is seen once before any is seen twice.
    """
    positions = range(batch * batch_size, (batch + 1) * batch_size)
    orders = {epoch: epoch_order(length, seed, epoch) for epoch in {position // length for position in positions}}
    return [int(orders[position // length][position % length]) for position in positions]
