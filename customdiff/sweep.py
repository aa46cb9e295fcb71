"""One training at several of its steps: each checkpoint graded beside the base model, on the same prompts and seeds.

Text and image alignment pull against each other (paper, section 4): image alignment rises as the subject is learned,
and goes on rising while training images are repeated and prompts forgotten. A sweep shows where the one turns into
the other. Alignment to photos that were kept aside from training tells them apart: it is the subject's alone.
"""

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageDraw, ImageFont, ImageOps

from customdiff import adapter, base, evaluation, methods
from customdiff.adapter import Adapter
from customdiff.clip import Clip
from customdiff.errors import UserError
from customdiff.evaluation import FIGURES, Pair, Prompt, customized_subject
from customdiff.metrics import bootstrap_interval, image_alignment, without_token
from customdiff.params import Concept, Params
from customdiff.report import BASE, CUSTOMIZED, FAINT, INK
from customdiff.sampling import generate, image_seed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KEPT_ASIDE = "kept_aside_alignment"
DELTAS = tuple(f"{name}_delta" for name in FIGURES)
COLUMNS = ("step", *(f"{name}{end}" for name in (*FIGURES, *DELTAS, KEPT_ASIDE) for end in ("", "_low", "_high")))
PROMPT_COLUMNS = ("step", "concept", "prompt", "kind", *FIGURES, *DELTAS, KEPT_ASIDE)
WIDTH, GAP, LINE = 1120, 6, 22  # px


class Shot(NamedTuple):
    """One image that every model of a sweep draws."""

    concept: str
    prompt: Prompt
    number: int
    seed: int


@dataclass(frozen=True)
class Point:
    """A model's place in a sweep.

    Attributes:
        step: after which it was saved; 0: the base model, which is asked for the class.
        rows: a row a prompt, means over its images: `FIGURES`, for checkpoints `DELTAS`, and `KEPT_ASIDE` where there
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
    kept_aside: Mapping[str, Sequence[Image.Image]] | None = None,
) -> list[Point]:
    """Draw and grade the base model once, then each checkpoint; see `evaluation.draw` and `evaluation.score`.

    Args:
        pipe: the base model with the scheduler to use; holds the last checkpoint afterwards.
        checkpoints: folder by step, of one training.
        params: the sections `evaluate`, `concepts` and `base.seed`.
        prompts, instances: by concept.
        judge: embeds texts and images.
        kept_aside: by concept, photos that the training has not seen; None where a concept has none.

    Returns:
        The base model, then the checkpoints in their order.

    Raises:
        UserError: a checkpoint is damaged, or was learned on another base model.
    """
    wanted = shots(params, prompts)
    first = [place for place, shot in enumerate(wanted) if shot.number == 0]
    before = draw(pipe, wanted, params, lambda concept: concept.class_prompt, "base model")
    points: list[Point] = []
    for count, (step, folder) in enumerate(checkpoints.items(), 1):
        learned = adapter.read(folder)
        (replace if points else adapter.put)(pipe, learned)
        images = draw(pipe, wanted, params, customized_subject, f"step {step} ({count} of {len(checkpoints)})")
        rows = _score(_pairs(wanted, before, images, params), instances, judge, kept_aside)
        if not points:
            points.append(Point(0, [_of_base(row) for row in rows], [before[place] for place in first]))
        points.append(Point(step, rows, [images[place] for place in first]))
    return points


def _pairs(wanted: Sequence[Shot], before: Sequence, images: Sequence, params: Params) -> list[Pair]:
    pairs = []
    for shot, *both in zip(wanted, before, images, strict=True):
        concept = params.concepts[shot.concept]
        text = without_token(shot.prompt.of(customized_subject(concept)), concept.modifier_token)
        pairs.append(Pair(shot.concept, shot.prompt, text, shot.number, *both))
    return pairs


def _score(pairs: Sequence[Pair], instances: Mapping, judge: Clip, kept_aside: Mapping | None) -> list[dict]:
    """`evaluation.score`, and image alignment to the photos that were kept aside as well."""
    rows = evaluation.score(pairs, instances, judge)
    if kept_aside:
        for row, unseen in zip(rows, evaluation.score(pairs, kept_aside, judge), strict=True):
            row |= {f"{end}{KEPT_ASIDE}": unseen[f"{end}image_alignment"] for end in ("", "base_")}
    return rows


def _of_base(row: Mapping) -> dict:
    """The base model's figures of a row that has both."""
    labels = {name: row[name] for name in ("concept", "prompt", "kind")}
    return labels | {name.removeprefix("base_"): value for name, value in row.items() if name.startswith("base_")}


