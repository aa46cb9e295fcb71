"""Several adapters beside one another, on the same prompts and seeds; and Custom Diffusion beside its baselines.

The paper's comparison (section 4.1, table 1), on the user's own concept: the same photos, class images, steps, batches,
prompts and seeds for each method of `methods`. Only what trains differs, and the learning rate, since a token's
embedding and a low-rank factor need other ones than the weights themselves.
"""

import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from customdiff.adapters import adapter
from customdiff.config import Params
from customdiff.evaluation import report, scores
from customdiff.evaluation.scores import AND, FIGURES, Pair, Prompt
from customdiff.models import base, sampling
from customdiff.models.clip import Clip
from customdiff.tracking import Tracker
from customdiff.training import trainer
from customdiff.training.checkpoints import RunFolder

# Learning rates as multiples of `train.learning_rate`: those of the defaults of diffusers' scripts for custom
# diffusion (1e-5), textual inversion (5e-4) and DreamBooth with LoRA (1e-4).
RATES = {"custom_diffusion": 1.0, "textual_inversion": 50.0, "lora": 10.0}
COLUMNS = (
    "adapter",
    "concept",
    *(f"{figure}{end}" for figure in FIGURES for end in ("", "_delta", "_delta_low", "_delta_high")),
    "seconds",
    "bytes",
    "trained_parameters",
    "learning_rate",
)


@dataclass(frozen=True)
class Graded:
    """One adapter's images and figures.

    Attributes:
        pairs: each image beside the base model's; of the prompts whose concepts the adapter has learned.
        metrics: as `evaluation.summarize` gives them.
        facts: bytes of its files, and where it was trained here: seconds, trained_parameters, learning_rate.
    """

    pairs: list[Pair]
    metrics: dict
    facts: dict[str, float]


def params_of(params: Params, method: str, learning_rate: float | None = None) -> Params:
    """The parameters of a training by another method, without validation images; all else stays."""
    rate = learning_rate or params.train.learning_rate * RATES[method]
    silent = params.train.validation.model_copy(update={"prompts": []})
    changes = {"method": method, "learning_rate": rate, "validation": silent}
    return params.model_copy(update={"train": params.train.model_copy(update=changes)})


def train(params: Params, prepared: Path, runs: Path, tracker_for: Callable[[str | None], Tracker]) -> RunFolder:
    """A training on the prepared sets, or the finished one with the very same parameters and data."""
    finished = RunFolder.finished(runs, trainer.run_identity(params, prepared, 1))
    return finished or trainer.run(params, prepared, runs, tracker_for)


def facts_of(run: RunFolder, params: Params) -> dict[str, float]:
    """What a finished training says of itself."""
    summary = run.metrics()
    kept = {name: summary[name] for name in ("seconds", "trained_parameters")}
    return kept | {"learning_rate": trainer.learning_rate(params.train, 1)}


def grade(
    adapters: Mapping[str, Path],
    params: Params,
    prompts: Mapping[str, Sequence[Prompt]],
    instances: Mapping[str, Sequence[Image.Image]],
    judge: Clip,
    device: torch.device,
    base_drawn: Path | None = None,
) -> dict[str, Graded]:
    """Draw and grade the base model once, then each adapter in a pipeline of its own.

    Args:
        adapters: folders by the name that the table shows.
        params: the sections `base`, `evaluate` and `concepts`.
        prompts: as `evaluation.all_prompts` gives them; an adapter draws those whose concepts it has learned.
        instances: instance images by concept.
        base_drawn: folder with what the base model drew in the last evaluations; see `drawn.base_images`.

    Raises:
        UserError: an adapter is not whole, or was learned on another base model.
    """
    settings, graded = params.evaluate, {}
    wanted = scores.shots(params, prompts)
    drawn: list[Image.Image] = []
    for name, folder in adapters.items():
        pipe = base.load_pipeline(params.base, dtype=base.DTYPES[settings.precision], device=device)
        sampling.set_scheduler(pipe, settings.scheduler)
        drawn = drawn or scores.take_of_base(pipe, wanted, params, base_drawn)
        known = adapter.load(pipe, folder).adapter_config.concepts
        mine = [place for place, shot in enumerate(wanted) if all(each in known for each in shot.concept.split(AND))]
        chosen = [wanted[place] for place in mine]
        images = scores.take(pipe, chosen, params, scores.customized_subject, name)
        pairs = scores.pairs(chosen, [drawn[place] for place in mine], images, params)
        rows = scores.score(pairs, instances, judge)
        metrics = scores.summarize(rows, resamples=settings.bootstrap, seed=params.base.seed)
        graded[name] = Graded(pairs, metrics, {"bytes": adapter.size(folder)})
    return graded


def table(graded: Mapping[str, Graded]) -> list[dict]:
    """A row for each adapter and concept with the keys of `COLUMNS`; the base model first, which has no changes."""
    rows, base_rows = [], {}
    for name, one in graded.items():
        for concept, found in one.metrics["concepts"].items():
            row = {"adapter": name, "concept": concept, **one.facts}
            for figure in FIGURES:
                low, high = found[f"{figure}_delta_ci95"]
                row |= {figure: found[figure], f"{figure}_delta": found[f"{figure}_delta"]}
                row |= {f"{figure}_delta_low": low, f"{figure}_delta_high": high}
            rows.append(row)
            figures = {figure: found[f"base_{figure}"] for figure in FIGURES}
            base_rows.setdefault(concept, {"adapter": "base model", "concept": concept, **figures})
    return [*base_rows.values(), *rows]


def write_table(rows: Iterable[Mapping], path: Path) -> None:
    """Write the table as CSV, figures with six digits; what a row lacks stays empty."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for row in rows:
            writer.writerow({key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()})


def markdown(rows: Sequence[Mapping]) -> str:
    """The table for people: alignments with the change's 95 % interval, seconds, megabytes."""
    head = ["adapter", "concept", *(figure.replace("_", " ") for figure in FIGURES), "seconds", "MB"]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        measured = [_with_change(row, figure) for figure in FIGURES]
        seconds = f"{row['seconds']:.0f}" if "seconds" in row else ""
        megabytes = f"{row['bytes'] / 1e6:.3f}" if "bytes" in row else ""
        lines.append([row["adapter"], row["concept"], *measured, seconds, megabytes])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def _with_change(row: Mapping, figure: str) -> str:
    if f"{figure}_delta" not in row:
        return f"{row[figure]:.3f}"
    change, low, high = (row[f"{figure}_delta{end}"] for end in ("", "_low", "_high"))
    return f"{row[figure]:.3f} ({change:+.3f}, {low:+.3f} to {high:+.3f})"


def sheet(graded: Mapping[str, Graded]) -> Image.Image:
    """The first image of each prompt: a row a prompt, a column a model, the base model first."""
    labels: dict[tuple[str, str], dict[str, Image.Image]] = {}
    for name, one in graded.items():
        for pair in one.pairs:
            if pair.number == 0:
                row = labels.setdefault((pair.concept, pair.text), {"base model": pair.base})
                row[name] = pair.customized
    return report.side_by_side({text: row for (_, text), row in labels.items()}, ["base model", *graded])
