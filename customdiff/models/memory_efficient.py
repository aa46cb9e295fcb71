"""The frozen part of a UNet, keeping no more for its backward pass than the gradient of its inputs needs.

Nothing of it trains, yet gradients must flow through it to the attention that does. PyTorch does not make use of that:
a convolution keeps its input for the gradient of a weight that asks for none, and normalisation and activation each
keep a tensor that follows in one cheap step from another that is kept anyway (Bhatia and Dangel 2024, "Lowering
PyTorch's memory consumption for selective differentiation"). Here a residual block keeps two tensors in place of six,
and a gated feed-forward layer one in place of two. Nor need what never changes be prepared at every step: on a CPU a
small feature map's convolution spends up to three quarters of its time on laying out its weight.

Convolutions and residual blocks compute what diffusers' do, bit for bit, by the same kernels on the same numbers. The
gated layers take PyTorch's vectorised GELU, which rounds otherwise than the one for strided halves; and features stay
in channels_last where diffusers' linear projections turn them out of it, so that sums are rounded in another order.
"""

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.activations import GEGLU
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

PACK_UNTIL = 256  # pixels of a batch's feature map; with more, arithmetic outweighs what is saved


def convert(unet: UNet2DConditionModel, *, transformers: bool = True) -> None:
    """Have the layers of a UNet whose weights are frozen keep less.

    Parameters and their names stay as they are until a convolution's first pass, which may pack its weight
    (`FrozenConv2d`).

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
    """A convolution that keeps its weight alone.

    On an x86 CPU oneDNN lays out a weight anew at each call. Where the first feature map that gradients must flow
    through is small, two layouts are kept in place of the parameter `weight`, which is None from then on: one for the
    pass forward, and one, turned round, for the pass back, which is a convolution as well.
    """

    packed: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) to (B, D, h', w')."""
        if self.packed is None and self._packing_pays(x):
            self._pack(x)
        if self.packed is not None:
            return _PackedConvolution.apply(x, self.bias, self.padding, self._padding_back, *self.packed)
        return _Convolution.apply(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)

    @property
    def _padding_back(self) -> tuple[int, ...]:
        return tuple(size - 1 - padding for size, padding in zip(self.kernel_size, self.padding, strict=True))

    def _packing_pays(self, x: Tensor) -> bool:
        plain = self.stride == self.dilation == (1, 1) and self.groups == 1 and not isinstance(self.padding, str)
        return (
            x.requires_grad
            and x.dtype == torch.float32
            and x.device.type == "cpu"
            and torch.backends.mkldnn.is_available()
            and torch.backends.cpu.get_cpu_capability().startswith("AVX")
            and plain
            and min(self._padding_back) >= 0
            and x.shape[0] * x.shape[2] * x.shape[3] <= PACK_UNTIL
        )

    def _pack(self, x: Tensor) -> None:
        turned = self.weight.transpose(0, 1).flip(2, 3).contiguous(memory_format=torch.channels_last)
        pairs = zip(x.shape[2:], self._padding_back, self.padding, strict=True)
        result = (x.shape[0], self.out_channels, *(side - back + padding for side, back, padding in pairs))
        self.packed = (
            _packed(self.weight.detach(), self.padding, x.shape),
            _packed(turned.detach(), self._padding_back, result),
        )
        self.weight = None


def _packed(weight: Tensor, padding: tuple[int, ...], shape: torch.Size) -> Tensor:
    """The weight as oneDNN wants it for features of that shape; others pass as well."""
    return torch.ops.mkldnn._reorder_convolution_weight(weight, padding, (1, 1), (1, 1), 1, shape)


class FrozenGEGLU(GEGLU):
    """A gated GELU that keeps the two halves of its projection alone."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, N, C) to (B, N, D)."""
        return _GatedGelu.apply(hidden_states, self.proj.weight, self.proj.bias)


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
    """Projects to both halves apart, since kernels for halves of one tensor are slow; computes the GELU again."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        biases = (None, None) if bias is None else bias.chunk(2)
        hidden, gate = (F.linear(x, half, its_bias) for half, its_bias in zip(weight.chunk(2), biases, strict=True))
        ctx.save_for_backward(hidden, gate, weight)
        return F.gelu(gate).mul_(hidden)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, None, None]:
        hidden, gate, weight = ctx.saved_tensors
        of_hidden, of_gate = F.gelu(gate).mul_(gradient), torch.ops.aten.gelu_backward(gradient * hidden, gate)
        if gradient.dtype != torch.float32:  # one product, for of two the first would be rounded before the sum
            return torch.cat([of_hidden, of_gate], dim=-1) @ weight, None, None
        to_hidden, to_gate = weight.chunk(2)
        of_x = torch.addmm((of_hidden @ to_hidden).flatten(0, -2), of_gate.flatten(0, -2), to_gate)
        return of_x.view(*gradient.shape[:-1], -1), None, None


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


class _PackedConvolution(torch.autograd.Function):
    """Keeps the packed weight of the pass back. Strides and dilations are 1."""

    @staticmethod
    def forward(ctx: FunctionCtx, x, bias, padding, padding_back, weight, turned) -> Tensor:
        ctx.turned, ctx.padding_back = turned, padding_back
        return _convolve_packed(x, weight, bias, padding)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return _convolve_packed(gradient, ctx.turned, None, ctx.padding_back), *[None] * 5


def _convolve_packed(x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, ...]) -> Tensor:
    return torch.ops.mkldnn._convolution_pointwise(x, weight, bias, padding, (1, 1), (1, 1), 1, "none", [], "")
