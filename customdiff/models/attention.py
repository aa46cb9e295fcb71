"""Cross-attention of Custom Diffusion: processors with trained weights, and their injection into a UNet.

The paper (section 3.1, figure 3) finds that fine-tuning changes the key and value projections of cross-attention
most, and trains only those. They are separate fp32 weights beside the frozen ones, under the names of diffusers'
`CustomDiffusionAttnProcessor`, so that files are interchangeable between the two.
"""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, CustomDiffusionAttnProcessor2_0
from torch import Tensor, nn

from customdiff.errors import UserError

FreezeModel = Literal["crossattn_kv", "crossattn"]
Backend = Literal["sdpa", "xformers"]
AttentionKernel = Callable[[Tensor, Tensor, Tensor, Tensor | None, float], Tensor]  # query, key, value, mask, scale


class CrossAttentionProcessor(CustomDiffusionAttnProcessor2_0):
    """Cross-attention with trained keys and values, and with `train_q_out` also trained queries and output.

    It differs from diffusers' class in three ways, none of which changes a result in fp32: weights are cast to the
    dtype of their input (diffusers mixes dtypes and fails for `train_q_out` in half precision); the first token is
    detached by slicing instead of multiplying by masks; and the attention kernel may be that of xformers.
    """

    def __init__(self, hidden_size: int, cross_attention_dim: int, train_q_out: bool, out_bias: bool, backend: Backend):
        super().__init__(
            train_kv=True,
            train_q_out=train_q_out,
            hidden_size=hidden_size,
            cross_attention_dim=cross_attention_dim,
            out_bias=out_bias,
        )
        self.attend = _xformers_attention() if backend == "xformers" else _sdpa

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Attend from image features (B, N, C) to text states (B, L, D); returns (B, N, C) in the input's dtype."""
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if attn.norm_cross:
            text = attn.norm_encoder_hidden_states(text)
        mask = attn.prepare_attention_mask(attention_mask, text.shape[1], hidden_states.shape[0])
        dtype = hidden_states.dtype

        query = _linear(self.to_q_custom_diffusion, hidden_states) if self.train_q_out else attn.to_q(hidden_states)
        key = _without_first_gradient(_linear(self.to_k_custom_diffusion, text.to(dtype)))
        value = _without_first_gradient(_linear(self.to_v_custom_diffusion, text.to(dtype)))

        query, key, value = (x.unflatten(-1, (attn.heads, -1)) for x in (query, key, value))
        if mask is not None:
            mask = mask.view(hidden_states.shape[0], attn.heads, -1, mask.shape[-1])
        out = self.attend(query, key, value, mask, attn.scale).flatten(-2).to(dtype)
        if self.train_q_out:
            return self.to_out_custom_diffusion[1](_linear(self.to_out_custom_diffusion[0], out))
        return attn.to_out[1](attn.to_out[0](out))


def inject_processors(
    unet: UNet2DConditionModel, freeze_model: FreezeModel = "crossattn_kv", backend: Backend = "sdpa"
) -> dict[str, nn.Parameter]:
    """Give every cross-attention layer an fp32 copy of its trained weights, and freeze the rest of the UNet.

    Args:
        unet: any UNet with cross-attention; changed in place, with the same output as before.
        freeze_model: `crossattn_kv` trains keys and values; `crossattn` also queries and output projections.
        backend: attention kernel.

    Returns:
        The trainable parameters by their names in `pytorch_custom_diffusion_weights`.
    """
    unet.requires_grad_(False)
    modules = dict(unet.named_modules())
    processors = dict(unet.attn_processors)
    for name in processors:
        attn = modules[name.removesuffix(".processor")]
        if attn.is_cross_attention:
            processors[name] = _processor_from(attn, freeze_model == "crossattn", backend)
    unet.set_attn_processor(processors)
    return trainable(unet)


def trainable(unet: UNet2DConditionModel) -> dict[str, nn.Parameter]:
    """Parameters of the injected processors; empty if there are none."""
    return {
        f"{name}.{key}": parameter
        for name, processor in unet.attn_processors.items()
        if isinstance(processor, CrossAttentionProcessor)
        for key, parameter in processor.named_parameters()
    }


def originals(unet: UNet2DConditionModel, freeze_model: FreezeModel) -> dict[str, Tensor]:
    """Weights of the base model that `inject_processors` replaces, not copied, under the names of the trained ones."""
    modules = dict(unet.named_modules())
    return {
        f"{name}.{key}": weight
        for name in unet.attn_processors
        if (attn := modules[name.removesuffix(".processor")]).is_cross_attention
        for key, weight in _replaced(attn, freeze_model == "crossattn").items()
    }


def processor_names(unet: UNet2DConditionModel) -> list[str]:
    """Names of all attention processors, including those of self-attention, in the UNet's order."""
    return list(unet.attn_processors)


def use_backend(unet: UNet2DConditionModel, backend: Backend) -> None:
    """Use `backend` for the frozen self-attention too."""
    if backend == "xformers":
        _xformers_attention()
        unet.enable_xformers_memory_efficient_attention()


def _processor_from(attn: Attention, train_q_out: bool, backend: Backend) -> CrossAttentionProcessor:
    processor = CrossAttentionProcessor(
        attn.to_k.weight.shape[0],
        attn.to_k.weight.shape[1],
        train_q_out,
        attn.to_out[0].bias is not None,
        backend,
    )
    processor.load_state_dict(_replaced(attn, train_q_out))
    return processor.to(attn.to_k.weight.device)


def _replaced(attn: Attention, train_q_out: bool) -> dict[str, Tensor]:
    """The layer's weights by the names of the processor's weights that replace them."""
    weights = {
        "to_k_custom_diffusion.weight": attn.to_k.weight,
        "to_v_custom_diffusion.weight": attn.to_v.weight,
    }
    if train_q_out:
        weights["to_q_custom_diffusion.weight"] = attn.to_q.weight
        weights |= {f"to_out_custom_diffusion.0.{key}": value for key, value in attn.to_out[0].named_parameters()}
    return weights


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """`layer(x)` in the dtype of x; gradients reach the layer's fp32 weights."""
    return F.linear(x, layer.weight.to(x.dtype), None if layer.bias is None else layer.bias.to(x.dtype))


def _without_first_gradient(x: Tensor) -> Tensor:
    """x (B, L, C) without gradients through the first token, which is the start token of every caption.

    The paper's code detaches it too, so that its key and value stay close to those of the base model.
    """
    return torch.cat([x[:, :1].detach(), x[:, 1:]], dim=1)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attention over (B, N, heads, channels)."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale).transpose(1, 2)


def _xformers_attention() -> AttentionKernel:
    """xformers' memory-efficient attention over (B, N, heads, channels).

    Raises:
        UserError: xformers is not installed, or there is no CUDA GPU.
    """
    try:
        from xformers.ops import memory_efficient_attention
    except ImportError as error:
        raise UserError(
            "train.attention: xformers is not installed; install customdiff[xformers] or use sdpa"
        ) from error
    if not torch.cuda.is_available():
        raise UserError("train.attention: xformers needs a CUDA GPU; use sdpa")

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        return memory_efficient_attention(query, key, value, attn_bias=mask, scale=scale)

    return attend
