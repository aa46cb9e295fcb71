"""Batched image generation with one seed per image, so that an image does not depend on the rest of its batch."""

import hashlib
import inspect
from collections.abc import Sequence

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
)
from PIL import Image
from tqdm.auto import tqdm

from customdiff.errors import UserError

SCHEDULERS = {
    "ddim": DDIMScheduler,
    "ddpm": DDPMScheduler,
    "dpmsolver++": DPMSolverMultistepScheduler,
    "euler": EulerDiscreteScheduler,
}


def set_scheduler(pipe: DiffusionPipeline, name: str) -> None:
    """Set the scheduler of a pipeline, with the noise schedule and prediction type of its model.

    Args:
        pipe: changed in place.
        name: ddim, ddpm, dpmsolver++ or euler; base keeps the model's own scheduler.

    Raises:
        UserError: the name is not one of these.
    """
    if name == "base":
        return
    if name not in SCHEDULERS:
        raise UserError(f"scheduler: unknown name {name!r}; use one of {', '.join([*SCHEDULERS, 'base'])}")
    config = dict(pipe.scheduler.config)
    # Latents are not limited to [-1, 1], so the classes' default of clipping is wrong if the config does not set it.
    changes = {"clip_sample": config.get("clip_sample", False)} if name in ("ddim", "ddpm") else {}
    if name == "dpmsolver++":
        changes["algorithm_type"] = "dpmsolver++"
    pipe.scheduler = SCHEDULERS[name].from_config(config, **changes)


def image_seed(seed: int, *names: object) -> int:
    """Seed below 2**32 of one image: a hash of the run's seed and of names that identify the image.

    Names rather than a counter, so that an image stays the same when prompts or concepts are added before it.
    """
    text = "\0".join(map(str, (seed, *names)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4])


def generate(
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int,
    guidance_scale: float,
    eta: float = 0.0,
    batch_size: int = 8,
    height: int | None = None,
    width: int | None = None,
    negative_prompt: str | None = None,
    progress: str | None = "generate",
) -> list[Image.Image]:
    """Generate one image for each pair of prompt and seed.

    Every image has its own generator on the CPU, so its noise is the same on every device and in every batch. Results
    differ only by rounding.

    Args:
        pipe: a Stable Diffusion 1.x, 2.x or XL pipeline.
        prompts, seeds: one seed per prompt.
        steps: sampler steps.
        guidance_scale: scale of classifier-free guidance; 1 or less turns it off.
        eta: noise of DDIM, 0 to 1; other schedulers ignore it.
        batch_size: images generated at a time.
        height, width: px; None: the model's default, also of one of the two.
        negative_prompt: negative prompt of all images.
        progress: label of the progress bar; None: no bar.

    Raises:
        ValueError: `prompts` and `seeds` differ in length.
        UserError: the model's noise schedule has fewer time steps than `steps`.
    """
    if len(prompts) != len(seeds):
        raise ValueError(f"{len(prompts)} prompts for {len(seeds)} seeds")
    available = pipe.scheduler.config.num_train_timesteps
    if steps > available:
        raise UserError(f"steps: {steps} sampler steps, but the model's noise schedule has only {available} time steps")
    if (height is None) != (width is None):  # pipelines ignore one without the other
        default = pipe.unet.config.sample_size * pipe.vae_scale_factor
        height, width = height or default, width or default
    arguments = {
        "num_inference_steps": steps,
        "guidance_scale": guidance_scale,
        "height": height,
        "width": width,
    }
    if "eta" in inspect.signature(pipe.scheduler.step).parameters:
        arguments["eta"] = eta
    pipe.set_progress_bar_config(disable=True)
    images: list[Image.Image] = []
    with tqdm(total=len(prompts), desc=progress, unit="image", disable=progress is None) as bar:
        for start in range(0, len(prompts), batch_size):
            batch = list(prompts[start : start + batch_size])
            generators = [torch.Generator().manual_seed(seed) for seed in seeds[start : start + batch_size]]
            negative = None if negative_prompt is None else [negative_prompt] * len(batch)
            images += pipe(batch, negative_prompt=negative, generator=generators, **arguments).images
            bar.update(len(batch))
    return images
