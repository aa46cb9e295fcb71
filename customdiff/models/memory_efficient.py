"""Memory-efficient layers for the frozen part of a UNet.

The frozen layers do not train, but gradients flow through them to the attention that does. PyTorch keeps more for that
than it needs: a convolution keeps its input for the gradient of a weight that has none, and normalization and
activation each keep a tensor that is one cheap step from one kept anyway (Bhatia and Dangel 2024, "Lowering PyTorch's
memory consumption for selective differentiation"). With these layers a residual block keeps two tensors instead of
six, and a gated feed-forward layer one instead of two. They compute what diffusers' layers do, with the same kernels.
"""

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.activations import GEGLU
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn.grad import conv2d_input
from torch.utils.checkpoint import checkpoint


def convert(unet: UNet2DConditionModel, *, transformers: bool = True) -> None:
    """Turn the frozen layers of a UNet into memory-efficient ones; parameters and their names stay.

    Args:
        unet: changed in place. Layers that train, or are not of the plain kind, stay as they are.
        transformers: False skips the layers of transformer blocks, which torch.compile optimizes itself.
    """
    for layer in unet.modules():  # a layer gets another class with the same attributes: hooks and names stay
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
    """A convolution that keeps only its weight for the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) to (B, D, h', w')."""
        options = (self.stride, self.padding, self.dilation, self.groups)
        return _Convolution.apply(x, self.weight, self.bias, *options)


class FrozenGEGLU(GEGLU):
    """A gated GELU that keeps only its projection, and computes the GELU again in the backward pass."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, N, C) to (B, N, D)."""
        return _recomputed(self._gate, self.proj(hidden_states))

    def _gate(self, projected: Tensor) -> Tensor:
        hidden, gate = projected.chunk(2, dim=-1)
        return hidden * self.gelu(gate)


class FrozenResnetBlock2D(ResnetBlock2D):
    """A residual block that keeps only the inputs of its two normalizations, and computes the rest again."""

    def forward(self, input_tensor: Tensor, temb: Tensor) -> Tensor:
        """Image features (B, C, h, w) and the timestep embedding (B, T) to (B, D, h, w)."""
        hidden = self.conv1(_recomputed(lambda x: F.silu(self.norm1(x)), input_tensor))
        hidden = hidden + self.time_emb_proj(F.silu(temb))[:, :, None, None]
        hidden = self.conv2(_recomputed(lambda x: F.silu(self.norm2(x)), hidden))
        skip = input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor)
        hidden = skip + hidden
        return hidden if self.output_scale_factor == 1 else hidden / self.output_scale_factor


def _recomputed(function, x: Tensor) -> Tensor:
    """`function(x)`, of which only x is kept; it has no randomness whose state would have to be kept."""
    return checkpoint(function, x, use_reentrant=False, preserve_rng_state=False)


class _Convolution(torch.autograd.Function):
    """Keeps the weight, for the gradient of the input; the input would serve only the gradient of the weight."""

    @staticmethod
    def forward(ctx: FunctionCtx, x, weight, bias, stride, padding, dilation, groups) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.options = x.shape, (stride, padding, dilation, groups)
        return F.conv2d(x, weight, bias, *ctx.options)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        return conv2d_input(ctx.shape, weight, gradient, *ctx.options), *[None] * 6
