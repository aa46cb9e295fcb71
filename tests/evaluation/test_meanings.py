"""The report's table says what each figure means; best and worst prompts are the right ones."""

import pytest
from stand_ins import score

from customdiff.evaluation import meanings, report, scores
from customdiff.evaluation.metrics import IntervalMetric, PairedMetric
from customdiff.evaluation.prompts import Prompt

METRIC = PairedMetric(0.2, 0.5, 0.3, 0.25, 0.35)
FIGURE = IntervalMetric(0.1, 0.05, 0.2)


def summary(concepts=("cat",), names=scores.METRICS):
    metrics = dict.fromkeys(names, METRIC)
    figures = dict.fromkeys(("drift", "class_drift", "prior_kid"), FIGURE)
    holdout = {name: {"identity": 0.8, "image_alignment": 0.7} for name in concepts}
    return scores.Summary(metrics, dict.fromkeys(concepts, metrics), 1, 1, figures={None: figures}, holdout=holdout)


def test_every_figure_has_a_meaning_and_a_place_below_its_question():
    rows = meanings.table(summary())
    named = {figure for figure in meanings.MEANINGS if figure != "photo_share"}
    assert {row.title for row in rows} == {meanings.title_of(figure) for figure in named}
    assert set(scores.METRICS) <= named
    questions = list(dict.fromkeys(row.question for row in rows))
    assert questions == list(meanings.QUESTIONS)
    assert [row.question for row in rows] == sorted((row.question for row in rows), key=meanings.QUESTIONS.index)
    assert all(row.meaning and row.better for row in rows)


def test_values_stand_beside_the_base_model_and_the_holdout_photos():
    rows = {row.title: row for row in meanings.table(summary())}
    identity, share, drift = (rows[title] for title in ("Identity", "Holdout share", "Drift"))
    assert (identity.base, identity.adapter, identity.holdout) == ("0.200", "0.500", "0.800")
    assert identity.interval == "+0.300 (+0.250 to +0.350)"
    assert (share.adapter, share.base) == ("50 %", "")  # 0.3 of 0.6
    assert (drift.adapter, drift.interval) == ("0.100", "(0.050 to 0.200)")
    assert rows["Diversity"].holdout == ""


def test_an_evaluation_shows_the_figures_that_it_has():
    bare = scores.Summary({"text_alignment": METRIC, "image_alignment": METRIC}, {}, 1, 1)
    assert [row.title for row in meanings.table(bare)] == ["Image alignment", "Text alignment"]


def test_of_several_concepts_the_holdout_photos_are_in_the_rows_of_each():
    both = summary(("cat", "pot"))
    assert all(row.holdout == "" for row in meanings.table(both))
    assert [row.holdout for row in meanings.table(both, "pot") if row.title == "Identity"] == ["0.800"]


@pytest.mark.parametrize(("metric", "best"), [("image_alignment", "b"), ("identity", "a")])
def test_prompts_are_ranked_by_text_and_subject(metric, best):
    found = []
    for name, text, image, identity in (("a", 0.5, 0.1, 0.9), ("b", 0.6, 0.8, 0.1), ("c", 0.1, 0.0, 0.0)):
        each = score(Prompt(name, ("cat",)), (0, 0), (text, image))
        if metric == "identity":
            each.base["identity"], each.adapter["identity"] = 0.0, identity
        found.append(each)
    if metric == "identity":
        found[0].adapter["text_alignment"] = 0.7
    ranked = [each.prompt.template for each in report.ranked(found)]
    assert ranked[0] == best
    assert ranked[-1] == "c"
