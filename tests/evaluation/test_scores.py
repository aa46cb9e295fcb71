"""Scores and summaries against cosines worked out by hand; files hold what was computed."""

import csv
import json
import math

import numpy as np
import pytest
from conftest import concept_values
from stand_ins import Judge, plain, score

from customdiff.adapters.config import AdapterConfig
from customdiff.config import Concept
from customdiff.errors import UserError
from customdiff.evaluation import scores
from customdiff.evaluation.generation import ImagePair
from customdiff.evaluation.judges import Judges
from customdiff.evaluation.metrics import bootstrap_interval
from customdiff.evaluation.prompts import Prompt

TOM, SCENE, POT = Prompt("a {}", ("tom",)), Prompt("b {}", ("tom",), "scene"), Prompt("a {}", ("pot",))
JOINT = Prompt("a {1} and a {2}", ("tom", "pot"))
# prompt, text, number, red of the base model's image and of the adapter's: all angles in degrees; see `Judge`
PAIRS = [
    ImagePair(prompt, text, number, plain(base), plain(customized))
    for prompt, text, number, base, customized in (
        (TOM, "0", 0, 60, 0),
        (TOM, "0", 1, 90, 60),
        (SCENE, "90", 0, 30, 90),
        (POT, "30", 0, 90, 30),
    )
]
JOINT_PAIR = ImagePair(JOINT, "0", 0, plain(90), plain(30))
INSTANCES = {"tom": [plain(0), plain(60)], "pot": [plain(30)]}


def cos(degrees):
    return math.cos(math.radians(degrees))


@pytest.fixture(scope="module")
def scored():
    return scores.score_prompts(PAIRS, INSTANCES, Judges(Judge()))


def test_metrics_of_a_prompt_are_means_over_its_images(scored):
    assert [each.prompt for each in scored] == [TOM, SCENE, POT]
    first, scene, pot = scored
    assert first.base["text_alignment"] == pytest.approx(2.5 * (cos(60) + cos(90)) / 2, abs=1e-6)
    assert first.adapter["text_alignment"] == pytest.approx(2.5 * (cos(0) + cos(60)) / 2, abs=1e-6)
    by_hand = ((cos(60) + cos(0)) / 2 + (cos(90) + cos(30)) / 2) / 2
    assert first.base["image_alignment"] == pytest.approx(by_hand, abs=1e-6)
    assert first.adapter["image_alignment"] == pytest.approx((cos(0) + cos(60)) / 2, abs=1e-6)
    assert first.delta("text_alignment") == pytest.approx(2.5 * 0.5, abs=1e-6)
    assert scene.delta("text_alignment") == pytest.approx(2.5 * (cos(0) - cos(60)), abs=1e-6)
    assert pot.adapter["image_alignment"] == pytest.approx(1, abs=1e-6), "each concept has instance images of its own"


def test_noise_seeds_have_values_of_their_own_and_intervals_are_over_both_levels():
    pairs = [
        ImagePair(prompt, "0", number, plain(90), plain(red), repeat=repeat)
        for prompt, reds in ((TOM, (0, 60, 30, 90)), (SCENE, (0, 0, 60, 60)))
        for (repeat, number), red in zip(((0, 0), (0, 1), (1, 0), (1, 1)), reds, strict=True)
    ]
    first, scene = scores.score_prompts(pairs, {"tom": [plain(0)]}, Judges(Judge()))
    by_hand = [[(1 + cos(60)) / 2, (cos(30) + cos(90)) / 2], [1, cos(60)]]
    for score_, expected in zip((first, scene), by_hand, strict=True):
        assert score_.by_seed("image_alignment")[1] == pytest.approx(expected, abs=1e-6)
        assert score_.by_seed("image_alignment")[0] == pytest.approx([0, 0], abs=1e-6)
        assert score_.adapter["image_alignment"] == pytest.approx(np.mean(expected), abs=1e-6)
    # images of one prompt and noise seed are compared with one another, not those of different seeds
    assert scene.adapter["diversity"] == pytest.approx(0, abs=1e-6)
    assert first.adapter["diversity"] == pytest.approx(1 - cos(60), abs=1e-6)
    found = scores.summarize([first, scene], 8, resamples=300, seed=5).overall["image_alignment"]
    low, high = bootstrap_interval([np.array(by_hand)], resamples=300, seed=5)
    assert (found.delta_low, found.delta_high) == pytest.approx((low, high), abs=1e-5)


def test_holdout_photos_add_a_metric_of_both_models_and_change_no_other(scored):
    found = scores.score_prompts(PAIRS, INSTANCES, Judges(Judge()), {"tom": [plain(0)], "pot": [plain(90)]})
    assert found[0].base[scores.HOLDOUT] == pytest.approx((cos(60) + cos(90)) / 2, abs=1e-6)
    assert found[2].adapter[scores.HOLDOUT] == pytest.approx(cos(60), abs=1e-6)
    assert found[0].base.items() >= scored[0].base.items()
    assert scores.HOLDOUT not in scored[0].base


