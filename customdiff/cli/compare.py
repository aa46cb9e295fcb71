"""`customdiff compare`: adapters beside one another, or Custom Diffusion beside its baselines."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from customdiff import config
from customdiff.errors import UserError
from customdiff.files import atomic_directory, check_free

if TYPE_CHECKING:
    from customdiff.evaluation.comparison import GradedAdapter
    from customdiff.tracking import Tracker

EXAMPLES = """Examples:

\b
  customdiff compare                                            train each method on data/prepared and grade it
  customdiff compare --methods custom_diffusion,lora --learning-rate lora=5e-4
  customdiff compare joint=models/adapter merged=models/merged  grade existing adapters
  customdiff compare --seeds 3 a=models/adapter b=kept/adapter  from three noise seeds, for narrower intervals
"""
RUNS, PREPARED = Path(".comparison"), Path("data/prepared")


def compare(
    adapters: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME=FOLDER]", help="Adapters to grade (default: train each method first)."),
    ] = None,
    methods: Annotated[
        str, typer.Option(help="Methods to train, separated by commas.")
    ] = "custom_diffusion,textual_inversion,lora",
    learning_rate: Annotated[
        list[str] | None,
        typer.Option(
            metavar="METHOD=RATE", help="Learning rate of a method (default: a multiple of train.learning_rate)."
        ),
    ] = None,
    num_images: Annotated[
        int | None, typer.Option(min=1, help="Images per prompt and noise seed (default: evaluate.num_images).")
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="Noise seeds: base.seed and the next (default: evaluate.seeds).")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the tables and the contact sheet.")] = Path("results/compare"),
) -> None:
    """Compare Custom Diffusion, textual inversion and DreamBooth with LoRA on your own concept, as in the paper.

    All methods get the photos, class images, steps, prompts and seeds of params.yaml; run `dvc repro` first. An
    interrupted training continues, and a complete one is not run again.
    """
    check_free(out, "comparison.csv")
    params = config.with_evaluation(config.load(), num_images=num_images, seeds=seeds)
    rates = {name: _rate(name, text) for name, text in _pairs(learning_rate or [], "--learning-rate").items()}
    folders = {name: Path(folder) for name, folder in _pairs(adapters or [], "NAME=FOLDER").items()}
    wanted = [] if folders else [name.strip() for name in methods.split(",")]

    from customdiff.adapters.config import read_config

    _check_methods(wanted, "--methods")
    _check_methods(rates, "--learning-rate")
    for folder in folders.values():
        read_config(folder)
    from customdiff import provenance, tracking

    title = " · ".join(["compare", "+".join(params.concepts), ", ".join([*folders, *wanted])])
    runs: dict[str, str] = {}
    with tracking.start(params.tracking, title, tags=provenance.run_tags()) as parent:
        graded = _grade(params, folders, {name: rates.get(name) for name in wanted}, parent, runs)
        _write(graded, params, out)
        _track(params, graded, parent, runs, out)
    typer.echo(f"images: {out / 'comparison.jpg'}")


def _grade(
    params: config.Params,
    folders: Mapping[str, Path],
    methods: Mapping[str, float | None],
    parent: "Tracker",
    runs: dict[str, str],
) -> "dict[str, GradedAdapter]":
    """Grade the adapters in `folders`, and those of `methods` (learning rates by name) after training them.

    Args:
        parent, runs: see `_train`.
    """
    from customdiff.evaluation import comparison, drift
    from customdiff.evaluation.base_image_cache import cache_folder
    from customdiff.evaluation.generation import Generation
    from customdiff.evaluation.holdout import read_all
    from customdiff.evaluation.judges import Judges
    from customdiff.evaluation.prompts import read_all_prompts
    from customdiff.sources.instance_images import read_instance_images

    # before hours of training, so that a missing file is reported at once
    prompts = read_all_prompts(params.evaluate.prompts, params.concepts)
    controls = drift.control_prompts(params.evaluate, params.concepts, prompts)
    instances = {name: read_instance_images(Path("data/instances", name)) for name in params.concepts}
    judges = Judges.load(params)
    holdout = read_all(params.concepts, params.download, instances)

    trained = {name: _train(params, name, rate, parent, runs) for name, rate in methods.items()}
    all_folders = {**folders, **{name: folder for name, (folder, _) in trained.items()}}
    generation = Generation(params.base, params.evaluate, params.concepts, cache_folder())
    graded = comparison.grade(generation, all_folders, prompts, instances, judges, holdout, controls)
    for name, (_, facts) in trained.items():
        graded[name].facts.update(facts)
    return graded


def _train(
    params: config.Params, method: str, rate: float | None, parent: "Tracker", runs: dict[str, str]
) -> tuple[Path, dict[str, float]]:
    """Train by one method; returns the adapter's folder and the facts of the training.

    Args:
        parent: run of the comparison.
        runs: gets the id of the training's MLflow run by method, if one is opened.
    """
    from customdiff import provenance, tracking
    from customdiff.evaluation import comparison

    chosen = comparison.params_of(params, method, rate)
    name, tags = tracking.run_name(chosen), provenance.run_tags()

    def tracker_for(run_id: str | None) -> tracking.Tracker:
        if parent.run_id is None:
            return tracking.Tracker()
        if run_id:
            opened = tracking.resume(params.tracking, run_id, name, tags=tags, parent=parent.run_id)
        else:
            opened = tracking.start(params.tracking, name, tags=tags, parent=parent.run_id)
        if opened.run_id:
            runs[method] = opened.run_id
        return opened

    typer.echo(f"{method}: {chosen.train.max_steps} steps at a learning rate of {chosen.train.learning_rate:g}")
    run = comparison.train(chosen, PREPARED, RUNS / method, tracker_for)
    return run.path / "adapter", comparison.facts_of(run, chosen)


def _track(
    params: config.Params,
    graded: "Mapping[str, GradedAdapter]",
    parent: "Tracker",
    runs: Mapping[str, str],
    out: Path,
) -> None:
    """Log the tables and pictures in the run of the comparison, and each adapter's figures in a child."""
    from customdiff import provenance, tracking

    for name, each in graded.items():
        figures = {key: metric.adapter for key, metric in each.summary.overall.items()}
        figures |= {key: figure.value for key, figure in each.summary.figures.get(None, {}).items()}
        values = {"adapter": name} | {key: f"{value:g}" for key, value in each.facts.items()}
        tracking.log_child(
            params.tracking, parent, name, figures, values, run_id=runs.get(name), tags=provenance.run_tags()
        )
    for path in sorted(out.iterdir()):
        parent.artifact(path, "compare")
    parent.description((out / "comparison.md").read_text(encoding="utf-8"))


