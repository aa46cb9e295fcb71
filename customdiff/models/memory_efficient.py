"""Memory-efficient replacements for the frozen layers of a UNet.

Frozen layers have no weight gradients, but gradients flow through them to the trained attention layers. PyTorch saves
more activations for this than necessary: a convolution saves its input for a weight gradient that is never computed,
and normalization and activation each save a tensor that is cheap to recompute from another saved one (Bhatia and
Dangel 2024, "Lowering PyTorch's memory consumption for selective differentiation"). With these layers a residual block
saves two tensors instead of six, and a gated feed-forward layer two instead of three. Results equal those of diffusers'
layers, except that gated layers in fp32 differ in rounding.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.activations import GEGLU
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


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
    """A gated GELU that saves the two halves of its projection and recomputes the GELU in the backward pass."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, N, C) to (B, N, D)."""
        return _Recomputed.apply(_gated, *self._halves(hidden_states))

    def _halves(self, x: Tensor) -> Sequence[Tensor]:
        """The projection's halves, apart in fp32, because PyTorch's GELU is slow on halves of one tensor.

        In half precision they stay one product: the gradient of two would be rounded before it is added.
        """
        if x.dtype != torch.float32:
            return self.proj(x).chunk(2, dim=-1)
        biases = (None, None) if self.proj.bias is None else self.proj.bias.chunk(2)
        return [F.linear(x, weight, bias) for weight, bias in zip(self.proj.weight.chunk(2), biases, strict=True)]


class FrozenResnetBlock2D(ResnetBlock2D):
    """A residual block that saves only the inputs of its two normalizations and recomputes the rest."""

    def forward(self, input_tensor: Tensor, temb: Tensor) -> Tensor:
        """Image features (B, C, h, w) and the timestep embedding (B, T) to (B, D, h, w)."""
        hidden = self.conv1(_Recomputed.apply(lambda x: F.silu(self.norm1(x)), input_tensor))
        hidden = hidden.add_(self.time_emb_proj(F.silu(temb))[:, :, None, None])
        hidden = self.conv2(_Recomputed.apply(lambda x: F.silu(self.norm2(x)), hidden))
        skip = input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor)
        hidden = hidden.add_(skip)
        return hidden if self.output_scale_factor == 1 else hidden / self.output_scale_factor


def _gated(hidden: Tensor, gate: Tensor) -> Tensor:
    return hidden * F.gelu(gate)


class _Recomputed(torch.autograd.Function):
    """Keeps the inputs of a function without randomness, and computes it again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        ctx.function = function
        ctx.save_for_backward(*inputs)
        return function(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
        with torch.enable_grad():
            output = ctx.function(*inputs)
        return None, *torch.autograd.grad(output, inputs, gradient)


class _Convolution(torch.autograd.Function):
    """Keeps the weight, for the gradient of the input; the input would serve only the gradient of the weight."""

    @staticmethod
    def forward(ctx: Any, x, weight, bias, stride, padding, dilation, groups) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.sides, ctx.options = x.shape[2:], (stride, padding, dilation, groups)
        return F.conv2d(x, weight, bias, *ctx.options)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of a convolution's input is the transposed convolution of its output's gradient."""
        (weight,) = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.options
        geometry = zip(ctx.sides, gradient.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
        uncovered = [  # pixels at the end of each side that a stride leaves out
            side - ((out - 1) * s - 2 * p + d * (kernel - 1) + 1) for side, out, kernel, s, p, d in geometry
        ]
        return F.conv_transpose2d(gradient, weight, None, stride, padding, uncovered, groups, dilation), *[None] * 6
