"""The share of the way to the photos against cases worked by hand, and next steps that name the key that helps."""

import json
import math

import numpy as np
import pytest
from conftest import concept_values
from stand_ins import Judge, plain

from customdiff.config import Params
from customdiff.evaluation import scores, verdict
from customdiff.evaluation.generation import ImagePair
from customdiff.evaluation.judges import Judges
from customdiff.evaluation.metrics import PairedMetric, follows_prompt, leave_one_out_alignment, photo_share
from customdiff.evaluation.prompts import Prompt

A, B = Prompt("a {}", ("cat",)), Prompt("b {}", ("cat",))


def cos(degrees):
    return math.cos(math.radians(degrees))


def test_a_photo_is_not_compared_with_itself():
    photos = Judge().images([plain(0), plain(60), plain(90)])
    by_hand = ((cos(60) + cos(90)) / 2 + (cos(60) + cos(30)) / 2 + (cos(90) + cos(30)) / 2) / 3
    assert leave_one_out_alignment(photos) == pytest.approx(by_hand, abs=1e-7)
    assert leave_one_out_alignment(photos[:1]) is None


def test_a_further_photo_has_the_ceiling_on_average():
    """The mean image alignment of the photo left out with those kept, over all choices."""
    random = np.random.default_rng(4)
    photos = random.normal(size=(6, 5))
    photos /= np.linalg.norm(photos, axis=1, keepdims=True)
    left_out = [(np.delete(photos, i, axis=0) @ photos[i]).mean() for i in range(6)]
    assert leave_one_out_alignment(photos) == pytest.approx(np.mean(left_out), abs=1e-12)


@pytest.mark.parametrize(
    ("base", "delta", "ceiling", "expected"),
    [
        (0.2, 0.0, 0.7, (0.0, -0.1, 0.1)),
        (0.2, 0.25, 0.7, (0.5, 0.4, 0.6)),
        (0.2, 0.5, 0.7, (1.0, 0.9, 1.1)),
        (0.2, -0.05, 0.7, (-0.1, -0.2, 0.0)),
        (0.5, 0.02, 0.6, (0.2, -0.3, 0.7)),
        (0.5, 0.02, 0.54, None),  # no room
        (0.5, 0.02, 0.4, None),
    ],
)
def test_the_share_of_the_way(base, delta, ceiling, expected):
    metric = PairedMetric(base, base + delta, delta, delta - 0.05, delta + 0.05)
    found = photo_share(metric, ceiling)
    if expected is None:
        assert found is None
    else:
        assert (found.value, found.low, found.high) == pytest.approx(expected, abs=1e-6)
        assert found.ceiling == ceiling


def test_an_image_follows_its_prompt_if_no_other_fits_better():
    judge = Judge()
    images = judge.images([plain(0), plain(50), plain(50), plain(90)])
    prompts = judge.text(["0", "90", "0"])  # the first and the last are the same
    assert follows_prompt(images, prompts, [0, 0, 1, 2]).tolist() == [1, 0, 1, 0]


INSTANCES = {"cat": [plain(0), plain(20)], "pot": [plain(30)]}


def pair(prompt, text, base, customized, number=0):
    return ImagePair(prompt, text, number, plain(base), plain(customized))


PAIRS = [pair(A, "0", 90, 30), pair(A, "0", 60, 80, 1), pair(B, "90", 90, 30)]


def summary_of(pairs, instances=INSTANCES):
    ceilings = scores.photo_ceilings(instances, Judges(Judge()))
    scored = scores.score_prompts(pairs, instances, Judges(Judge()))
    return scores.summarize(scored, len(pairs), resamples=100, seed=0, ceilings=ceilings)


def test_metrics_hold_share_ceiling_and_prompt_accuracy():
    summary = summary_of(PAIRS)
    written = json.loads(summary.to_json())

    def alignment(degrees):
        return (cos(degrees) + cos(degrees - 20)) / 2

    base = ((alignment(90) + alignment(60)) / 2 + alignment(90)) / 2
    adapter = ((alignment(30) + alignment(80)) / 2 + alignment(30)) / 2
    share = written["concepts"]["cat"]["photo_share"]
    assert share["ceiling"] == pytest.approx(cos(20), abs=1e-6)
    assert share["value"] == pytest.approx((adapter - base) / (cos(20) - base), abs=1e-4)
    delta = written["image_alignment"]
    assert share["low"] == pytest.approx(delta["delta_low"] / (cos(20) - base), abs=1e-4)
    assert share["low"] <= share["value"] <= share["high"]
    assert written["photo_share"] == share
    # of the base model's images only the one of the second prompt fits it best, of the adapter's only the first
    accuracy = {"base": (0 + 1) / 2, "adapter": (1 / 2 + 0) / 2}
    assert written["concepts"]["cat"]["prompt_accuracy"] == accuracy


