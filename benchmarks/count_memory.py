"""Memory of a training step of Stable Diffusion 1.4 at 512 px, counted on a CPU without a GPU.

    python -m benchmarks.count_memory

It uses half precision and random weights, and counts the UNet's weights and saved activations. Activations of the text
encoder, temporary buffers, allocator rounding and CUDA's own memory (some hundred MB) are not included.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import torch
import typer

from benchmarks import models
from customdiff.models import attention, memory_efficient

MB = 1e6


def main(
    batch: Annotated[int, typer.Option(min=1, help="Images per step, including class images.")] = 2,
    side: Annotated[int, typer.Option(min=8, help="Side of the latents; 64 for 512 px.")] = 64,
) -> None:
    """Print the weights, the optimizer's share, and the activations of diffusers' layers and of ours."""
    pipe = models.sd14()
    unet = pipe.unet.to(torch.bfloat16, memory_format=torch.channels_last).requires_grad_(False)
    trained = attention.inject_processors(unet)
    text = sum(weight.numel() for weight in pipe.text_encoder.parameters()) * 2
    weights = sum(weight.numel() for weight in unet.parameters() if not weight.requires_grad) * 2
    learned = sum(weight.numel() for weight in trained.values()) * 4 * 4  # fp32 weight, gradient and two moments
    print(
        f"UNet {weights / MB:.0f} MB, text encoder {text / MB:.0f} MB, trained weights with AdamW {learned / MB:.0f} MB"
    )
    _print("diffusers' layers", activations(unet, batch, side), text + weights + learned)
    memory_efficient.convert(unet)
    _print("memory-efficient layers", activations(unet, batch, side), text + weights + learned)


def activations(unet: torch.nn.Module, batch: int, side: int) -> int:
    """Bytes that a forward pass saves for the backward pass."""
    noisy = torch.randn(batch, 4, side, side, dtype=unet.dtype).to(memory_format=torch.channels_last)
    text = torch.randn(batch, 77, unet.config.cross_attention_dim, dtype=unet.dtype, requires_grad=True)
    with counting(unet) as kept:
        unet(noisy, torch.zeros(batch, dtype=torch.int64), text)
    return sum(kept.values())


@contextmanager
def counting(module: torch.nn.Module) -> Iterator[dict[int, int]]:
    """Note the bytes of each storage that autograd keeps, by its address; those of the module's weights left out."""
    weights = {weight.untyped_storage().data_ptr() for weight in module.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


def _print(name: str, kept: int, rest: int) -> None:
    print(f"{name:20} activations {kept / MB:6.0f} MB, with the rest {(kept + rest) / MB:6.0f} MB")


if __name__ == "__main__":
    typer.run(main)
