"""Images of the validation prompts during a training, always from the same seeds."""

from collections.abc import Sequence

from diffusers import DiffusionPipeline
from PIL import Image

from customdiff.config import Params
from customdiff.config.train import Grading, Validation
from customdiff.models import sampling
from customdiff.models.modifier_tokens import without_tokens
from customdiff.tracking import Tracker
from customdiff.training.checkpoints import RunFolder


def generate(pipe: DiffusionPipeline, params: Params, folder: RunFolder, tracker: Tracker, step: int) -> None:
    """Generate images with the current weights, and save and log them.

    Args:
        step: after which; 0: before the training, by the base model, from the prompts without their modifier tokens.
    """
    settings = params.train.validation
    titles = [prompt for prompt in params.validation_prompts for _ in range(settings.num_images)]
    tokens = [concept.modifier_token for concept in params.concepts.values()]
    images = sample(
        pipe,
        titles if step else [without_tokens(title, *tokens) for title in titles],
        [params.base.seed + number for number in range(len(titles))],
        settings,
        params.prepare.resolution,
        settings.num_images,
    )
    for place, (title, image) in enumerate(zip(titles, images, strict=True)):
        prompt, number = divmod(place, settings.num_images)
        folder.add_image(image, f"step{step:06d}-prompt{prompt}-{number}.png")
        suffix = f" ({number + 1})" if settings.num_images > 1 else ""
        tracker.image(image, f"images/{title}{suffix}", step=step)


def sample(
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    settings: Validation | Grading,
    side: int,
    batch_size: int = 8,
) -> list[Image.Image]:
    """Images of a pipeline that is being trained, which it leaves in its mode."""
    training = pipe.unet.training
    pipe.unet.eval()
    images = sampling.generate(
        pipe,
        prompts,
        seeds,
        steps=settings.steps,
        guidance_scale=settings.guidance_scale,
        batch_size=batch_size,
        height=side,
        width=side,
        progress=None,
    )
    pipe.unet.train(training)
    return images
