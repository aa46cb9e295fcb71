"""What trains in the UNet, by `train.method`: Custom Diffusion and the two baselines that the paper compares it with.

custom_diffusion    cross-attention keys and values (or all of cross-attention), and the modifier tokens
textual_inversion   the modifier tokens alone (Gal et al. 2022)
lora                low-rank changes of all attention projections, the modifier tokens fixed: DreamBooth (Ruiz et
                    al. 2022: a fixed identifier, a prior to preserve), with LoRA (Hu et al. 2021) for its weights
"""

from typing import Protocol

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from customdiff.errors import UserError
from customdiff.models import attention

METHODS = ("custom_diffusion", "textual_inversion", "lora")


class TrainedPart(Protocol):
    """What is trained: section `train` of params.yaml, or the config of an adapter."""

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
    """Inject a method's trainable weights into a UNet and freeze the rest; its output stays the same.

    Args:
        unet: changed in place.
        trained: section `train` of params.yaml, or the config of an adapter.
        backend: of the attention that custom_diffusion injects.

    Returns:
        The trainable parameters, fp32, by their names in an adapter's file.

    Raises:
        UserError: lora without PEFT.
    """
    unet.requires_grad_(False)
    if trained.method == "custom_diffusion":
        return attention.inject_processors(unet, trained.freeze_model, backend)
    if trained.method == "lora":
        if trained.lora_rank is None:
            raise UserError("lora_rank: is missing; an adapter of method lora needs it")
        _inject_lora(unet, trained.lora_rank)
    return trainable(unet)


def trainable(unet: UNet2DConditionModel) -> dict[str, nn.Parameter]:
    """The trainable parameters that `inject` placed, by their names in an adapter's file; empty if there are none."""
    lora = {
        f"unet.{name.replace('.default', '')}": parameter
        for name, parameter in unet.named_parameters()
        if ".lora_A." in name or ".lora_B." in name
    }
    return attention.trainable(unet) | lora


def trains_tokens(trained: TrainedPart) -> bool:
    """Whether the rows of the modifier tokens train; DreamBooth's identifier is fixed."""
    return trained.method != "lora"


def trains_unet(trained: TrainedPart) -> bool:
    """Whether anything of the UNet trains; if not, nothing can be forgotten and there is no prior to preserve."""
    return trained.method != "textual_inversion"


def _inject_lora(unet: UNet2DConditionModel, rank: int) -> None:
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise UserError("train.method: lora needs PEFT; install customdiff[pipeline]") from error
    # alpha equal to the rank: the change is B A itself, and a file needs no word of the scale
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=LORA_TARGETS))
    for parameter in trainable(unet).values():
        parameter.data = parameter.data.to(torch.float32)
