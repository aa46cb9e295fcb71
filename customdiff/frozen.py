"""The frozen part of a UNet, keeping no more for its backward pass than the gradient of its inputs needs.

Nothing of it trains, yet gradients must flow through it to the attention that does. PyTorch does not make use of that:
a convolution keeps its input for the gradient of a weight that asks for none, and normalisation and activation each
keep a tensor that follows in one cheap step from another that is kept anyway (Bhatia and Dangel 2024, "Lowering
PyTorch's memory consumption for selective differentiation"). Here a residual block keeps two tensors in place of six,
and a gated feed-forward layer one in place of two. Every layer computes what diffusers' does, bit for bit, by the same
kernels on the same numbers; in a whole UNet features stay in channels_last where diffusers' linear projections turn
them out of it, and sums are then rounded in another order.
"""

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.activations import GEGLU
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable


def lighten(unet: UNet2DConditionModel, *, transformers: bool = True) -> None:
    """Have the layers of a UNet whose weights are frozen keep less. Parameters and their names stay as they are.

    Args:
        unet: changed in place. Layers that train, or that are not of the plain kind, are left alone.
        transformers: False leaves the layers of transformer blocks, which the compiler lightens in its own way.
    """
    for layer in unet.modules():  # a layer becomes another class of the same attributes: hooks and names stay
        if any(weight.requires_grad for weight in layer.parameters()):
            continue
        if type(layer) is nn.Conv2d and layer.padding_mode == "zeros":
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
    """A convolution that keeps its weight alone."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) to (B, D, h', w')."""
        return _Convolution.apply(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class FrozenGEGLU(GEGLU):
    """A gated GELU that keeps its projection alone."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, N, C) to (B, N, D)."""
        return _GatedGelu.apply(self.proj(hidden_states))


class FrozenResnetBlock2D(ResnetBlock2D):
    """A residual block that keeps what goes into its two normalisations."""

    def forward(self, input_tensor: Tensor, temb: Tensor) -> Tensor:
        """Image features (B, C, h, w) and the timestep's embedding (B, T) to (B, D, h, w)."""
        hidden = self.conv1(_NormSilu.apply(input_tensor, self.norm1))
        hidden = hidden.add_(self.time_emb_proj(F.silu(temb))[:, :, None, None])
        hidden = self.conv2(_NormSilu.apply(hidden, self.norm2))
        skip = input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor)
        hidden = hidden.add_(skip)
        return hidden if self.output_scale_factor == 1 else hidden / self.output_scale_factor


class _NormSilu(torch.autograd.Function):
    """Keeps what goes into a norm, and computes the norm again in the backward pass."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, norm: nn.GroupNorm) -> Tensor:
        ctx.save_for_backward(x)
        ctx.norm = norm
        return F.silu(norm(x), inplace=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        form = torch.contiguous_format  # as group norm itself takes its input: channels_last on a CPU alone
        if x.device.type == "cpu" and x.is_contiguous(memory_format=torch.channels_last):
            form = torch.channels_last
        x, norm = x.contiguous(memory_format=form), ctx.norm
        shape = (x.shape[0], x.shape[1], x[0, 0].numel(), norm.num_groups)
        normed, mean, deviation = torch.native_group_norm(x, norm.weight, norm.bias, *shape, norm.eps)
        gradient = torch.ops.aten.silu_backward(gradient, normed).contiguous(memory_format=form)
        return torch.ops.aten.native_group_norm_backward(
            gradient, x, mean, deviation, norm.weight, *shape, [True, False, False]
        )[0], None


class _GatedGelu(torch.autograd.Function):
    """Keeps what both halves of a gated GELU come from, and computes the GELU again in the backward pass."""

    @staticmethod
    def forward(ctx: FunctionCtx, projected: Tensor) -> Tensor:
        ctx.save_for_backward(projected)
        hidden, gate = projected.chunk(2, dim=-1)
        return F.gelu(gate).mul_(hidden)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> Tensor:
        (projected,) = ctx.saved_tensors
        hidden, gate = projected.chunk(2, dim=-1)
        result = torch.empty_like(projected)
        of_hidden, of_gate = result.chunk(2, dim=-1)
        torch.mul(gradient, F.gelu(gate), out=of_hidden)
        torch.ops.aten.gelu_backward(gradient * hidden, gate, grad_input=of_gate)
        return result


class _Convolution(torch.autograd.Function):
    """Keeps the weight, for the input's gradient, and not the input, which only the weight's gradient would need."""

    @staticmethod
    def forward(ctx: FunctionCtx, x, weight, bias, stride, padding, dilation, groups) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.options = x.shape, (stride, padding, dilation, groups)
        return F.conv2d(x, weight, bias, *ctx.options)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        form = torch.channels_last if gradient.is_contiguous(memory_format=torch.channels_last) else None
        # The input's numbers do not matter, but its layout does: in another than the gradient's it would be copied.
        x = torch.empty(ctx.shape, dtype=gradient.dtype, device=gradient.device, memory_format=form)
        stride, padding, dilation, groups = ctx.options
        options = (None, stride, padding, dilation, False, [0, 0], groups, [True, False, False])
        return torch.ops.aten.convolution_backward(gradient, x, weight, *options)[0], *[None] * 6
