"""`customdiff sample`: generate images with an adapter."""

import io
import re
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import ValidationError

from customdiff import config
from customdiff.errors import UNPRINTABLE, UserError
from customdiff.files import atomic_file

if TYPE_CHECKING:
    from PIL import Image

    from customdiff.adapters.config import AdapterConfig


class Scheduler(StrEnum):
    """Values of --scheduler."""

    ddim = "ddim"
    ddpm = "ddpm"
    dpmsolver = "dpmsolver++"
    euler = "euler"
    base = "base"


class Precision(StrEnum):
    """Values of --precision."""

    fp32 = "fp32"
    fp16 = "fp16"
    bf16 = "bf16"


FROM_PARAMS = "(default: evaluate in params.yaml)"
Steps = Annotated[int | None, typer.Option(min=1, max=1000, help=f"Sampler steps {FROM_PARAMS}.")]
GuidanceScale = Annotated[float | None, typer.Option(min=0, help=f"Scale of classifier-free guidance {FROM_PARAMS}.")]
Eta = Annotated[
    float | None, typer.Option(min=0, max=1, help=f"Noise of ddim; other samplers ignore it {FROM_PARAMS}.")
]
SchedulerOption = Annotated[Scheduler | None, typer.Option(help=f"Sampler; base: the model's own {FROM_PARAMS}.")]
EXAMPLES = """Examples:

\b
  customdiff sample "<new1> cat sitting in a bucket"
  customdiff sample "<new1> cat on the grass" "<new1> cat in the snow" --num-images 4
  customdiff sample "a <new1> cat" --scheduler dpmsolver++ --steps 25 --out drafts
  customdiff sample "a <new1> cat" --adapter anna/grey-cat@v2
  customdiff sample "a <new1> cat" --adapter models:/customdiff-cat@champion
  customdiff sample "a <new1> cat" --checkpoint 150    after 150 steps; `customdiff checkpoints` lists checkpoints

Quote prompts, because shells interpret < and > as redirections.
"""


def sample(
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT", help="Prompts with modifier tokens written out.")],
    adapter: Annotated[
        str,
        typer.Option(
            help="Folder of an adapter, owner/name[@revision] on the Hugging Face Hub, or models:/... in MLflow."
        ),
    ] = "models/adapter",
    checkpoint: Annotated[
        str | None,
        typer.Option(help="Instead of --adapter: a step or `latest` of the last training, or a checkpoint's folder."),
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Folder or Hub name of the base model (default: that of the adapter).")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the images and their grid.")] = Path("samples"),
    num_images: Annotated[int, typer.Option(min=1, help="Images per prompt.")] = 1,
    steps: Steps = None,
    guidance_scale: GuidanceScale = None,
    eta: Eta = None,
    seed: Annotated[
        int, typer.Option(min=0, max=2**32 - 1, help="Seed of a prompt's first image; the next one adds 1.")
    ] = 42,
    scheduler: SchedulerOption = None,
    negative_prompt: Annotated[str | None, typer.Option(help="Prompt of what the images should not show.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images generated at a time.")] = 4,
    height: Annotated[int | None, typer.Option(min=8, max=4096, help="Height in px, a multiple of 8.")] = None,
    width: Annotated[int | None, typer.Option(min=8, max=4096, help="Width in px, a multiple of 8.")] = None,
    device: Annotated[str, typer.Option(help="Device: auto, cpu, mps, cuda, cuda:1, ...")] = "auto",
    precision: Annotated[Precision, typer.Option(help="Precision of the weights.")] = Precision.fp32,
) -> None:
    """Generate images with an adapter: PNG files, named by prompt and seed, and a grid of all images."""
    settings = _settings(steps=steps, guidance_scale=guidance_scale, eta=eta, scheduler=scheduler)
    _check_options(prompts, settings.guidance_scale, height, width, device, out)
    from customdiff.adapters import adapter as adapters
    from customdiff.models import base as base_model
    from customdiff.models import sampling

    if checkpoint is not None and adapter != "models/adapter":
        raise UserError("--checkpoint: replaces --adapter; give only one of them")
    folder = of_adapter(adapter, base) if checkpoint is None else of_checkpoint(checkpoint)
    adapter_config = adapters.read_config(folder)
    _note_missing_tokens(prompts, adapter_config.tokens)
    chosen = _base_of(adapter_config, adapter, base)
    pipe = base_model.load_pipeline(chosen, dtype=base_model.DTYPES[precision], device=base_model.device(device))
    sampling.set_scheduler(pipe, settings.scheduler)
    adapters.load(pipe, folder)
    images = sampling.generate(
        pipe,
        [prompt for prompt in prompts for _ in range(num_images)],
        [(seed + number) % 2**32 for _ in prompts for number in range(num_images)],
        steps=settings.steps,
        guidance_scale=settings.guidance_scale,
        eta=settings.eta,
        batch_size=batch_size,
        height=height,
        width=width,
        negative_prompt=negative_prompt,
    )
    _write_images(images, prompts, num_images, seed, out)