def test_an_image_of_two_concepts_is_aligned_with_both_and_counts_in_neither(scored):
    with_joint = scores.score_prompts([*PAIRS, JOINT_PAIR], INSTANCES, Judges(Judge()))
    by_hand = (cos(30) + cos(0)) / 2
    assert with_joint[-1].adapter["image_alignment"] == pytest.approx(by_hand, abs=1e-6)
    summary, single = (scores.summarize(each, 5, resamples=200, seed=0) for each in (with_joint, scored))
    assert summary.concepts["tom+pot"]["image_alignment"].adapter == pytest.approx(by_hand, abs=1e-6)
    assert summary.overall == single.overall


def test_the_summary_is_the_mean_over_concepts():
    given = [score(TOM, (0.1, 0), (0.2, 0)), score(SCENE, (0.3, 0), (0.6, 0)), score(POT, (0.5, 0), (0.5, 0.4))]
    summary = scores.summarize(given, 6, resamples=2000, seed=0)
    text, image = (summary.overall[name] for name in scores.METRICS[:2])
    assert (text.base, text.adapter, text.delta) == pytest.approx(((0.2 + 0.5) / 2, (0.4 + 0.5) / 2, 0.1), abs=1e-6)
    # the differences of tom's prompts are 0.1 and 0.3, of the pot's 0: resampled means are 0.05 to 0.15
    assert (text.delta_low, text.delta_high) == pytest.approx((0.05, 0.15), abs=1e-6)
    assert (image.adapter, image.delta_low, image.delta_high) == pytest.approx((0.2, 0.2, 0.2), abs=1e-6)
    tom, pot = (summary.concepts[name]["text_alignment"] for name in ("tom", "pot"))
    assert (tom.adapter, tom.delta_low, tom.delta_high) == pytest.approx((0.4, 0.1, 0.3), abs=1e-6)
    assert (pot.delta_low, pot.delta, pot.delta_high) == (0, 0, 0), "one prompt: every resample is that prompt"


def test_metrics_json_has_each_metric_with_its_interval(scored):
    summary = scores.summarize(scored, 4, resamples=200, seed=0)
    values = json.loads(summary.to_json())
    assert set(values) == {"text_alignment", "image_alignment", "concepts", "num_prompts", "num_images"}
    assert (values["num_prompts"], values["num_images"]) == (3, 4)
    assert set(values["concepts"]) == {"tom", "pot"}
    for metrics in (values, *values["concepts"].values()):
        for name in scores.METRICS[:2]:
            metric = metrics[name]
            assert set(metric) == {"base", "adapter", "delta", "delta_low", "delta_high"}
            assert metric["delta"] == pytest.approx(metric["adapter"] - metric["base"], abs=2e-6)
            assert metric["delta_low"] <= metric["delta"] + 1e-6
            assert metric["delta"] <= metric["delta_high"] + 1e-6


def test_the_table_has_a_row_per_prompt(tmp_path, scored):
    scores.write_table(scored, tmp_path / "per_prompt.csv")
    with open(tmp_path / "per_prompt.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["concept"], row["prompt"], row["kind"]) for row in rows] == [
        ("tom", "a {}", "other"),
        ("tom", "b {}", "scene"),
        ("pot", "a {}", "other"),
    ]
    for row, each in zip(rows, scored, strict=True):
        for name in scores.METRICS[:2]:
            found = [float(row[key]) for key in (f"base_{name}", name, f"{name}_delta")]
            assert found == pytest.approx([each.base[name], each.adapter[name], each.delta(name)], abs=1e-6)


@pytest.mark.parametrize(
    ("tokens", "named"),
    [({"tom": "<new1>", "pot": "<new3>"}, r"concepts\.pot.*<new2>"), ({"pot": "<new2>"}, r"concepts\.tom.*<new1>")],
)
def test_an_adapter_of_other_concepts_or_tokens_is_refused(tokens, named):
    def learned(tokens):
        values = {name: {"modifier_token": token} for name, token in tokens.items()}
        return AdapterConfig.model_validate({"base": {"model": "data/base"}, "concepts": values})

    wanted = {"tom": "<new1>", "pot": "<new2>"}
    concepts = {name: Concept.model_validate(concept_values(token)) for name, token in wanted.items()}
    scores.check_concepts(learned(wanted | {"more": "<new4>"}), concepts)
    with pytest.raises(UserError, match=named):
        scores.check_concepts(learned(tokens), concepts)
