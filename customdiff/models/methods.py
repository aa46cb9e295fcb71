"""What trains in the UNet, by `train.method`: Custom Diffusion and the two baselines that the paper compares it with.

custom_diffusion    cross-attention keys and values (or all of cross-attention), and the modifier tokens
textual_inversion   the modifier tokens alone (Gal et al. 2022)
lora                low-rank changes of all attention projections, the modifier tokens fixed: DreamBooth (Ruiz et
                    al. 2022: a fixed identifier, a prior to preserve), with LoRA (Hu et al. 2021) for its weights
"""

from collections.abc import Mapping

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from customdiff.errors import UserError
from customdiff.models import attention

METHODS = ("custom_diffusion", "textual_inversion", "lora")
LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def put(unet: UNet2DConditionModel, how: Mapping, backend: attention.Backend = "sdpa") -> dict[str, nn.Parameter]:
    """Put a method's trainable weights into a UNet, and freeze the rest; it computes what it did before.

    Args:
        unet: changed in place.
        how: `method`; for custom_diffusion `freeze_model`, for lora `lora_rank`. An adapter's card has all three.
        backend: of the attention that custom_diffusion puts in.

    Returns:
        The trainable parameters, fp32, by their names in an adapter's file.

    Raises:
        UserError: lora without PEFT.
    """
    unet.requires_grad_(False)
    if how["method"] == "custom_diffusion":
        return attention.put_processors(unet, how["freeze_model"], backend)
    if how["method"] == "lora":
        _put_lora(unet, how["lora_rank"])
    return trainable(unet)


def trainable(unet: UNet2DConditionModel) -> dict[str, nn.Parameter]:
    """The trainable parameters that `put` placed, by their names in an adapter's file; empty where there are none."""
    lora = {
        f"unet.{name.replace('.default', '')}": parameter
        for name, parameter in unet.named_parameters()
        if ".lora_A." in name or ".lora_B." in name
    }
    return attention.trainable(unet) | lora


def trains_tokens(how: Mapping) -> bool:
    """Whether the rows of the modifier tokens train; DreamBooth's identifier is fixed."""
    return how["method"] != "lora"


def trains_unet(how: Mapping) -> bool:
    """Whether anything of the UNet trains; if not, nothing can be forgotten and there is no prior to preserve."""
    return how["method"] != "textual_inversion"


def _put_lora(unet: UNet2DConditionModel, rank: int) -> None:
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise UserError("train.method: lora needs PEFT; install customdiff[pipeline]") from error
    # alpha equal to the rank: the change is B A itself, and a file needs no word of the scale
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=LORA_TARGETS))
    for parameter in trainable(unet).values():
        parameter.data = parameter.data.to(torch.float32)
