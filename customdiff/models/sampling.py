"""Draw images in batches, each from a seed of its own, so that an image does not depend on its neighbours."""

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
    """Give `pipe` the scheduler `name`, with the noise schedule and prediction type of its model.

    Args:
        pipe: changed in place.
        name: ddim, ddpm, dpmsolver++, euler, or base: the model's own, left as it is.

    Raises:
        UserError: there is no scheduler of that name.
    """
    if name == "base":
        return
    if name not in SCHEDULERS:
        raise UserError(f"scheduler: {name!r} is not known; use one of {', '.join([*SCHEDULERS, 'base'])}")
    config = dict(pipe.scheduler.config)
    # Latents are not bound to -1..1, so the classes' default, to clip, is wrong where the config is silent.
    changes = {"clip_sample": config.get("clip_sample", False)} if name in ("ddim", "ddpm") else {}
    if name == "dpmsolver++":
        changes["algorithm_type"] = "dpmsolver++"
    pipe.scheduler = SCHEDULERS[name].from_config(config, **changes)


def image_seed(seed: int, *names: object) -> int:
    """A seed below 2**32 for one image, from the run's seed and whatever names the image.

    Named, not counted: an image stays the same when other prompts or concepts are added before it.
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
    progress: str | None = "drawing",
) -> list[Image.Image]:
    """Draw one image for each prompt and seed.

    Every image has a generator on the CPU, so that its noise is the same on every device and in every batch;
    what remains are rounding differences of the arithmetic.

    Args:
        pipe: a Stable Diffusion (1.x, 2.x, XL) pipeline, on its device.
        prompts, seeds: as many of the one as of the other.
        steps: sampler steps.
        guidance_scale: of classifier-free guidance; 1 and below turn it off.
        eta: noise of DDIM, 0 to 1; schedulers without it ignore it.
        batch_size: images drawn at a time.
        height, width: px; None: what the model was made for.
        negative_prompt: the same for all images.
        progress: label of the progress bar over images; None: no bar.

    Raises:
        ValueError: `prompts` and `seeds` differ in length.
    """
    if len(prompts) != len(seeds):
        raise ValueError(f"{len(prompts)} prompts for {len(seeds)} seeds")
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
