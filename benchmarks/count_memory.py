"""What a training step of Stable Diffusion 1.4 at 512 px holds, counted on a CPU: no card is needed.

    python -m benchmarks.count_memory

Half precision, random weights, forward passes alone. Transient buffers,
the allocator's rounding and CUDA's own share (some hundred MB) are not in it.
"""

from typing import Annotated

import torch
import typer

from benchmarks import models
from customdiff import attention, frozen

MB = 1e6


def main(
    batch: Annotated[int, typer.Option(min=1, help="Images a step, class images counted.")] = 2,
    side: Annotated[int, typer.Option(min=8, help="Of the latents: 64 for 512 px.")] = 64,
) -> None:
    """Print the weights, the optimizer's share, and the activations of each way to train."""
    pipe = models.sd14()
    pipe.unet.to(torch.bfloat16, memory_format=torch.channels_last).requires_grad_(False)
    trained = attention.put_processors(pipe.unet)
    text = sum(weight.numel() for weight in pipe.text_encoder.parameters()) * 2
    weights = sum(weight.numel() for weight in pipe.unet.parameters() if not weight.requires_grad) * 2
    # fp32 weight, gradient and AdamW's two moments
    learned = sum(weight.numel() for weight in trained.values()) * 4 * 4
    fixed = text + weights + learned
    print(f"UNet {weights / MB:.0f} MB, text encoder {text / MB:.0f} MB, trained weights, gradient and AdamW "
          f"{learned / MB:.0f} MB")  # fmt: skip
    for name, change in (
        ("diffusers' layers", lambda unet: None),
        ("lightened", frozen.lighten),
    ):
        change(pipe.unet)
        kept = kept_activations(pipe.unet, batch, side)
        print(f"{name:36} activations {kept / MB:6.0f} MB, with the rest {(fixed + kept) / MB:6.0f} MB")


def kept_activations(unet: torch.nn.Module, batch: int, side: int) -> int:
    """Bytes that a forward pass keeps for the backward pass, weights left out."""
    weights = {weight.untyped_storage()._cdata for weight in unet.parameters()}
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    noisy = torch.empty(batch, 4, side, side, dtype=unet.dtype).to(memory_format=torch.channels_last)
    text = torch.empty(batch, 77, unet.config.cross_attention_dim, dtype=unet.dtype, requires_grad=True)
    timesteps = torch.zeros(batch, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        unet(noisy, timesteps, text)
    return sum(kept.values())


if __name__ == "__main__":
    typer.run(main)
