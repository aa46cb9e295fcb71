"""Comparison of adapters on the same prompts and seeds, and of Custom Diffusion with its baselines.

The paper's comparison (section 4.1, table 1) on the user's own concept: every method gets the same photos, class
images, steps, batches, prompts and seeds. Methods differ in what trains and in the learning rate, since token
embeddings and low-rank factors need other rates than weights do.
"""

import csv
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from customdiff.adapters import adapter
from customdiff.config import Params
from customdiff.evaluation import drift, report
from customdiff.evaluation.generation import Generation, ImagePair, generate_pairs
from customdiff.evaluation.holdout import Holdout, figures
from customdiff.evaluation.judges import Judges
from customdiff.evaluation.metrics import IntervalMetric, PairedMetric, PhotoShare, paired_metric
from customdiff.evaluation.prompts import Prompt
from customdiff.evaluation.scores import (
    METRICS,
    PromptScore,
    Summary,
    metrics_of,
    photo_ceilings,
    score_prompts,
    summarize,
)
from customdiff.tracking import Tracker
from customdiff.training import trainer
from customdiff.training.checkpoints import RunFolder
from customdiff.training.identity import run_identity
from customdiff.training.objective import learning_rates

# Learning rates as multiples of `train.learning_rate`: the defaults of diffusers' scripts for Custom Diffusion (1e-5),
# textual inversion (5e-4) and DreamBooth with LoRA (1e-4).
RATES = {"custom_diffusion": 1.0, "textual_inversion": 50.0, "lora": 10.0}
INTERVAL = ("delta", "delta_low", "delta_high")
DRIFTS = ("drift", "class_drift")
FACTS = ("seconds", "bytes", "trained_parameters", "learning_rate")
COLUMNS = (
    "adapter",
    "concept",
    *(f"{name}{end}" for name in METRICS for end in ("", "_delta", "_delta_low", "_delta_high")),
    *(f"{name}{end}" for name in DRIFTS for end in ("", "_low", "_high")),
    "holdout_share",
    "photo_share",
    *FACTS,
)


