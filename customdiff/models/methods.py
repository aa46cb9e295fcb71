"""Trained weights of the UNet for each `train.method`: Custom Diffusion and the two baselines of the paper.

custom_diffusion    keys and values of cross-attention (or all of cross-attention), and the modifier tokens
textual_inversion   only the modifier tokens (Gal et al. 2022)
lora                low-rank changes of all attention projections, with fixed modifier tokens: DreamBooth (Ruiz et
                    al. 2022: a fixed identifier and prior preservation) with LoRA weights (Hu et al. 2021)
"""

from typing import Protocol

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from customdiff.errors import UserError
from customdiff.models import attention

METHODS = ("custom_diffusion", "textual_inversion", "lora")


class TrainedPart(Protocol):
    """Settings that select the trained weights: section `train` of params.yaml, or an adapter's config."""

    @property
    def method(self) -> str: ...
    @property
    def freeze_model(self) -> attention.FreezeModel: ...
    @property
    def lora_rank(self) -> int | None: ...


LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def inject(
    unet: UNet2DConditionModel, trained: TrainedPart, backend: attention.Backend = "sdpa"
) -> dict[str, nn.Parameter]:
    """Inject a method's trainable weights into a UNet and freeze the rest; the UNet's output does not change.

    Args:
        unet: changed in place.
        trained: section `train` of params.yaml, or the config of an adapter.
        backend: attention kernel of the layers that custom_diffusion injects.

    Returns:
        The trainable parameters, fp32, by their names in an adapter's file.

    Raises:
        UserError: the method is lora and PEFT is not installed, or `lora_rank` is missing.
    """
    unet.requires_grad_(False)
    if trained.method == "custom_diffusion":
        return attention.inject_processors(unet, trained.freeze_model, backend)
    if trained.method == "lora":
        if trained.lora_rank is None:
            raise UserError("lora_rank: missing; method lora requires it")
        _inject_lora(unet, trained.lora_rank)
    return trainable(unet)


def trainable(unet: UNet2DConditionModel) -> dict[str, nn.Parameter]:
    """Trainable parameters that `inject` added, by their names in an adapter's file; empty before `inject`."""
    lora = {
        f"unet.{name.replace('.default', '')}": parameter
        for name, parameter in unet.named_parameters()
        if ".lora_A." in name or ".lora_B." in name
    }
    return attention.trainable(unet) | lora


def trains_tokens(trained: TrainedPart) -> bool:
    """Whether the embeddings of the modifier tokens train; the identifier of DreamBooth is fixed."""
    return trained.method != "lora"


def trains_unet(trained: TrainedPart) -> bool:
    """Whether weights of the UNet train; otherwise nothing can be forgotten and prior preservation is not needed."""
    return trained.method != "textual_inversion"


def _inject_lora(unet: UNet2DConditionModel, rank: int) -> None:
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise UserError("train.method: lora needs PEFT; install customdiff[pipeline]") from error
    # alpha equals the rank, so the scale is 1 and files need not store it
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=LORA_TARGETS))
    for parameter in trainable(unet).values():
        parameter.data = parameter.data.to(torch.float32)