def _settings(**given: float | str | None) -> config.Evaluate:
    """Section `evaluate` of params.yaml, or its defaults without the file, with the options that were given."""
    known = config.load().evaluate if Path("params.yaml").is_file() else config.Evaluate()
    return known.model_copy(update={name: value for name, value in given.items() if value is not None})


def _check_options(
    prompts: list[str], guidance_scale: float, height: int | None, width: int | None, device: str, out: Path
) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"--out: {out} is a file; name a folder")
    if any(UNPRINTABLE.search(prompt) for prompt in prompts):
        raise UserError("PROMPT: contains a character that cannot be printed, or is not UTF-8")
    if not 0 <= guidance_scale <= 1000:
        raise UserError(f"--guidance-scale: must be from 0 to 1000 (here: {guidance_scale}), such as 6")
    for name, length in (("--height", height), ("--width", width)):
        if length is not None and length % 8:
            raise UserError(f"{name}: must be a multiple of 8 (here: {length}), such as {length - length % 8}")
    try:
        config.Base(device=device)
    except ValidationError as error:
        raise UserError(f"--device: must be auto, cpu, mps, cuda or cuda:N (here: {device!r})") from error


def _note_missing_tokens(prompts: list[str], tokens: list[str]) -> None:
    if not any(token in prompt for token in tokens for prompt in prompts):
        typer.echo(f"note: no prompt contains a modifier token; the adapter has {', '.join(tokens)}", err=True)


def _write_images(images: "list[Image.Image]", prompts: list[str], num_images: int, seed: int, out: Path) -> None:
    """Write images, `num_images` per prompt, and their grid to `out`, and say so."""
    out.mkdir(parents=True, exist_ok=True)
    for index, image in enumerate(images):
        prompt, number = prompts[index // num_images], index % num_images
        _write_new(image, out / f"{index // num_images + 1}-{slug(prompt)}-seed{(seed + number) % 2**32}.png")
    sheet = _write_new(grid(images, num_images), out / "grid.png")
    typer.echo(f"{len(images)} images in {out}; grid: {sheet}")


def _write_new(image: "Image.Image", path: Path) -> Path:
    """Write a PNG file; another image of the same name is kept, and the new one gets `-2`, `-3` and so on."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    data, free, number = buffer.getvalue(), path, 1
    while free.exists() and free.read_bytes() != data:
        number += 1
        free = path.with_name(f"{path.stem}-{number}.png")
    with atomic_file(free) as incoming:
        incoming.write_bytes(data)
    return free


def _base_of(adapter_config: "AdapterConfig", adapter: str, base: str | None) -> config.Base:
    chosen = adapter_config.base_model(base)
    if chosen.model.startswith("./") and not Path(chosen.model).is_dir():  # `push` writes local bases so
        raise UserError(f"{adapter}: its base model {chosen.model} does not exist here; name it with --base")
    return chosen


def of_adapter(name: str, base: str | None) -> Path:
    """The folder of an adapter: itself, or downloaded from the Hub or MLflow."""
    from customdiff.publishing import hub, registry

    return registry.download(name) if name.startswith(registry.PREFIX) else hub.resolve(name, base_model=base)


def of_checkpoint(name: str) -> Path:
    """The folder of a checkpoint; prints which one if the user did not name the folder itself."""
    from customdiff.training import checkpoints

    folder = checkpoints.find(name)
    if folder != Path(name):
        runs = len(checkpoints.find_runs())
        which = f", of the last of {runs} runs" if runs > 1 and not Path(name).is_dir() else ""
        typer.echo(f"using {folder}{which}", err=True)
    return folder


def slug(prompt: str) -> str:
    """File name for a prompt: new1-cat-asleep for "<new1> cat, asleep"."""
    words = re.sub(r"\W+", "-", prompt.lower()).strip("-")
    return words.encode()[:80].decode(errors="ignore") or "image"  # file names are limited to 255 bytes


def grid(images: "list[Image.Image]", columns: int) -> "Image.Image":
    """Grid of equally sized images on white, with `columns` images per row."""
    from PIL import Image

    columns = min(columns if columns > 1 else 4, len(images))
    width, height = images[0].size
    sheet = Image.new("RGB", (columns * (width + 4) - 4, -(-len(images) // columns) * (height + 4) - 4), "white")
    for index, image in enumerate(images):
        sheet.paste(image, (index % columns * (width + 4), index // columns * (height + 4)))
    return sheet