def shots(params: Params, prompts: Mapping[str, Sequence[Prompt]]) -> list[Shot]:
    """The images that `evaluation.draw` draws, with its seeds."""
    return [
        Shot(name, prompt, number, image_seed(params.base.seed, name, prompt.template, number))
        for name in params.concepts
        for prompt in prompts[name]
        for number in range(params.evaluate.num_images)
    ]


def draw(
    pipe: DiffusionPipeline,
    wanted: Sequence[Shot],
    params: Params,
    subject: Callable[[Concept], str],
    progress: str | None = None,
) -> list[Image.Image]:
    """Draw each shot with the pipeline as it is; `subject` says what {} stands for."""
    settings = params.evaluate
    return generate(
        pipe,
        [shot.prompt.of(subject(params.concepts[shot.concept])) for shot in wanted],
        [shot.seed for shot in wanted],
        steps=settings.steps,
        guidance_scale=settings.guidance_scale,
        eta=settings.eta,
        batch_size=settings.batch_size,
        progress=progress,
    )


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
        for name, (tokenizer, encoder) in base.text_encoders(pipe).items():
            embedding = encoder.get_input_embeddings()
            tokens = tokenizer.convert_ids_to_tokens(embedding.ids.tolist())
            if set(tokens) != set(learned.rows):
                raise UserError(f"the checkpoints are of different trainings: {tokens} and {list(learned.rows)}")
            embedding.rows.weight.copy_(torch.stack([learned.rows[token][name] for token in tokens]))
    adapter.verify(pipe, learned)


def read_kept_aside(folder: Path, concepts: Sequence[str]) -> dict[str, list[Image.Image]] | None:
    """The photos below `<folder>/<concept>/`; None unless each concept has some."""
    if not all((folder / name).is_dir() for name in concepts):
        return None
    return {name: evaluation.read_instances(folder / name) for name in concepts}


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
    concepts = dict.fromkeys(row["concept"] for row in point.rows)
    found: dict[str, float] = {"step": point.step}
    for name in (*FIGURES, *DELTAS, KEPT_ASIDE):
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


def picture(points: Sequence[Point], table: Sequence[Mapping], photos: float | None = None) -> Image.Image:
    """The trade-off as a chart, and below it a strip: each concept's first prompt, from one seed, a column a step.

    Args:
        points, table: of the base model and the checkpoints; `table` has the `figures` of each.
        photos: `photos_alignment` of the photos that were kept aside.
    """
    rows = points[0].rows
    firsts = [place for place, row in enumerate(rows) if row["concept"] not in {r["concept"] for r in rows[:place]}]
    parts = [_rasterized(chart(table, photos)), strip(points, firsts)]
    sheet = Image.new("RGB", (max(part.width for part in parts), sum(part.height for part in parts)), "white")
    sheet.paste(parts[0], (0, 0))
    sheet.paste(parts[1], (0, parts[0].height))
    return sheet


