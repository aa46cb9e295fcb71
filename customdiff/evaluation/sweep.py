"""One training at several of its steps: each checkpoint graded beside the base model, on the same prompts and seeds.

Text and image alignment pull against each other (paper, section 4): image alignment rises as the subject is learned,
and goes on rising while training images are repeated and prompts forgotten. A sweep shows where the one turns into
the other. Alignment to photos that were kept aside from training tells them apart: it is the subject's alone.
"""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from customdiff.adapters import adapter
from customdiff.adapters.adapter import Adapter
from customdiff.config import Params
from customdiff.errors import UserError
from customdiff.evaluation import report, scores
from customdiff.evaluation.metrics import bootstrap_interval, image_alignment
from customdiff.evaluation.report import BASE, CUSTOMIZED, FAINT, INK
from customdiff.evaluation.scores import AND, FIGURES, Pair, Prompt
from customdiff.models import methods
from customdiff.models.clip import Clip
from customdiff.models.text import text_encoders

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

HOLDOUT = "holdout_alignment"
DELTAS = tuple(f"{name}_delta" for name in FIGURES)
COLUMNS = ("step", *(f"{name}{end}" for name in (*FIGURES, *DELTAS, HOLDOUT) for end in ("", "_low", "_high")))
PROMPT_COLUMNS = ("step", "concept", "prompt", "kind", *FIGURES, *DELTAS, HOLDOUT)
WIDTH = 10  # of the picture, inches
PLANE = (370, 230)  # about the size of its largest chart, points of 1/72 inch
PHOTOS = "#3a8f5c"


@dataclass(frozen=True)
class Point:
    """A model's place in a sweep.

    Attributes:
        step: after which it was saved; 0: the base model, which is asked for the class.
        rows: a row a prompt, means over its images: `FIGURES`, for checkpoints `DELTAS`, and `HOLDOUT` where there
            are such photos.
        images: the first image of each prompt, in the order of `rows`.
    """

    step: int
    rows: list[dict]
    images: list[Image.Image]


def sweep(
    pipe: DiffusionPipeline,
    checkpoints: Mapping[int, Path],
    params: Params,
    prompts: Mapping[str, Sequence[Prompt]],
    instances: Mapping[str, Sequence[Image.Image]],
    judge: Clip,
    holdout: Mapping[str, Sequence[Image.Image]] | None = None,
    base_drawn: Path | None = None,
) -> list[Point]:
    """Draw and grade the base model once, then each checkpoint; see `evaluation.draw` and `evaluation.score`.

    Args:
        pipe: the base model with the scheduler to use; holds the last checkpoint afterwards.
        checkpoints: folder by step, of one training.
        params: the sections `evaluate`, `concepts` and `base.seed`.
        prompts, instances: by concept.
        judge: embeds texts and images.
        holdout: by concept, photos that the training has not seen; None where a concept has none.
        base_drawn: folder with what the base model drew in the last evaluations; see `drawn.base_images`.

    Returns:
        The base model, then the checkpoints in their order.

    Raises:
        UserError: a checkpoint is damaged, or was learned on another base model.
    """
    for folder in checkpoints.values():  # before minutes of drawing
        adapter.check_base(pipe, adapter.read(folder))
    wanted = scores.shots(params, prompts)
    first = [place for place, shot in enumerate(wanted) if shot.number == 0]
    before = scores.take_of_base(pipe, wanted, params, base_drawn)
    points: list[Point] = []
    for count, (step, folder) in enumerate(checkpoints.items(), 1):
        learned = adapter.read(folder)
        (replace if points else adapter.inject)(pipe, learned)
        progress = f"step {step} ({count} of {len(checkpoints)})"
        images = scores.take(pipe, wanted, params, scores.customized_subject, progress)
        rows = _score(scores.pairs(wanted, before, images, params), instances, judge, holdout)
        if not points:
            points.append(Point(0, [_of_base(row) for row in rows], [before[place] for place in first]))
        points.append(Point(step, rows, [images[place] for place in first]))
    return points


def _score(pairs: Sequence[Pair], instances: Mapping, judge: Clip, holdout: Mapping | None) -> list[dict]:
    """`evaluation.score`, and image alignment to the photos that were kept aside as well."""
    rows = scores.score(pairs, instances, judge)
    if holdout:
        for row, unseen in zip(rows, scores.score(pairs, holdout, judge), strict=True):
            row |= {f"{end}{HOLDOUT}": unseen[f"{end}image_alignment"] for end in ("", "base_")}
    return rows


def _of_base(row: Mapping) -> dict:
    """The base model's figures of a row that has both."""
    labels = {name: row[name] for name in ("concept", "prompt", "kind")}
    return labels | {name.removeprefix("base_"): value for name, value in row.items() if name.startswith("base_")}


