"""The training objective and its optimizer (Kumari et al. 2023, sections 3.1 and 3.2)."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch import Tensor, nn

from customdiff.config import Train
from customdiff.errors import UserError
from customdiff.training.batches import Batch


def losses(prediction: Tensor, target: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None]:
    """Masked instance loss and prior loss.

    The instance loss is summed over channels and averaged over valid pixels; the prior loss is averaged over both. The
    instance loss therefore weighs C times more, as in the paper's and the reference's code.

    Args:
        prediction, target: (B, C, h, w), any dtype, compared in fp32; the I instance images come first.
        mask: (I, 1, h, w), I <= B, weights of the instance loss; of each image at least one is above 0.

    Returns:
        Two scalars; the prior loss is None without class images.
    """
    count = mask.shape[0]
    error = F.mse_loss(prediction.float(), target.float(), reduction="none")
    instance = ((error[:count] * mask).sum([1, 2, 3]) / mask.sum([1, 2, 3])).mean()
    return instance, error[count:].mean() if error.shape[0] > count else None


def target_of(scheduler: DDPMScheduler, batch: Batch) -> Tensor:
    """The prediction target (B, C, h, w) for the scheduler's prediction type: noise, or velocity (SD 2.x at 768 px).

    Raises:
        UserError: another prediction type.
    """
    prediction_type = scheduler.config.prediction_type
    if prediction_type == "epsilon":
        return batch.noise
    if prediction_type == "v_prediction":
        return scheduler.get_velocity(batch.latents, batch.noise, batch.timesteps)
    raise UserError(
        f"base.model: prediction type {prediction_type!r} is not supported; use a model with epsilon or v_prediction"
    )


def learning_rates(train: Train, num_processes: int) -> tuple[float, float]:
    """The optimizer's learning rates: of the UNet's weights, and of the token embeddings.

    With `scale_lr` both are multiplied by accumulation steps, batch size and processes, and by 2 with class images, as
    in the reference.
    """
    factor = 1
    if train.scale_lr:
        factor = train.gradient_accumulation_steps * train.batch_size * num_processes
        factor *= 2 if train.preserves_prior else 1
    return train.learning_rate * factor, (train.token_learning_rate or train.learning_rate) * factor


def optimizer_for(
    train: Train, weights: Iterable[nn.Parameter], embeddings: Iterable[nn.Parameter], num_processes: int = 1
) -> torch.optim.Optimizer:
    """AdamW over the UNet's trained weights and the token embeddings, each with its learning rate.

    Embeddings have no weight decay. The reference decays the whole token table, so all tokens shrink at each step.

    Raises:
        UserError: the optimizer is adamw_8bit and bitsandbytes is not installed.
    """
    rate, token_rate = learning_rates(train, num_processes)
    groups: list[dict[str, Any]] = [
        {"params": list(weights), "lr": rate, "weight_decay": train.adam_weight_decay},
        {"params": list(embeddings), "lr": token_rate, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    options: dict[str, Any] = {"betas": (train.adam_beta1, train.adam_beta2), "eps": train.adam_epsilon}
    if train.optimizer == "adamw_8bit":
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError as error:
            raise UserError("train.optimizer: adamw_8bit needs bitsandbytes; install customdiff[adam8bit]") from error
        return AdamW8bit(groups, **options)
    return torch.optim.AdamW(groups, fused=True, **options)
