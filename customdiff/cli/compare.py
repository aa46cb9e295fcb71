"""`customdiff compare`: adapters beside one another, or Custom Diffusion beside its baselines."""

from pathlib import Path
from typing import Annotated

import typer

from customdiff import config
from customdiff.errors import UserError
from customdiff.files import atomic_directory, check_free

EXAMPLES = """Examples:

\b
  customdiff compare                                          train each method on data/prepared, then grade all
  customdiff compare --methods custom_diffusion,lora --learning-rate lora=5e-4
  customdiff compare joint=models/adapter merged=models/merged  grade adapters that are there already
"""
RUNS, PREPARED = Path(".comparison"), Path("data/prepared")


def compare(
    adapters: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME=FOLDER]", help="Adapters to grade; none: train each method first."),
    ] = None,
    methods: Annotated[str, typer.Option(help="What to train.")] = "custom_diffusion,textual_inversion,lora",
    learning_rate: Annotated[
        list[str] | None,
        typer.Option(metavar="METHOD=RATE", help="In place of train.learning_rate, or its multiple for a baseline."),
    ] = None,
    num_images: Annotated[int | None, typer.Option(min=1, help="A prompt; by default evaluate.num_images.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for table and pictures.")] = Path("results/compare"),
) -> None:
    """Custom Diffusion, textual inversion and DreamBooth with LoRA on your own concept: the paper's comparison.

    Same photos, class images, steps, prompts and seeds, as params.yaml has them; run `dvc repro` first. A training that
    was killed goes on, a finished one is not run again.
    """
    check_free(out, "comparison.csv")
    params = config.load()
    params = config.with_num_images(params, num_images)
    rates = {name: _rate(name, text) for name, text in _pairs(learning_rate or [], "--learning-rate").items()}
    folders = {name: Path(folder) for name, folder in _pairs(adapters or [], "NAME=FOLDER").items()}
    wanted = [] if folders else [name.strip() for name in methods.split(",")]

    from customdiff import provenance, tracking
    from customdiff.adapters.config import read_config
    from customdiff.evaluation import comparison
    from customdiff.evaluation.base_image_cache import cache_folder
    from customdiff.evaluation.generation import Generation
    from customdiff.evaluation.prompts import read_all_prompts
    from customdiff.models import base
    from customdiff.models.clip import Clip
    from customdiff.sources.instance_images import read_instance_images

    for name in [*wanted, *rates]:
        if name not in comparison.RATES:
            raise UserError(f"--methods: unknown method {name}; use {', '.join(comparison.RATES)}")
    for folder in folders.values():
        read_config(folder)
    prompts = read_all_prompts(params.evaluate.prompts, params.concepts)
    instances = {name: read_instance_images(Path("data/instances", name)) for name in params.concepts}
    judge = Clip.load(params.evaluate.clip, base.device(params.base.device))

    def tracker_for(run_id: str | None) -> tracking.Tracker:
        tags = provenance.run_tags()
        if run_id:
            return tracking.resume(params.tracking, run_id, tags=tags)
        return tracking.start(params.tracking, tags=tags)

    facts = {}
    for name in wanted:
        chosen = comparison.params_of(params, name, rates.get(name))
        typer.echo(f"{name}: {chosen.train.max_steps} steps at a learning rate of {chosen.train.learning_rate:g}")
        run = comparison.train(chosen, PREPARED, RUNS / name, tracker_for)
        folders[name], facts[name] = run.path / "adapter", comparison.facts_of(run, chosen)

    generation = Generation(params.base, params.evaluate, params.concepts, cache_folder())
    graded = comparison.grade(generation, folders, prompts, instances, judge)
    for name, found in facts.items():
        graded[name].facts.update(found)
    rows = comparison.table(graded)
    with atomic_directory(out) as incoming:
        comparison.write_table(rows, incoming / "comparison.csv")
        (incoming / "comparison.md").write_text(comparison.markdown(rows), encoding="utf-8")
        comparison.sheet(graded).save(incoming / "comparison.jpg", quality=90)
    typer.echo(comparison.markdown(rows))
    typer.echo(f"images: {out / 'comparison.jpg'}")


def _pairs(texts: list[str], what: str) -> dict[str, str]:
    """`a=b` texts as a mapping."""
    for text in texts:
        if not all(text.partition("=")):
            raise UserError(f"{what}: must be such as lora=1e-4 or merged=models/merged (here: {text!r})")
    return {name: value for name, _, value in (text.partition("=") for text in texts)}


def _rate(name: str, text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not 0 < rate < float("inf"):
        raise UserError(f"--learning-rate: of {name} must be a number above 0 (here: {text!r})")
    return rate