@dataclass(frozen=True)
class GradedAdapter:
    """One adapter's images and metrics.

    Attributes:
        pairs: its images beside the base model's, of the prompts whose concepts it has learned.
        summary: its metrics.
        scores: its metrics by prompt.
        distances: of its images without the token from the base model's, by prompt; see `drift.distances`.
        facts: `bytes` of its files, and of a training here `seconds`, `trained_parameters` and `learning_rate`.
    """

    pairs: list[ImagePair]
    summary: Summary
    facts: dict[str, float]
    scores: list[PromptScore] = field(default_factory=list)
    distances: dict[Prompt, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One line of the comparison: a model and a concept.

    Attributes:
        metrics: by name.
        facts: see `GradedAdapter`; empty for the base model.
        share: of the way from the base model to the photos; None for the base model, and where it is unknown.
        drifts: those of `DRIFTS` that are known; empty for the base model.
    """

    model: str
    concept: str
    metrics: dict[str, PairedMetric]
    facts: dict[str, float]
    is_base: bool = False
    share: PhotoShare | None = None
    drifts: Mapping[str, IntervalMetric] = field(default_factory=dict)

    def value(self, metric: str) -> float:
        """The model's own value of a metric."""
        found = self.metrics[metric]
        return found.base if self.is_base else found.adapter


def params_of(params: Params, method: str, rate: float | None = None) -> Params:
    """The parameters of a training by another method, to its last step and without images; all else is the same."""
    silent = params.train.validation.model_copy(update={"prompts": []})
    changes = {
        "method": method,
        "learning_rate": rate or params.train.learning_rate * RATES[method],
        "token_learning_rate": params.train.token_learning_rate if method == "custom_diffusion" else None,
        "validation": silent,
        "select": "last",
        "patience": None,
    }
    return params.model_copy(update={"train": params.train.model_copy(update=changes)})


def train(params: Params, prepared: Path, runs: Path, tracker_for: Callable[[str | None], Tracker]) -> RunFolder:
    """Train on the prepared sets, or return the complete run with the same parameters, data and code."""
    complete = RunFolder.finished(runs, run_identity(params, prepared, 1))
    return complete or trainer.run(params, prepared, runs, tracker_for)


def facts_of(run: RunFolder, params: Params) -> dict[str, float]:
    """Seconds, trained parameters and learning rate of a complete run."""
    summary = run.metrics()
    kept = {name: summary[name] for name in ("seconds", "trained_parameters")}
    return kept | {"learning_rate": learning_rates(params.train, 1)[0]}


def grade(
    generation: Generation,
    adapters: Mapping[str, Path],
    prompts: Sequence[Prompt],
    instances: Mapping[str, Sequence[Image.Image]],
    judges: Judges,
    holdout: Mapping[str, Holdout] | None = None,
    controls: Sequence[Prompt] = (),
) -> dict[str, GradedAdapter]:
    """Generate and score the base model once, then each adapter.

    Args:
        adapters: folders by the name that the table shows.
        instances: instance images by concept.
        holdout: holdout photos by concept.
        controls: prompts without the token; see `drift.control_prompts`.

    Raises:
        UserError: an adapter is damaged, or was trained on another base model.
    """
    graded, ceilings = {}, photo_ceilings(instances, judges)
    photos = figures(holdout or {}, instances, judges)
    for name, generated in generate_pairs(generation, adapters, prompts, controls):
        pairs = [pair for pair in generated if not pair.is_control]
        scores = score_prompts(pairs, instances, judges)
        distances = drift.distances([pair for pair in generated if pair.is_control], judges)
        resampled = {"resamples": generation.settings.bootstrap, "seed": generation.base.seed}
        drifts = drift.distance_figures(distances, **resampled)
        summary = summarize(scores, len(pairs), **resampled, ceilings=ceilings, holdout=photos, figures=drifts)
        graded[name] = GradedAdapter(pairs, summary, {"bytes": adapter.size(adapters[name])}, scores, distances)
    return graded


def table(graded: Mapping[str, GradedAdapter]) -> list[Row]:
    """A row for each model and concept; first the base model."""
    rows: list[Row] = []
    base_rows: dict[str, Row] = {}
    for name, each in graded.items():
        for concept, metrics in each.summary.concepts.items():
            share, figures = each.summary.photo_share(concept), each.summary.figures
            overall = {key: figure for key, figure in figures.get(None, {}).items() if key == "drift"}
            drifts = overall | dict(figures.get(concept, {}))
            rows.append(Row(name, concept, metrics, each.facts, share=share, drifts=drifts))
            base_rows.setdefault(concept, Row("base model", concept, metrics, {}, is_base=True))
    return [*base_rows.values(), *rows]


def write_table(rows: Sequence[Row], path: Path) -> None:
    """Write the comparison as CSV with the columns `COLUMNS`, six digits; what a row lacks is empty."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        for row in rows:
            values: dict[str, object] = {"adapter": row.model, "concept": row.concept, **row.facts}
            if row.share:
                values[row.share.name] = row.share.value
            for name, figure in row.drifts.items():
                values |= {name: figure.value, f"{name}_low": figure.low, f"{name}_high": figure.high}
            for name, metric in row.metrics.items():
                values[name] = row.value(name)
                if not row.is_base:
                    values |= {f"{name}_{end}": getattr(metric, end) for end in INTERVAL}
            writer.writerow({key: f"{each:.6g}" if isinstance(each, float) else each for key, each in values.items()})


def markdown(rows: Sequence[Row]) -> str:
    """The comparison as a Markdown table: metrics with change and interval, drift, way to the photos, seconds, MB."""
    names = [name for name in METRICS if all(name in row.metrics for row in rows)]
    drifts = [name for name in DRIFTS if any(name in row.drifts for row in rows)]
    words = [name.replace("_", " ") for name in (*names, *drifts)]
    head = ["adapter", "concept", *words, "way to the photos", "seconds", "MB"]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        metrics = [_with_change(row, name) for name in names] + [_with_interval(row, name) for name in drifts]
        share = f"{100 * row.share.value:.0f} %" if row.share else ""
        seconds = f"{row.facts['seconds']:.0f}" if "seconds" in row.facts else ""
        megabytes = f"{row.facts['bytes'] / 1e6:.3f}" if "bytes" in row.facts else ""
        lines.append([row.model, row.concept, *metrics, share, seconds, megabytes])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def differences(graded: Mapping[str, GradedAdapter], *, resamples: int, seed: int) -> list[str]:
    """For each two adapters, one sentence per figure: whether they differ on the prompts of the concepts of both.

    The interval is a paired bootstrap over prompts, and with several noise seeds over seeds within prompts
    (`bootstrap_interval`); it does not cover other trainings. Prompts that show several concepts do not count.
    """
    sentences = []
    for first, second in itertools.combinations(graded, 2):
        one, other = (_values(graded[name]) for name in (first, second))
        for figure in [name for name in (*METRICS, *DRIFTS) if name in one and name in other]:
            groups: dict[str, list[Prompt]] = {}
            for prompt in one[figure]:
                if prompt in other[figure]:
                    groups.setdefault(prompt.concept_label, []).append(prompt)
            if groups:
                before, after = (
                    [np.array([values[figure][prompt] for prompt in group]) for group in groups.values()]
                    for values in (other, one)
                )
                found = paired_metric(before, after, resamples=resamples, seed=seed)
                if all(group.size == 1 for group in after):
                    difference = f"{first} minus {second} is {found.delta:+.3f} (one image has no interval)."
                    sentences.append(f"{figure.replace('_', ' ')}: {difference}")
                else:
                    sentences.append(_sentence(first, second, figure, found))
    return sentences


def _values(each: GradedAdapter) -> dict[str, dict[Prompt, np.ndarray]]:
    """By figure and prompt the values of an adapter by noise seed, (S,); without diversity, which is good near the base
    model's."""
    single = [score for score in each.scores if len(score.prompt.concepts) == 1]
    values = {
        metric: {score.prompt: score.by_seed(metric)[1] for score in single}
        for metric in metrics_of(single)
        if metric != "diversity"
    }
    values["drift"] = {prompt: found for prompt, found in each.distances.items() if not prompt.concepts}
    values["class_drift"] = {prompt: found for prompt, found in each.distances.items() if prompt.concepts}
    return values


def _sentence(first: str, second: str, figure: str, found: PairedMetric) -> str:
    """`found`: the first minus the second."""
    name = figure.replace("_", " ")
    ends = (found.delta_low, found.delta_high)
    if found.delta_low <= 0 <= found.delta_high:
        return f"{name}: no difference can be told between {first} and {second} ({ends[0]:+.3f} to {ends[1]:+.3f})."
    order, sign = ("higher", 1) if found.delta > 0 else ("lower", -1)
    low, high = sorted(sign * end for end in ends)
    return f"{name}: {first} is {order} than {second} by {sign * found.delta:.3f} ({low:.3f} to {high:.3f})."


def _with_change(row: Row, name: str) -> str:
    metric = row.metrics[name]
    if row.is_base:
        return f"{metric.base:.3f}"
    return f"{metric.adapter:.3f} ({metric.delta:+.3f}, {metric.delta_low:+.3f} to {metric.delta_high:+.3f})"


def _with_interval(row: Row, name: str) -> str:
    figure = row.drifts.get(name)
    return f"{figure.value:.3f} ({figure.low:.3f} to {figure.high:.3f})" if figure else ""


def sheet(graded: Mapping[str, GradedAdapter]) -> Image.Image:
    """The first image of each prompt: one row per prompt, one column per model, the base model first."""
    rows: dict[Prompt, tuple[str, dict[str, Image.Image]]] = {}
    for name, each in graded.items():
        for pair in each.pairs:
            if pair.is_first:
                _, images = rows.setdefault(pair.prompt, (pair.text, {"base model": pair.base}))
                images[name] = pair.customized
    return report.image_grid(list(rows.values()), ["base model", *graded])
