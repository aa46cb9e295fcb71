"""`customdiff sweep` and `customdiff checkpoints`: one training at several of its steps."""

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from customdiff import config
from customdiff.errors import UserError
from customdiff.files import atomic_directory, check_free

if TYPE_CHECKING:
    from customdiff.evaluation import sweep as sweeps
    from customdiff.training.checkpoints import RunFolder

# shows the sweep in `dvc plots show`
DVC_PLOTS = """\
plots:
  - Trade-off over checkpoints:
      template: trade_off
      x: text_alignment
      y: {sweep.csv: image_alignment}
"""
EXAMPLES = """Examples:

\b
  customdiff sweep                                  all checkpoints of the latest training
  customdiff sweep --steps 50,150,250 --num-images 2
  customdiff sweep --run kept/first-try --out results/first-try

params.yaml sets which checkpoints a training keeps; see docs/checkpoints.md.
"""


def sweep(
    run: Annotated[
        Path | None, typer.Option(help="Folder of a training run (default: the latest run in .checkpoints).")
    ] = None,
    steps: Annotated[
        str | None, typer.Option(help="Steps to grade, such as 50,100,150 (default: all checkpoints of the run).")
    ] = None,
    num_images: Annotated[
        int | None, typer.Option(min=1, help="Images per prompt, noise seed and model (default: evaluate.num_images).")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the tables and pictures.")] = Path("results/sweep"),
) -> None:
    """Grade checkpoints of a training beside the base model: how long to train, and where overfitting begins.

    Prompts, seeds and settings are those of section `evaluate` in params.yaml.
    """
    wanted = _steps(steps)
    check_free(out, "sweep.csv")
    _check_any_checkpoints(run)
    params = config.with_evaluation(config.load(), num_images=num_images)

    from customdiff.training import checkpoints

    folder = checkpoints.find_run(run)
    paths = [folder.checkpoint(step) for step in wanted] if wanted else folder.checkpoints()
    typer.echo(f"{folder.path}: steps {', '.join(str(checkpoints.step_of(path)) for path in paths)}")
    summaries = _grade(params, folder, paths, out)
    typer.echo(f"picture: {out / 'trade_off.png'}")
    _track(params, folder, summaries, out)


def _check_any_checkpoints(run: Path | None) -> None:
    """Refuse to start without a checkpoint, before the slow imports; `checkpoints.find_run` checks the rest.

    Raises:
        UserError: there is no folder of a checkpoint in `run`, or in any run.
    """
    if not any(run.glob("step-*") if run else Path(".checkpoints").glob("*/step-*")):
        raise UserError(
            f"{run or '.checkpoints'}: no checkpoints; `dvc repro` writes one every train.checkpointing_steps steps, "
            "but not if DVC restores the training from its cache (docs/checkpoints.md)"
        )


def _grade(params: config.Params, run: "RunFolder", paths: list[Path], out: Path) -> "list[sweeps.Summary]":
    """Grade the checkpoints at `paths` and write the results; returns the base model's summary, then theirs."""
    from customdiff.adapters.config import read_config
    from customdiff.evaluation import drift, scores, trade_off
    from customdiff.evaluation import sweep as sweeps
    from customdiff.evaluation.base_image_cache import cache_folder
    from customdiff.evaluation.generation import Generation
    from customdiff.evaluation.holdout import read_all
    from customdiff.evaluation.judges import Judges
    from customdiff.evaluation.prompts import read_all_prompts
    from customdiff.images import save_sheet
    from customdiff.sources.instance_images import read_instance_images
    from customdiff.training.checkpoints import step_of

    settings, concepts = params.evaluate, params.concepts
    scores.check_concepts(read_config(paths[0]), concepts)
    prompts = read_all_prompts(settings.prompts, concepts)
    instances = {name: read_instance_images(Path("data/instances", name)) for name in concepts}
    controls = drift.control_prompts(settings, concepts, prompts)
    kept_out = read_all(concepts, params.download, instances)
    # only with photos of every concept, as the figures are means over concepts
    photos = {name: each.images for name, each in kept_out.items()} if len(kept_out) == len(concepts) else None
    judges = Judges.load(params)

    started = time.perf_counter()
    generation = Generation(params.base, settings, concepts, cache_folder())
    folders = {step_of(path): path for path in paths}
    points = sweeps.sweep(generation, folders, prompts, instances, judges, photos, controls)
    summaries = [sweeps.summarize(point, resamples=settings.bootstrap, seed=params.base.seed) for point in points]
    ceiling = sweeps.photo_alignment(photos, instances, judges) if photos else None
    metrics = {
        "run": str(run.path),
        "base": summaries[0].flat(),
        "steps": {str(summary.step): summary.flat() for summary in summaries[1:]},
        "holdout_photos": ceiling,
        "num_prompts": len(prompts),
        "num_images": len(prompts) * settings.num_images * settings.seeds,
        "seconds": round(time.perf_counter() - started, 1),
    }
    with atomic_directory(out) as incoming:
        (incoming / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
        (incoming / "dvc.yaml").write_text(DVC_PLOTS, encoding="utf-8")
        sweeps.write_tables(points, summaries, incoming)
        trade_off.picture(points, summaries, ceiling).savefig(incoming / "trade_off.png")
        save_sheet(sweeps.sheet(points), incoming / "prompts.jpg")
    return summaries


def _track(params: config.Params, run: "RunFolder", summaries: "list[sweeps.Summary]", out: Path) -> None:
    """Log the sweep as an MLflow run with a child for each checkpoint; the run of the training stays as it is."""
    from customdiff import provenance, tracking

    training_run, tags = run.run_id(), provenance.run_tags()
    own = {tracking.TRAINING_RUN: training_run} if training_run else {}
    name = tracking.run_name(params, f"sweep over {len(summaries) - 1} checkpoints")
    with tracking.start(params.tracking, name, tags=tags | own) as parent:
        parent.params(params, evaluation=True)
        models = tracking.checkpoint_models(parent, training_run)
        for summary in summaries[1:]:
            figures = {key: figure.value for key, figure in summary.figures.items()}
            parent.metrics(figures, summary.step, group=tracking.EVALUATION)
            tracking.log_child(
                params.tracking,
                parent,
                f"step {summary.step}",
                figures,
                {"step": str(summary.step)},
                model_id=models.get(summary.step),
                tags=tags,
            )
        for path in sorted(out.iterdir()):
            parent.artifact(path, "sweep")


def checkpoints() -> None:
    """List the trainings that have checkpoints, latest first, and the steps of each with their scores, if graded."""
    _check_any_checkpoints(None)
    from customdiff.adapters import adapter
    from customdiff.training import checkpoints as folders

    folders.find_run()
    for run in folders.find_runs():
        paths = run.checkpoints()
        adapter_config = adapter.read_config(paths[-1])
        words = ", ".join(adapter_config.tokens)
        done = folders.step_of(paths[-1])
        state = "complete" if (run.path / folders.COMPLETE).exists() else f"{done} of {run.max_steps} steps"
        begun = time.strftime("%Y-%m-%d %H:%M", time.localtime(folders.last_opened(run)))
        typer.echo(f"{run.path}  {begun}  {words} on {adapter_config.base.model}, {adapter_config.method}, {state}")
        scores = {folders.step_of(path): folders.score_of(path) for path in paths}
        steps = (str(step) if score is None else f"{step} (score {score:.3f})" for step, score in scores.items())
        typer.echo(f"  steps {', '.join(steps)}")


def _steps(text: str | None) -> list[int]:
    """The numbers in "50,100", in order and once each."""
    parts = text.replace(" ", "").split(",") if text else []
    if not all(part.isdecimal() for part in parts):
        raise UserError(f"--steps: must be numbers separated by commas, such as 50,100 (here: {text!r})")
    return sorted({int(part) for part in parts})