def replace(pipe: DiffusionPipeline, learned: Adapter) -> None:
    """Put an adapter in the place of another of the same training, and verify it: the base model stays loaded.

    Raises:
        UserError: it is not of the same method, layers and tokens as the one in place.
    """
    weights, placed = adapter.full_weights(learned, pipe), methods.trainable(pipe.unet)
    if {name: w.shape for name, w in weights.items()} != {name: w.shape for name, w in placed.items()}:
        raise UserError("the checkpoints are of different trainings: their weights have other names or shapes")
    with torch.no_grad():
        for name, parameter in placed.items():
            parameter.copy_(weights[name])
        for name, (tokenizer, encoder) in text_encoders(pipe).items():
            embedding = encoder.get_input_embeddings()
            tokens = tokenizer.convert_ids_to_tokens(embedding.ids.tolist())
            if set(tokens) != set(learned.embeddings):
                raise UserError(f"the checkpoints are of different trainings: {tokens} and {list(learned.embeddings)}")
            embedding.trained.weight.copy_(torch.stack([learned.embeddings[token][name] for token in tokens]))
    adapter.verify(pipe, learned)


def read_holdout(folder: Path, concepts: Sequence[str]) -> dict[str, list[Image.Image]] | None:
    """The photos below `<folder>/<concept>/`; None unless each concept has some."""
    if not all((folder / name).is_dir() for name in concepts):
        return None
    return {name: scores.read_instances(folder / name) for name in concepts}


def photos_alignment(
    photos: Mapping[str, Sequence[Image.Image]], instances: Mapping[str, Sequence[Image.Image]], judge: Clip
) -> float:
    """Image alignment of real photos to the instance images, the mean over concepts: a perfect model's figure."""
    each = [image_alignment(judge.images(photos[name]), judge.images(instances[name])).mean() for name in photos]
    return float(np.mean(each))


def figures(point: Point, *, resamples: int, seed: int) -> dict[str, float]:
    """A point's figures over all concepts, each with the ends `_low` and `_high` of its 95 % interval over prompts.

    As in `evaluation.summarize`: the mean over concepts of the mean over prompts, resampled within each concept. The
    intervals of `DELTAS`, which are paired with the base model, are the narrower ones.
    """
    concepts = dict.fromkeys(row["concept"] for row in point.rows if AND not in row["concept"])
    found: dict[str, float] = {"step": point.step}
    for name in (*FIGURES, *DELTAS, HOLDOUT):
        if name in point.rows[0]:
            groups = [np.array([row[name] for row in point.rows if row["concept"] == concept]) for concept in concepts]
            low, high = bootstrap_interval(groups, resamples=resamples, seed=seed)
            mean = float(np.mean([group.mean() for group in groups]))
            found |= {name: round(mean, 6), f"{name}_low": round(low, 6), f"{name}_high": round(high, 6)}
    return found


def write_tables(points: Sequence[Point], table: Sequence[Mapping], folder: Path) -> None:
    """Write sweep.csv, a row a model, and per_prompt.csv, a row a model and prompt; step 0 is the base model."""
    rows = [{"step": point.step, **row} for point in points for row in point.rows]
    for name, columns, lines in (("sweep.csv", COLUMNS, table), ("per_prompt.csv", PROMPT_COLUMNS, rows)):
        with open(folder / name, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, restval="", extrasaction="ignore")
            writer.writeheader()
            for line in lines:
                writer.writerow({k: f"{v:.6f}" if isinstance(v, float) else v for k, v in line.items()})


def picture(points: Sequence[Point], table: Sequence[Mapping], photos: float | None = None) -> "Figure":
    """The trade-off, both figures over steps, and below them each concept's first prompt from one seed, as it changes.

    Args:
        points, table: of the base model and the checkpoints; `table` has the `figures` of each.
        photos: `photos_alignment` of those kept aside.
    """
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    rows = points[0].rows
    shown = [place for place, row in enumerate(rows) if row["concept"] not in {r["concept"] for r in rows[:place]}]
    below = len(shown) * (min(1.5, WIDTH / len(points)) + 0.3)
    figure = Figure(figsize=(WIDTH, 4.1 + below), dpi=110, layout="constrained")
    charts, pictures = figure.subfigures(2, 1, height_ratios=[4.1, below])
    panels = charts.subplot_mosaic([["plane", "text"], ["plane", "image"]], width_ratios=[3, 2])
    for axes in panels.values():
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=FAINT, labelsize=8)
        axes.grid(color="#eceef3")
        axes.set_axisbelow(True)
    _draw_plane(panels["plane"], table)
    for name in FIGURES:
        _draw_over_steps(panels[name.partition("_")[0]], table, name)
    panels["text"].tick_params(labelbottom=False)
    panels["image"].set_xlabel("step", fontsize=9)
    if HOLDOUT in table[0]:
        values = [row[HOLDOUT] for row in table[1:]]
        steps = [row["step"] for row in table[1:]]
        panels["image"].plot(steps, values, ":", color=PHOTOS, marker=".", label="to holdout photos")
        panels["image"].legend(frameon=False, fontsize=7, loc="lower right")
    if photos is not None:
        for axes in (panels["plane"], panels["image"]):
            axes.axhline(photos, color=PHOTOS, linewidth=1, linestyle="--", label="holdout photos")
        panels["plane"].legend(frameon=False, fontsize=8, loc="lower left")
    _draw_strip(pictures, points, shown)
    return figure


