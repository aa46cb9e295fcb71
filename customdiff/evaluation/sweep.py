"""Sweep over checkpoints: one training at several of its steps, on the same prompts and seeds.

Text and image alignment pull against each other (paper, section 4): image alignment rises while the subject is learned,
and keeps rising while training images are repeated and prompts forgotten. A sweep shows where one turns into the other.
Alignment with holdout photos, which were not trained on, tells the two apart.
"""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from customdiff.evaluation import drift, report
from customdiff.evaluation.generation import Generation, ImagePair, generate_pairs
from customdiff.evaluation.judges import Judges
from customdiff.evaluation.metrics import IntervalMetric, image_alignment, interval_metric
from customdiff.evaluation.prompts import Prompt
from customdiff.evaluation.scores import HOLDOUT, METRICS, PromptScore, metrics_of, score_prompts

DRIFTS = ("drift", "class_drift")
DELTAS = tuple(f"{name}_delta" for name in METRICS)
FIGURES = (*METRICS, *DELTAS, HOLDOUT)
COLUMNS = ("step", *(f"{name}{end}" for name in (*FIGURES, *DRIFTS) for end in ("", "_low", "_high")))
PROMPT_COLUMNS = ("step", "concept", "prompt", "kind", *FIGURES)


@dataclass(frozen=True)
class Point:
    """One model of a sweep.

    Attributes:
        step: after which it was saved; 0: the base model, which is given the class instead of the token.
        prompts: of its images and values.
        values: by figure, one value per prompt: `METRICS`, of checkpoints also `DELTAS`, and `HOLDOUT` where there are
            holdout photos.
        images: the first image of each prompt.
        by_seed: the same figures by prompt and noise seed, (P, S).
        distances: of a checkpoint's images without the token from the base model's, by prompt; see `drift.distances`.
    """

    step: int
    prompts: list[Prompt]
    values: dict[str, list[float]]
    images: list[Image.Image]
    by_seed: dict[str, np.ndarray] = field(default_factory=dict)
    distances: dict[Prompt, np.ndarray] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """Its name in pictures."""
        return str(self.step) if self.step else "base model"


@dataclass(frozen=True)
class Summary:
    """A model's figures over all concepts, by name: those of `Point.values`, and of checkpoints `DRIFTS`."""

    step: int
    figures: dict[str, IntervalMetric]

    def flat(self) -> dict[str, float]:
        """The figures with their intervals as `_low` and `_high`, as in CSV files and MLflow."""
        values: dict[str, float] = {}
        for name, figure in self.figures.items():
            values |= {name: figure.value, f"{name}_low": figure.low, f"{name}_high": figure.high}
        return values


def sweep(
    generation: Generation,
    checkpoints: Mapping[int, Path],
    prompts: Sequence[Prompt],
    instances: Mapping[str, Sequence[Image.Image]],
    judges: Judges,
    holdout: Mapping[str, Sequence[Image.Image]] | None = None,
    controls: Sequence[Prompt] = (),
) -> list[Point]:
    """Generate and score the base model once, then each checkpoint.

    Args:
        checkpoints: folders by step.
        instances: instance images by concept.
        judges: embed texts and images.
        holdout: photos by concept that were not trained on; None where a concept has none.
        controls: prompts without the token; see `drift.control_prompts`.

    Returns:
        The base model, then the checkpoints in their order.

    Raises:
        UserError: a checkpoint is damaged, or was trained on another base model.
    """
    folders = {f"step {step}": folder for step, folder in checkpoints.items()}
    points: list[Point] = []
    generated = generate_pairs(generation, folders, prompts, controls)
    for step, (_, images) in zip(checkpoints, generated, strict=True):
        pairs = [pair for pair in images if not pair.is_control]
        distances = drift.distances([pair for pair in images if pair.is_control], judges)
        scores = score_prompts(pairs, instances, judges, holdout)
        first = [pair for pair in pairs if pair.is_first]
        if not points:
            points.append(_base_point(scores, first))
        points.append(_checkpoint_point(step, scores, first, distances))
    return points


def _base_point(scores: Sequence[PromptScore], first: Sequence[ImagePair]) -> Point:
    values = {name: [score.base[name] for score in scores] for name in scores[0].base}
    by_seed = {name: np.array([score.by_seed(name)[0] for score in scores]) for name in values}
    return Point(0, [score.prompt for score in scores], values, [pair.base for pair in first], by_seed)


def _checkpoint_point(
    step: int, scores: Sequence[PromptScore], first: Sequence[ImagePair], distances: dict[Prompt, np.ndarray]
) -> Point:
    values = {name: [score.adapter[name] for score in scores] for name in scores[0].adapter}
    by_seed = {name: np.array([score.by_seed(name)[1] for score in scores]) for name in values}
    for name in metrics_of(scores):
        values[f"{name}_delta"] = [score.delta(name) for score in scores]
        by_seed[f"{name}_delta"] = np.array([np.diff(score.by_seed(name), axis=0)[0] for score in scores])
    images = [pair.customized for pair in first]
    return Point(step, [score.prompt for score in scores], values, images, by_seed, distances)


def photo_alignment(
    photos: Mapping[str, Sequence[Image.Image]], instances: Mapping[str, Sequence[Image.Image]], judges: Judges
) -> float:
    """Mean image alignment of real photos with the instance images over concepts: what a perfect model would reach."""
    each = [
        image_alignment(*(judges.clip.images(each[name]) for each in (photos, instances))).mean() for name in photos
    ]
    return float(np.mean(each))


def summarize(point: Point, *, resamples: int, seed: int) -> Summary:
    """Figures over all concepts with 95 % intervals; see `bootstrap_interval`.

    The intervals of `DELTAS`, which are paired with the base model, are the narrower ones.
    """
    labels = dict.fromkeys(prompt.concept_label for prompt in point.prompts if len(prompt.concepts) == 1)
    figures = {}
    for name in FIGURES:
        if name in point.values:
            pairs = list(zip(point.prompts, point.by_seed.get(name, point.values[name]), strict=True))
            groups = [np.array([value for prompt, value in pairs if prompt.concept_label == label]) for label in labels]
            figures[name] = interval_metric(groups, resamples=resamples, seed=seed)
    figures |= drift.distance_figures(point.distances, resamples=resamples, seed=seed)[None]
    return Summary(point.step, figures)


def write_tables(points: Sequence[Point], summaries: Sequence[Summary], folder: Path) -> None:
    """Write sweep.csv, one row per model, and per_prompt.csv, one row per model and prompt; step 0: the base model."""
    rows = [{"step": summary.step, **summary.flat()} for summary in summaries]
    _write_csv(folder / "sweep.csv", COLUMNS, rows)
    prompt_rows = [
        {"step": point.step, "concept": prompt.concept_label, "prompt": prompt.template, "kind": prompt.kind}
        | {name: values[place] for name, values in point.values.items()}
        for point in points
        for place, prompt in enumerate(point.prompts)
    ]
    _write_csv(folder / "per_prompt.csv", PROMPT_COLUMNS, prompt_rows)


def _write_csv(path: Path, columns: Sequence[str], rows: Sequence[Mapping]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        for row in rows:
            writer.writerow({key: f"{value:.6f}" if isinstance(value, float) else value for key, value in row.items()})


def sheet(points: Sequence[Point]) -> Image.Image:
    """All prompts, each from one seed: one row per prompt, one column per model."""
    rows = [
        (prompt.fill(*prompt.concepts), {point.title: point.images[place] for point in points})
        for place, prompt in enumerate(points[0].prompts)
    ]
    return report.image_grid(rows, [point.title for point in points])
