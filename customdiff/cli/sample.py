"""`customdiff sample`: draw images with an adapter."""

import re
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import ValidationError

from customdiff import config
from customdiff.errors import UserError

if TYPE_CHECKING:
    from PIL import Image


class Scheduler(StrEnum):
    """What --scheduler takes."""

    ddim = "ddim"
    ddpm = "ddpm"
    dpmsolver = "dpmsolver++"
    euler = "euler"
    base = "base"


class Precision(StrEnum):
    """What --precision takes."""

    fp32 = "fp32"
    fp16 = "fp16"
    bf16 = "bf16"


EXAMPLES = """Examples:

\b
  customdiff sample "<new1> cat sitting in a bucket"
  customdiff sample "<new1> cat on the grass" "<new1> cat in the snow" --num-images 4
  customdiff sample "a <new1> cat" --scheduler dpmsolver++ --steps 25 --out drafts
  customdiff sample "a <new1> cat" --adapter anna/grey-cat@v2
  customdiff sample "a <new1> cat" --checkpoint 150    as it was after 150 steps; `customdiff checkpoints` lists them

Quote the prompts: a shell takes < and > for redirections.
"""


def sample(
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT", help="One or more, with tokens written out.")],
    adapter: Annotated[
        str, typer.Option(help="Folder of what was learned, or owner/name[@revision] on the Hugging Face Hub.")
    ] = "models/adapter",
    checkpoint: Annotated[
        str | None,
        typer.Option(help="In place of --adapter: a step or `latest` of the last training, or a checkpoint's folder."),
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Base model, folder or Hub name; by default the one it was learned on.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the images and their grid.")] = Path("samples"),
    num_images: Annotated[int, typer.Option(min=1, help="A prompt.")] = 1,
    steps: Annotated[int, typer.Option(min=1, help="Sampler steps.")] = 100,
    guidance_scale: Annotated[float, typer.Option(min=0, help="How closely to follow the prompt.")] = 6.0,
    eta: Annotated[float, typer.Option(min=0, max=1, help="Noise of ddim; others ignore it.")] = 1.0,
    seed: Annotated[
        int, typer.Option(min=0, max=2**32 - 1, help="Of a prompt's first image; the next has the next.")
    ] = 42,
    scheduler: Annotated[Scheduler, typer.Option(help="base: the model's own.")] = Scheduler.ddim,
    negative_prompt: Annotated[str | None, typer.Option(help="What the images should not show.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images drawn at a time.")] = 4,
    height: Annotated[int | None, typer.Option(min=8, help="px, a multiple of 8; by default the model's.")] = None,
    width: Annotated[int | None, typer.Option(min=8, help="px, a multiple of 8; by default the model's.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, mps, cuda, cuda:1, ...")] = "auto",
    precision: Annotated[
        Precision, typer.Option(help="Of the weights; fp16 halves the memory of a GPU.")
    ] = Precision.fp32,
) -> None:
    """Draw images with an adapter: PNG files, named by prompt and seed, and a grid of them all."""
    for name, length in (("--height", height), ("--width", width)):
        if length is not None and length % 8:
            raise UserError(f"{name}: must be a multiple of 8 (here: {length}); {length - length % 8} would be")
    try:
        config.Base(device=device)
    except ValidationError as error:
        raise UserError(f"--device: must be auto, cpu, mps, cuda or such as cuda:1 (here: {device!r})") from error

    from customdiff.adapters import adapter as adapters
    from customdiff.models import base as base_model
    from customdiff.models import sampling
    from customdiff.publishing import hub

    if checkpoint is not None and adapter != "models/adapter":
        raise UserError("--checkpoint: stands in place of --adapter; give one of the two")
    folder = hub.resolve(adapter, base_model=base) if checkpoint is None else of_checkpoint(checkpoint)
    adapter_config = adapters.read_config(folder)
    tokens = adapter_config.tokens
    if not any(token in prompt for token in tokens for prompt in prompts):
        typer.echo(f"note: no prompt names what was learned; its words are {', '.join(tokens)}", err=True)
    chosen = adapter_config.base_model(base)
    if chosen.model.startswith("./") and not Path(chosen.model).is_dir():  # as `push` names a base that is a folder
        raise UserError(f"{adapter}: belongs to a base model in {chosen.model}, which is not here; name it by --base")
    pipe = base_model.load_pipeline(chosen, dtype=base_model.DTYPES[precision], device=base_model.device(device))
    sampling.set_scheduler(pipe, scheduler)
    adapters.load(pipe, folder)
    images = sampling.generate(
        pipe,
        [prompt for prompt in prompts for _ in range(num_images)],
        [(seed + number) % 2**32 for _ in prompts for number in range(num_images)],
        steps=steps,
        guidance_scale=guidance_scale,
        eta=eta,
        batch_size=batch_size,
        height=height,
        width=width,
        negative_prompt=negative_prompt,
    )
    out.mkdir(parents=True, exist_ok=True)
    for place, image in enumerate(images):
        prompt, number = prompts[place // num_images], place % num_images
        image.save(out / f"{place // num_images + 1}-{slug(prompt)}-seed{(seed + number) % 2**32}.png")
    grid(images, num_images).save(out / "grid.png")
    typer.echo(f"{len(images)} images in {out}, all of them in {out / 'grid.png'}")


def of_checkpoint(name: str) -> Path:
    """The folder of a checkpoint; where the user gave no folder, says whose it is."""
    from customdiff.training import checkpoints

    found = checkpoints.find(name)
    if found != Path(name):
        runs = len(checkpoints.find_runs())
        which = f", of the last of {runs} runs" if runs > 1 and not Path(name).is_dir() else ""
        typer.echo(f"drawing with {found}{which}", err=True)
    return found


def slug(prompt: str) -> str:
    """A file name for a prompt: "<new1> cat, asleep" -> "new1-cat-asleep"."""
    return re.sub(r"\W+", "-", prompt.lower()).strip("-")[:80] or "image"


def grid(images: "list[Image.Image]", columns: int) -> "Image.Image":
    """Images of one size in rows of `columns`, on white."""
    from PIL import Image

    columns = min(columns if columns > 1 else 4, len(images))
    width, height = images[0].size
    sheet = Image.new("RGB", (columns * (width + 4) - 4, -(-len(images) // columns) * (height + 4) - 4), "white")
    for place, image in enumerate(images):
        sheet.paste(image, (place % columns * (width + 4), place // columns * (height + 4)))
    return sheet
