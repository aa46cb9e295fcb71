"""Picture of a sweep: image over text alignment, both over steps, and each concept's first prompt as it changes."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from customdiff.evaluation.report import BASE, CUSTOMIZED, FAINT, INK, PLANE
from customdiff.evaluation.scores import HOLDOUT
from customdiff.evaluation.sweep import Point, Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

WIDTH = 10  # inches
CHARTS_HEIGHT = 4.1  # inches
PHOTOS = "#3a8f5c"


def picture(points: Sequence[Point], summaries: Sequence[Summary], photos: float | None = None) -> "Figure":
    """The trade-off of a sweep.

    Args:
        points, summaries: of the base model and the checkpoints.
        photos: image alignment of the holdout photos; see `sweep.photo_alignment`.
    """
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    prompts = points[0].prompts
    labels = [prompt.concept_label for prompt in prompts]
    shown = [labels.index(label) for label in dict.fromkeys(labels)]
    below = len(shown) * (min(1.5, WIDTH / len(points)) + 0.3)
    figure = Figure(figsize=(WIDTH, CHARTS_HEIGHT + below), dpi=110, layout="constrained")
    charts, pictures = list(figure.subfigures(2, 1, squeeze=False, height_ratios=[CHARTS_HEIGHT, below]).flat)
    panels = charts.subplot_mosaic([["plane", "text"], ["plane", "image"]], width_ratios=[3, 2])
    for axes in panels.values():
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=FAINT, labelsize=8)
        axes.grid(color="#eceef3")
        axes.set_axisbelow(True)
    _draw_plane(panels["plane"], summaries)
    for name in PLANE:
        _draw_over_steps(panels[name.partition("_")[0]], summaries, name)
    panels["text"].tick_params(labelbottom=False)
    panels["image"].set_xlabel("step", fontsize=9)
    if HOLDOUT in summaries[0].figures:
        steps = [summary.step for summary in summaries[1:]]
        values = [summary.figures[HOLDOUT].value for summary in summaries[1:]]
        panels["image"].plot(steps, values, ":", color=PHOTOS, marker=".", label="with holdout photos")
        panels["image"].legend(frameon=False, fontsize=7, loc="lower right")
    if photos is not None:
        for axes in (panels["plane"], panels["image"]):
            axes.axhline(photos, color=PHOTOS, linewidth=1, linestyle="--", label="holdout photos")
        panels["plane"].legend(frameon=False, fontsize=8, loc="lower left")
    _draw_strip(pictures, points, shown)
    return figure


def _draw_plane(axes: "Axes", summaries: Sequence[Summary]) -> None:
    """Image over text alignment: one point per model with its step, and its intervals as a cross."""
    from matplotlib.colors import LinearSegmentedColormap

    shade = LinearSegmentedColormap.from_list("steps", ["#a9c4f5", "#16377f"])
    count = len(summaries) - 1
    colors = [BASE, *(shade(place / max(1, count - 1)) for place in range(count))]
    for place, (summary, color) in enumerate(zip(summaries, colors, strict=True)):
        x, y = (summary.figures[name] for name in PLANE)
        axes.hlines(y.value, x.low, x.high, color=color, linewidth=0.6, alpha=0.7)
        axes.vlines(x.value, y.low, y.high, color=color, linewidth=0.6, alpha=0.7)
        axes.scatter(x.value, y.value, s=30, color=color, marker="o" if summary.step else "s", zorder=3)
        title = str(summary.step) if summary.step else "base model"
        # labels alternate between above and below, since neighbouring checkpoints lie close together
        offset = (0, 9) if place % 2 else (0, -15)
        axes.annotate(
            title, (x.value, y.value), offset, textcoords="offset points", ha="center", fontsize=8, color=INK, zorder=4
        )
    path = [tuple(summary.figures[name].value for name in PLANE) for summary in summaries[1:]]
    axes.plot(*zip(*path, strict=True), color=FAINT, linewidth=0.6, alpha=0.5)
    axes.set_xlabel("text alignment: does it follow the prompt?", fontsize=9)
    axes.set_ylabel("image alignment: does it show the subject?", fontsize=9)


def _draw_over_steps(axes: "Axes", summaries: Sequence[Summary], name: str) -> None:
    """One metric over the steps, its interval as a band, the base model's value as a line."""
    steps = [summary.step for summary in summaries[1:]]
    figures = [summary.figures[name] for summary in summaries[1:]]
    axes.fill_between(
        steps, [each.low for each in figures], [each.high for each in figures], color=CUSTOMIZED, alpha=0.12
    )
    axes.plot(steps, [each.value for each in figures], color=CUSTOMIZED, marker=".", label=name.replace("_", " "))
    axes.axhline(summaries[0].figures[name].value, color=BASE, linewidth=1)
    axes.set_title(name.replace("_", " "), fontsize=9, loc="left", color=INK)


def _draw_strip(figure: "SubFigure", points: Sequence[Point], places: Sequence[int]) -> None:
    """One row for each prompt at `places`, one column per model, all from one seed."""
    grid = figure.subplots(len(places), len(points), squeeze=False)
    for line, place in zip(grid, places, strict=True):
        for axes, point in zip(line, points, strict=True):
            axes.imshow(point.images[place].convert("RGB"), interpolation="bilinear")
            axes.set_axis_off()
            axes.set_title(point.title, fontsize=8, color=INK)
        prompt = points[0].prompts[place]
        words = line[0].annotate(
            prompt.fill(*prompt.concepts),
            (0, 0),
            (0, -4),
            xycoords="axes fraction",
            textcoords="offset points",
            va="top",
            fontsize=8,
            color=FAINT,
        )
        words.set_in_layout(False)  # otherwise it widens its column