def test_a_single_photo_has_no_share_and_its_concept_none_overall():
    pot = pair(Prompt("a {}", ("pot",)), "30", 90, 30)
    written = json.loads(summary_of([*PAIRS, pot]).to_json())
    assert "photo_share" in written["concepts"]["cat"]
    assert "photo_share" not in written["concepts"]["pot"]
    assert "photo_share" not in written


def test_the_overall_share_is_of_the_means_over_concepts():
    both = {"cat": [plain(0), plain(20)], "pot": [plain(30), plain(40)]}
    pot = pair(Prompt("a {}", ("pot",)), "30", 90, 50)
    joint = pair(Prompt("a {1} and a {2}", ("cat", "pot")), "0", 90, 0)
    summary = summary_of([*PAIRS, pot, joint], both)
    image = summary.overall["image_alignment"]
    ceiling = (cos(20) + cos(10)) / 2
    assert summary.photo_share().value == pytest.approx((image.adapter - image.base) / (ceiling - image.base), abs=1e-4)
    assert summary.photo_share("cat+pot") is None


# verdicts


def judged(value, accuracy=(1.0, 1.0), captioned=(False,) * 5, concept="cat", **sections):
    """The verdict on a share of the way, for sections of params.yaml."""
    image = PairedMetric(0.2, 0.2 + value / 2, value / 2, value / 2 - 0.05, value / 2 + 0.05)
    metrics = {"text_alignment": PairedMetric(1, 1, 0, 0, 0), "image_alignment": image}
    prompts = {concept: scores.PromptAccuracy(*accuracy)}
    ceilings = {concept: {"image_alignment": 0.7}} if len(captioned) > 1 else {}
    summary = scores.Summary(metrics, {concept: metrics}, 1, 1, prompts, ceilings)
    params = Params.model_validate({"concepts": {concept: concept_values()}} | sections)
    (found,) = verdict.verdicts(summary, params, {concept: captioned})
    return found


@pytest.mark.parametrize(("value", "level"), [(0.19, "hardly learned"), (0.21, "partly learned"), (0.51, "learned")])
def test_identity_has_levels_of_its_own(value, level):
    identity = PairedMetric(0.2, 0.2 + value / 2, value / 2, 0.0, 1.0)
    metrics = {"image_alignment": PairedMetric(0.2, 0.2, 0, 0, 0), "identity": identity}
    kept = {"cat": {"identity": 0.7}}
    summary = scores.Summary(metrics, {"cat": metrics}, 1, 1, holdout=kept)
    params = Params.model_validate({"concepts": {"cat": concept_values()}})
    (found,) = verdict.verdicts(summary, params, {"cat": [True] * 5})
    assert found.level == level
    assert "holdout photos" in found.result


PARTLY, LEARNED = verdict.LEVELS["image_alignment"]


@pytest.mark.parametrize(
    ("value", "level"),
    [
        (-0.1, "hardly learned"),
        (0.11, "hardly learned"),
        (PARTLY - 0.001, "hardly learned"),
        (PARTLY, "partly learned"),
        (LEARNED - 0.001, "partly learned"),
        (LEARNED, "learned"),
        (1.1, "learned"),
    ],
)
def test_the_share_decides_the_level(value, level):
    found = judged(value)
    assert found.level == level
    low, high = round(100 * (value - 0.1)), round(100 * (value + 0.1))
    assert found.result == f"cat: {100 * value:.0f} % of the way to your photos ({low} to {high} %): {level}."


TEMPLATE = {"captions": "template", "masks": "none"}
CAPTIONED = (True,) * 5


