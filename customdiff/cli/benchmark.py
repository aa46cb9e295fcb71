"""`customdiff benchmark`: published benchmarks with one's own base model and settings."""

from pathlib import Path
from typing import Annotated

import typer

from customdiff import config
from customdiff.errors import UserError

EXAMPLES = """Examples:

\b
  customdiff benchmark customconcept101 --data custom-diffusion/customconcept101
  customdiff benchmark customconcept101 --data ... --concepts pet_cat1,pet_dog2    a part of it
  customdiff benchmark customconcept101 --data ... --adapters kept/adapters        score adapters that exist
"""
benchmark = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


@benchmark.callback()
def _group() -> None:
    """Run published benchmarks."""


@benchmark.command(epilog=EXAMPLES, short_help="The benchmark of Custom Diffusion's authors.")
def customconcept101(
    data: Annotated[Path, typer.Option(help="Folder of the data set: dataset.json, prompts/ and benchmark_dataset/.")],
    adapters: Annotated[
        Path | None, typer.Option(help="Folder with one adapter per concept or pair, to be scored instead of training.")
    ] = None,
    concepts: Annotated[
        str | None, typer.Option(help="Concepts and pairs, such as pet_cat1,pet_cat1+pet_dog2 (default: all).")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Sampler steps; the paper has 200 and 50.")] = 200,
    num_images: Annotated[int, typer.Option(min=1, help="Images per prompt.")] = 5,
    clip: Annotated[str, typer.Option(help="CLIP of the table.")] = "openai/clip-vit-base-patch32",
    dino: Annotated[str, typer.Option(help="DINO of the table.")] = "facebook/dino-vits16",
    out: Annotated[Path, typer.Option(help="Folder for adapters, images and tables.")] = Path(
        "results/customconcept101"
    ),
) -> None:
    """Train and score every concept and pair of CustomConcept101, and print the means under the paper's.

    Base model, preparation and training are those of params.yaml. Start the command again to continue: complete
    concepts are skipped, and an interrupted training continues.
    """
    if out.is_file():
        raise UserError(f"--out: {out} is a file; name a folder")
    params = config.load()
    if adapters and not adapters.is_dir():
        raise UserError(f"--adapters: {adapters} is not a folder")
    from customdiff.evaluation import customconcept101 as benchmarks
    from customdiff.evaluation.judges import Judges

    entries = benchmarks.read(data)
    if concepts:
        entries = _chosen(concepts, {entry.key: entry for entry in entries})
    params = benchmarks.protocol(params, steps=steps, num_images=num_images, clip=clip, dino=dino)
    found = benchmarks.run(params, entries, Judges.load(params), out, adapters)
    if not found:
        raise UserError(f"--adapters: {adapters} has no folder with the name of a concept, such as {entries[0].key}")
    benchmarks.write_results(entries, found, steps, out)
    typer.echo(benchmarks.table(entries, found, steps))


def _chosen(names: str, known: dict) -> list:
    """The entries with these names, separated by commas."""
    wanted = [name.strip() for name in names.split(",")]
    for name in wanted:
        if name not in known:
            raise UserError(f"--concepts: unknown {name!r}; use names of dataset.json, such as {next(iter(known))}")
    return [known[name] for name in wanted]
