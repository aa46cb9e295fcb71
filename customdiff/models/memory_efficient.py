"""Memory-efficient replacements for the frozen layers of a UNet.

Frozen layers have no weight gradients, but gradients flow through them to the trained attention layers. PyTorch saves
more activations for this than necessary: a convolution saves its input for a weight gradient that is never computed,
and normalization and activation each save a tensor that is cheap to recompute from another saved one (Bhatia and
Dangel 2024, "Lowering PyTorch's memory consumption for selective differentiation"). With these layers a residual block
saves two tensors instead of six, and a gated feed-forward layer one instead of two. Results equal those of diffusers'
layers, because the same kernels run.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.activations import GEGLU
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv2d_input
from torch.utils.checkpoint import checkpoint


def convert(unet: UNet2DConditionModel, *, transformers: bool = True) -> None:
    """Make the frozen layers of a UNet memory-efficient; parameters and their names stay the same.

    Args:
        unet: changed in place. Layers with trainable parameters and unusual variants stay unchanged.
        transformers: False skips the layers of transformer blocks, which torch.compile optimizes itself.
    """
    for layer in unet.modules():  # only the class of a layer changes, so its hooks and parameter names stay
        if any(weight.requires_grad for weight in layer.parameters()):
            continue
        if type(layer) is nn.Conv2d and layer.padding_mode == "zeros" and not isinstance(layer.padding, str):
            layer.__class__ = FrozenConv2d
        elif type(layer) is GEGLU and transformers:
            layer.__class__ = FrozenGEGLU
        elif type(layer) is ResnetBlock2D and _is_plain(layer):
            layer.__class__ = FrozenResnetBlock2D


def _is_plain(block: ResnetBlock2D) -> bool:
    return (
        block.time_embedding_norm == "default"
        and block.time_emb_proj is not None
        and not block.skip_time_act
        and block.upsample is None
        and block.downsample is None
        and isinstance(block.nonlinearity, nn.SiLU)
        and block.dropout.p == 0
    )


class FrozenConv2d(nn.Conv2d):
    """A convolution that saves only its weight for the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) to (B, D, h', w')."""
        options = (self.stride, self.padding, self.dilation, self.groups)
        return _Convolution.apply(x, self.weight, self.bias, *options)


class FrozenGEGLU(GEGLU):
    """A gated GELU that saves only its projection and recomputes the GELU in the backward pass."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, N, C) to (B, N, D)."""
        return _recomputed(self._gate, self.proj(hidden_states))

    def _gate(self, projected: Tensor) -> Tensor:
        hidden, gate = projected.chunk(2, dim=-1)
        return hidden * self.gelu(gate)


class FrozenResnetBlock2D(ResnetBlock2D):
    """A residual block that saves only the inputs of its two normalizations and recomputes the rest."""

    def forward(self, input_tensor: Tensor, temb: Tensor) -> Tensor:
        """Image features (B, C, h, w) and the timestep embedding (B, T) to (B, D, h, w)."""
        hidden = self.conv1(_recomputed(lambda x: F.silu(self.norm1(x)), input_tensor))
        hidden = hidden + self.time_emb_proj(F.silu(temb))[:, :, None, None]
        hidden = self.conv2(_recomputed(lambda x: F.silu(self.norm2(x)), hidden))
        skip = input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor)
        hidden = skip + hidden
        return hidden if self.output_scale_factor == 1 else hidden / self.output_scale_factor


def _recomputed(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`function(x)`, recomputed from x in the backward pass; it is deterministic, so no RNG state is saved."""
    return checkpoint(function, x, use_reentrant=False, preserve_rng_state=False)


class _Convolution(torch.autograd.Function):
    """Convolution that saves its weight for the input gradient, but not its input for a weight gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.options = x.shape, options  # stride, padding, dilation, groups
        return F.conv2d(x, weight, bias, *options)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        return conv2d_input(ctx.shape, weight, gradient, *ctx.options), *[None] * 6