def chart(table: Sequence[Mapping], photos: float | None = None) -> "Figure":
    """Image over text alignment, a point a checkpoint with its step and its intervals; beside it, both over steps."""
    import matplotlib
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    start, *learned = table
    steps = [row["step"] for row in learned]
    figure = Figure(figsize=(WIDTH / 112, 4.1), dpi=112, layout="constrained")
    panels = figure.subplot_mosaic([["plane", "text"], ["plane", "image"]], width_ratios=[3, 2])
    for axes in panels.values():
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=FAINT, labelsize=8)
        axes.grid(color="#eceef3")
        axes.set_axisbelow(True)

    plane, (x, y) = panels["plane"], FIGURES
    shades = matplotlib.colors.LinearSegmentedColormap.from_list("steps", ["#a9c4f5", "#16377f"])
    colors = [shades(place / max(1, len(steps) - 1)) for place in range(len(steps))]
    plane.plot([row[x] for row in learned], [row[y] for row in learned], color=FAINT, linewidth=0.6, alpha=0.5)
    for row, color, label in zip(table, [BASE, *colors], ["base model", *steps], strict=True):
        plane.hlines(row[y], row[f"{x}_low"], row[f"{x}_high"], color=color, linewidth=0.6, alpha=0.7)
        plane.vlines(row[x], row[f"{y}_low"], row[f"{y}_high"], color=color, linewidth=0.6, alpha=0.7)
        plane.scatter(row[x], row[y], s=30, color=color, marker="o" if row["step"] else "s", zorder=3)
        plane.annotate(str(label), (row[x], row[y]), (5, 5), textcoords="offset points", fontsize=8, color=INK)
    plane.set_xlabel("text alignment: does it follow the prompt?", fontsize=9)
    plane.set_ylabel("image alignment: does it show the subject?", fontsize=9)

    for name in FIGURES:
        axes = panels[name.partition("_")[0]]
        axes.fill_between(
            steps,
            [r[f"{name}_low"] for r in learned],
            [r[f"{name}_high"] for r in learned],
            color=CUSTOMIZED,
            alpha=0.12,
        )
        axes.plot(steps, [row[name] for row in learned], color=CUSTOMIZED, marker="o", markersize=3, label=None)
        axes.axhline(start[name], color=BASE, linewidth=1)
        axes.set_title(name.replace("_", " "), fontsize=9, loc="left", color=INK)
    if KEPT_ASIDE in start:
        panels["image"].plot(steps, [row[KEPT_ASIDE] for row in learned], color="#d9822b", marker="o", markersize=3)
    panels["text"].tick_params(labelbottom=False)
    panels["image"].set_xlabel("step", fontsize=9)
    if photos is not None:
        for axes in (plane, panels["image"]):
            axes.axhline(photos, color="#3a8f5c", linewidth=1, linestyle="--")
        plane.annotate(
            "photos kept aside",
            (0.01, photos),
            (0, 3),
            xycoords=plane.get_yaxis_transform(),
            fontsize=8,
            textcoords="offset points",
            color="#3a8f5c",
        )
    return figure


def _rasterized(figure: "Figure") -> Image.Image:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer).convert("RGB")


def strip(points: Sequence[Point], places: Sequence[int]) -> Image.Image:
    """Pictures: a row for each prompt at `places`, a column a model, each from one seed."""
    side = min(160, max(48, WIDTH // len(points) - GAP))
    height = LINE + len(places) * (LINE + side + GAP) + GAP
    sheet = Image.new("RGB", (max(WIDTH, GAP + len(points) * (side + GAP)), height), "white")
    pen, font, small = ImageDraw.Draw(sheet), ImageFont.load_default(13), ImageFont.load_default(12)
    for column, point in enumerate(points):
        left = GAP + column * (side + GAP)
        pen.text((left, 3), f"step {point.step}" if point.step else "base model", INK, font)
        for row, place in enumerate(places):
            image = ImageOps.contain(point.images[place].convert("RGB"), (side, side))
            sheet.paste(image, (left, LINE + row * (LINE + side + GAP) + LINE))
    for row, place in enumerate(places):
        top = LINE + row * (LINE + side + GAP)
        pen.text((GAP, top + 3), points[0].rows[place]["prompt"].replace("{}", "..."), FAINT, small)
    return sheet
