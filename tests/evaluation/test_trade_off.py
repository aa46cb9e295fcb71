"""The picture of a sweep shows each model at its figures, with its intervals, its step and its images."""

import numpy as np
import pytest
from stand_ins import plain

from customdiff.evaluation import trade_off
from customdiff.evaluation.metrics import IntervalMetric
from customdiff.evaluation.prompts import Prompt
from customdiff.evaluation.report import PLANE as METRICS
from customdiff.evaluation.scores import HOLDOUT
from customdiff.evaluation.sweep import Point, Summary

COLORS = [(250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 0)]
STEPS = [0, 50, 100, 150]
X, Y = METRICS


def points(*concepts):
    prompts = [Prompt("a {} there", (name,)) for name in concepts]
    return [Point(step, prompts, {}, [plain(color)] * len(prompts)) for step, color in zip(STEPS, COLORS, strict=True)]


@pytest.fixture
def summaries():
    rng = np.random.default_rng(0)

    def figure():
        low, value, high = sorted(rng.uniform(size=3))
        return IntervalMetric(value, low, high)

    return [Summary(step, {name: figure() for name in (*METRICS, HOLDOUT)}) for step in STEPS]


def labelled(axes, text):
    return [line for line in axes.lines if line.get_label() == text]


def test_the_plane_has_each_model_at_its_figures_with_its_interval_and_its_step(summaries):
    plane = trade_off.picture(points("cat"), summaries).axes[0]
    figures = [summary.figures for summary in summaries]
    spots = [shown.get_offsets()[0] for shown in plane.collections if hasattr(shown, "get_sizes")]
    assert [tuple(spot) for spot in spots] == [(each[X].value, each[Y].value) for each in figures]
    lines = [shown for shown in plane.collections if hasattr(shown, "get_segments")]
    crosses = {tuple(segment.ravel()) for shown in lines for segment in shown.get_segments()}
    for each in figures:
        assert (each[X].low, each[Y].value, each[X].high, each[Y].value) in crosses
        assert (each[X].value, each[Y].low, each[X].value, each[Y].high) in crosses
    titles = {words.get_text(): tuple(words.xy) for words in plane.texts}
    expected = zip(("base model", "50", "100", "150"), figures, strict=True)
    assert titles == {title: (each[X].value, each[Y].value) for title, each in expected}


def test_the_curves_run_over_the_steps_beside_the_base_models_level(summaries):
    _, text, image = trade_off.picture(points("cat"), summaries).axes[:3]
    for panel, name in ((text, X), (image, Y)):
        curve, level = panel.lines[:2]
        assert list(curve.get_xdata()) == STEPS[1:]
        assert list(curve.get_ydata()) == [summary.figures[name].value for summary in summaries[1:]]
        assert set(level.get_ydata()) == {summaries[0].figures[name].value}
    dotted = image.lines[2]
    assert list(dotted.get_ydata()) == [summary.figures[HOLDOUT].value for summary in summaries[1:]]


def test_holdout_photos_have_a_line_only_where_there_are_some(summaries):
    plane, _, image = trade_off.picture(points("cat"), summaries, photos=0.7).axes[:3]
    for axes in (plane, image):
        (line,) = labelled(axes, "holdout photos")
        assert list(line.get_ydata()) == [0.7, 0.7]
    plane, text, image = trade_off.picture(points("cat"), summaries).axes[:3]
    assert not [line for axes in (plane, text, image) for line in labelled(axes, "holdout photos")]
    bare = [Summary(each.step, {name: each.figures[name] for name in METRICS}) for each in summaries]
    assert len(trade_off.picture(points("cat"), bare).axes[2].lines) == 2, "curve and level"


def test_the_strip_shows_the_first_prompt_of_each_concept_with_a_column_per_model(summaries):
    strip = trade_off.picture(points("cat", "cat", "pot"), summaries).axes[3:]
    shown = [axes.images[0].get_array()[0, 0].tolist() for axes in strip]
    assert shown == [list(color) for color in COLORS] * 2
    assert [axes.get_title() for axes in strip[:4]] == ["base model", "50", "100", "150"]
    assert [axes.texts[0].get_text() for axes in strip[::4]] == ["a cat there", "a pot there"]