def _write(graded: "Mapping[str, GradedAdapter]", params: config.Params, out: Path) -> None:
    """Write comparison.csv, comparison.md and comparison.jpg; print the table, and whether adapters differ."""
    from customdiff.evaluation import comparison
    from customdiff.images import save_sheet

    rows = comparison.table(graded)
    sentences = comparison.differences(graded, resamples=params.evaluate.bootstrap, seed=params.base.seed)
    markdown = comparison.markdown(rows) + "".join(f"\n- {sentence}" for sentence in sentences) + "\n"
    with atomic_directory(out) as incoming:
        comparison.write_table(rows, incoming / "comparison.csv")
        (incoming / "comparison.md").write_text(markdown, encoding="utf-8")
        save_sheet(comparison.sheet(graded), incoming / "comparison.jpg")
    typer.echo(markdown)


def _check_methods(names: Iterable[str], option: str) -> None:
    from customdiff.evaluation.comparison import RATES

    for name in names:
        if name not in RATES:
            raise UserError(f"{option}: unknown method {name!r}; use {', '.join(RATES)}")


def _pairs(texts: list[str], what: str) -> dict[str, str]:
    """`a=b` texts as a mapping."""
    found: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise UserError(f"{what}: must be like lora=1e-4 or merged=models/merged (here: {text!r})")
        if name in found:
            raise UserError(f"{what}: {name!r} is given twice; each needs a name of its own")
        found[name] = value
    return found


def _rate(name: str, text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not 0 < rate < float("inf"):
        raise UserError(f"--learning-rate: the rate of {name} must be a number above 0 (here: {text!r})")
    return rate