def _draw_plane(axes: "Axes", table: Sequence[Mapping]) -> None:
    """Image over text alignment: a point a model with its step, its intervals as a cross."""
    from matplotlib.colors import LinearSegmentedColormap

    x, y = FIGURES
    shade = LinearSegmentedColormap.from_list("steps", ["#a9c4f5", "#16377f"])
    colors = [BASE, *(shade(place / max(1, len(table) - 2)) for place in range(len(table) - 1))]
    axes.plot([row[x] for row in table[1:]], [row[y] for row in table[1:]], color=FAINT, linewidth=0.6, alpha=0.5)
    for row, color in zip(table, colors, strict=True):
        axes.hlines(row[y], row[f"{x}_low"], row[f"{x}_high"], color=color, linewidth=0.6, alpha=0.7)
        axes.vlines(row[x], row[f"{y}_low"], row[f"{y}_high"], color=color, linewidth=0.6, alpha=0.7)
        axes.scatter(row[x], row[y], s=30, color=color, marker="o" if row["step"] else "s", zorder=3)
    # where a training has converged its points lie on one another; their labels must not
    ends = np.array([[row[f"{name}_{end}"] for name in FIGURES] for row in table for end in ("low", "high")])
    spots = np.array([[row[name] for name in FIGURES] for row in table]) / np.maximum(np.ptp(ends, axis=0), 1e-9)
    titles = [_title(row["step"]) for row in table]
    for row, title, offset in zip(table, titles, label_offsets(spots * PLANE, titles), strict=True):
        leader = {"arrowstyle": "-", "color": FAINT, "linewidth": 0.4, "shrinkA": 0, "shrinkB": 3}
        place = {"textcoords": "offset points", "ha": "center", "va": "center", "arrowprops": leader, "zorder": 4}
        axes.annotate(title, (row[x], row[y]), offset, fontsize=8, color=INK, **place)
    axes.set_xlabel("text alignment: does it follow the prompt?", fontsize=9)
    axes.set_ylabel("image alignment: does it show the subject?", fontsize=9)


def label_offsets(spots: np.ndarray, labels: Sequence[str]) -> list[tuple[float, float]]:
    """Where to write a label of 8 points beside each spot, so that it covers no other label and no spot.

    Args:
        spots: (N, 2), points of 1/72 inch.

    Returns:
        For each the offset of its middle from its spot: the nearest of those around it that is free.
    """
    around = [
        (distance * np.cos(angle), distance * np.sin(angle))
        for distance in range(14, 120, 8)
        for angle in np.pi / 8 * np.array([2, 0, 6, 8, 4, 14, 10, 12, 1, 3, 5, 7, 9, 11, 13, 15])
    ]
    taken = [(*spot, 4.0) for spot in spots]  # middle, and half a width
    offsets = []
    for spot, label in zip(spots, labels, strict=True):
        half = 2.6 * len(label)
        for offset in around:
            middle = spot + offset
            if all(abs(middle[0] - x) > half + w or abs(middle[1] - y) > 9 for x, y, w in taken):
                break
        taken.append((*middle, half))
        offsets.append(offset)
    return offsets


def _draw_over_steps(axes: "Axes", table: Sequence[Mapping], name: str) -> None:
    """One figure over the steps, its interval as a band, the base model's as a line."""
    steps, values, low, high = (
        [row[key] for row in table[1:]] for key in ("step", name, f"{name}_low", f"{name}_high")
    )
    axes.fill_between(steps, low, high, color=CUSTOMIZED, alpha=0.12)
    axes.plot(steps, values, color=CUSTOMIZED, marker=".", label=name.replace("_", " "))
    axes.axhline(table[0][name], color=BASE, linewidth=1)
    axes.set_title(name.replace("_", " "), fontsize=9, loc="left", color=INK)


def _draw_strip(figure: "SubFigure", points: Sequence[Point], places: Sequence[int]) -> None:
    """A row for each prompt at `places`, a column a model, each from one seed."""
    grid = figure.subplots(len(places), len(points), squeeze=False)
    for line, place in zip(grid, places, strict=True):
        for axes, point in zip(line, points, strict=True):
            axes.imshow(point.images[place].convert("RGB"), interpolation="bilinear")
            axes.set_axis_off()
            axes.set_title(_title(point.step), fontsize=8, color=INK)
        words = line[0].annotate(
            _words(points[0].rows[place]),
            (0, 0),
            (0, -4),
            xycoords="axes fraction",
            textcoords="offset points",
            va="top",
            fontsize=8,
            color=FAINT,
        )
        words.set_in_layout(False)  # else it widens its column


def sheet(points: Sequence[Point]) -> Image.Image:
    """All prompts, each from one seed, as they change over the steps."""
    rows = {
        _words(row): {_title(point.step): point.images[place] for point in points}
        for place, row in enumerate(points[0].rows)
    }
    return report.side_by_side(rows, [_title(point.step) for point in points])


def _words(row: Mapping) -> str:
    """A row's prompt about its concepts, by the names that they have in params.yaml."""
    return Prompt(row["prompt"]).of(*row["concept"].split(AND))


def _title(step: int) -> str:
    return str(step) if step else "base model"