@pytest.mark.parametrize(
    ("value", "sections", "captioned", "named"),
    [
        (0.1, {"prepare": TEMPLATE}, (False,) * 5, "prepare.masks: auto"),
        (0.4, {"prepare": TEMPLATE}, (False,) * 5, "prepare.masks: auto"),
        (0.1, {"prepare": TEMPLATE}, CAPTIONED, "prepare.captions: auto"),
        (0.1, {"prepare": {"masks": "none", "captioner": None}}, (True, False), "prepare.masks: auto"),
        (0.1, {"prepare": {"masks": "none"}}, (True, False), "train.max_steps is 250"),
        (0.1, {"prepare": {"masks": "none"}}, CAPTIONED, "train.max_steps is 250"),
        (0.1, {"prepare": {"captioner": None, "backgrounds": {"share": 0}}}, (False,) * 5, "prepare.backgrounds.share"),
        (0.1, {}, (False,) * 5, "data/prepared/cat/sheet.jpg"),
        (0.1, {}, CAPTIONED, "train.max_steps is 250)."),
        (0.4, {"train": {"max_steps": 77}}, CAPTIONED, "train.max_steps is 77"),
    ],
)
def test_the_next_step_names_the_key_that_helps(value, sections, captioned, named):
    assert named in judged(value, captioned=captioned, **sections).next_step


def test_a_learned_subject_needs_no_next_step():
    found = judged(0.7, (1.0, 0.9))
    assert found.next_step == ""
    assert verdict.lines([found]) == [found.result]


@pytest.mark.parametrize("value", [0.4, 0.7, 1.0])
def test_prompts_that_are_ignored_ask_for_less_training(value):
    train = {"max_steps": 900, "learning_rate": 3e-4, "prior_loss_weight": 0.3}
    found = judged(value, (0.9, 0.9 * verdict.FOLLOWS - 0.01), train=train)
    assert "71 %" in found.result
    assert "90 %" in found.result
    for named in (
        "fewer steps",
        "train.max_steps is 900",
        "train.learning_rate (now 0.0003)",
        "train.prior_loss_weight",
    ):
        assert named in found.next_step
    without = judged(value, (0.9, 0.5), train={"with_prior_preservation": False})
    assert "train.with_prior_preservation: true" in without.next_step
    assert judged(value, (0.9, 0.9 * verdict.FOLLOWS)).result.endswith("learned.")


def test_a_subject_that_is_not_learned_while_prompts_are_ignored_asks_for_a_lower_rate():
    found = judged(0.1, (1.0, 0.5), prepare=TEMPLATE)
    assert "a lower train.learning_rate" in found.next_step


def test_a_single_photo_asks_for_more_photos():
    found = judged(0.5, captioned=(True,))
    assert found.share is None
    assert "concepts.cat.source" in found.next_step
    assert "%" not in found.result


def test_a_judge_without_room_asks_for_another_judge():
    metric = PairedMetric(0.68, 0.69, 0.01, 0.0, 0.02)
    metrics = {"text_alignment": metric, "image_alignment": metric}
    summary = scores.Summary(metrics, {"cat": metrics}, 1, 1, {}, {"cat": {"image_alignment": 0.7}})
    params = Params.model_validate({"concepts": {"cat": concept_values()}})
    (found,) = verdict.verdicts(summary, params, {"cat": CAPTIONED})
    assert "evaluate.clip" in found.next_step


def test_mlflow_gets_the_share_of_each_concept_and_the_verdict():
    both = {"cat": [plain(0), plain(20)], "pot": [plain(30), plain(40)]}
    pot = pair(Prompt("a {}", ("pot",)), "30", 90, 50)
    joint = pair(Prompt("a {1} and a {2}", ("cat", "pot")), "0", 90, 0)
    summary = summary_of([*PAIRS, pot, joint], both)
    concepts = {"cat": concept_values(), "pot": concept_values("<new2>", "pot")}
    params = Params.model_validate({"concepts": concepts})
    found = verdict.verdicts(summary, params, {"cat": CAPTIONED, "pot": CAPTIONED})
    metrics, tags = verdict.tracked(summary, found)
    assert set(metrics) == {"photo_share", "photo_share.cat", "photo_share.pot"}
    assert metrics["photo_share.cat"] == summary.photo_share("cat").value
    assert tags == {"customdiff.verdict": f"{found[0].result} {found[1].result}"}
