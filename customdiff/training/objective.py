"""The training objective and its optimizer (Kumari et al. 2023, sections 3.1 and 3.2)."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch import Tensor, nn

from customdiff.config import Train
from customdiff.errors import UserError
from customdiff.training.batches import Batch


def losses(prediction: Tensor, target: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None]:
    """Instance loss over the valid region, and prior loss over the class images that follow the instance images.

    Args:
        prediction, target: (B, C, h, w), any dtype; compared in fp32.
        mask: (I, 1, h, w), weights of the instance loss, I <= B; of each image at least one is above 0.

    Returns:
        Two scalars. The instance loss is summed over channels and averaged over pixels by their weights, the prior loss
        is averaged over both, as in the paper's and the reference's code, so the first weighs C times more. The prior
        loss is None without class images.
    """
    count = mask.shape[0]
    error = F.mse_loss(prediction.float(), target.float(), reduction="none")
    instance = ((error[:count] * mask).sum([1, 2, 3]) / mask.sum([1, 2, 3])).mean()
    return instance, error[count:].mean() if error.shape[0] > count else None


def target_of(scheduler: DDPMScheduler, batch: Batch) -> Tensor:
    """What the model should predict by the scheduler's configuration: the noise, or the velocity (SD 2.x 768).

    Raises:
        UserError: the scheduler has another prediction type.
    """
    prediction_type = scheduler.config.prediction_type
    if prediction_type == "epsilon":
        return batch.noise
    if prediction_type == "v_prediction":
        return scheduler.get_velocity(batch.latents, batch.noise, batch.timesteps)
    raise UserError(
        f"base.model: prediction type {prediction_type!r} is not supported; use a model with epsilon or v_prediction"
    )


def learning_rate(train: Train, num_processes: int) -> float:
    """The optimizer's learning rate; `scale_lr` multiplies as the reference does, by 2 more with class images."""
    if not train.scale_lr:
        return train.learning_rate
    factor = train.gradient_accumulation_steps * train.batch_size * num_processes
    return train.learning_rate * factor * (2 if train.preserves_prior else 1)


def optimizer_for(
    train: Train, weights: Iterable[nn.Parameter], embeddings: Iterable[nn.Parameter], rate: float
) -> torch.optim.Optimizer:
    """AdamW over the UNet's trained weights and the token embeddings.

    Embeddings do not decay: the reference decays the whole token table, so every token shrinks a little at each step.

    Raises:
        UserError: adamw_8bit without bitsandbytes.
    """
    groups = [
        {"params": list(weights), "weight_decay": train.adam_weight_decay},
        {"params": list(embeddings), "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    options = {"lr": rate, "betas": (train.adam_beta1, train.adam_beta2), "eps": train.adam_epsilon}
    if train.optimizer == "adamw_8bit":
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError as error:
            raise UserError("train.optimizer: adamw_8bit needs bitsandbytes; install customdiff[adam8bit]") from error
        return AdamW8bit(groups, **options)
    return torch.optim.AdamW(groups, fused=True, **options)
