"""Drift, KID and diversity against loops in float64; controls are drawn without the token, from the same seeds."""

import itertools
import json

import numpy as np
import pytest
from conftest import concept_values, random_adapter
from stand_ins import BOTH, PROMPTS, CountingGeneration, Judge, generation, plain

from customdiff.config import Concept, Evaluate
from customdiff.evaluation import drift, scores
from customdiff.evaluation.generation import ImagePair, generate_pairs, write_images
from customdiff.evaluation.judges import Judges
from customdiff.evaluation.metrics import diversity, feature_distance, kid, kid_metric
from customdiff.evaluation.prompts import Prompt

CONCEPTS = {name: Concept.model_validate(values) for name, values in BOTH.items()}
RESAMPLED = {"resamples": 200, "seed": 0}


def features(count, seed, width=6):
    rows = np.random.default_rng(seed).normal(size=(count, width)) + np.eye(width)[0]
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def cos(degrees):
    return np.cos(np.radians(degrees))


# figures


def test_kid_is_the_unbiased_estimate_in_plain_loops():
    x, y = features(4, 0), features(6, 1)

    def k(a, b):
        return (sum(float(i) * float(j) for i, j in zip(a, b, strict=True)) + 1) ** 3

    within_x = sum(k(a, b) for a, b in itertools.permutations(x, 2)) / (4 * 3)
    within_y = sum(k(a, b) for a, b in itertools.permutations(y, 2)) / (6 * 5)
    across = sum(k(a, b) for a in x for b in y) / (4 * 6)
    assert kid(x, y) == pytest.approx(within_x + within_y - 2 * across, abs=1e-12)


def test_kid_of_two_samples_of_one_distribution_is_zero_on_average_and_of_two_it_is_not():
    same = [kid(features(8, seed), features(20, seed + 1000)) for seed in range(200)]
    assert abs(np.mean(same)) < 3 * np.std(same) / np.sqrt(len(same))
    assert kid(features(8, 0), -features(20, 1)) > 5 * np.std(same)


def test_the_range_of_kid_is_of_halves_and_its_value_of_all():
    x, y = features(4, 2), features(6, 3)
    found = kid_metric([(y, x, y)], subsets=500, seed=0)
    assert (found.base, found.value) == pytest.approx((kid(y, y), kid(x, y)), abs=1e-6)
    every = [
        kid(x[list(a)], y[list(b)])
        for a in itertools.combinations(range(4), 2)
        for b in itertools.combinations(range(6), 3)
    ]
    assert min(every) - 1e-6 <= found.low < found.high <= max(every) + 1e-6
    expected = np.quantile(every, [0.025, 0.975])
    assert (found.low, found.high) == pytest.approx(expected, abs=0.2 * np.ptp(every))
    both = kid_metric([(x, x, y), (x, y, x)], subsets=50, seed=0)
    assert both.value == pytest.approx(kid(x, y), abs=1e-6)


def test_diversity_and_distance_are_one_minus_cosine():
    rows = features(4, 5)
    pairs = [1 - float(a.astype(float) @ b.astype(float)) for a, b in itertools.combinations(rows, 2)]
    assert diversity(rows) == pytest.approx(np.mean(pairs), abs=1e-7)
    assert feature_distance(rows[:2], rows[2:]) == pytest.approx([pairs[1], pairs[4]], abs=1e-7)
    assert diversity(rows[[0, 0]]) == pytest.approx(0, abs=1e-6)


def test_diversity_is_a_metric_of_prompts_with_two_images():
    prompt = Prompt("a {}", ("cat",))
    pairs = [ImagePair(prompt, "0", number, plain(red), plain(30)) for number, red in enumerate((0, 60, 90))]
    (found,) = scores.score_prompts(pairs, {"cat": [plain(0)]}, Judges(Judge()))
    assert found.base["diversity"] == pytest.approx(1 - (cos(60) + cos(90) + cos(30)) / 3, abs=1e-6)
    assert found.adapter["diversity"] == pytest.approx(0, abs=1e-6)
    (single,) = scores.score_prompts(pairs[:1], {"cat": [plain(0)]}, Judges(Judge()))
    assert "diversity" not in single.base


def control(prompt, base, customized):
    return ImagePair(prompt, prompt.template, 0, plain(base), plain(customized), is_control=True)


OTHERS = [control(Prompt("a car", ()), 0, 60), control(Prompt("a bus", ()), 30, 30)]
OWN = [control(Prompt(f"{number} {{}}", ("cat",)), 10, 10 + 10 * number) for number in range(3)]


def test_drift_is_the_mean_distance_of_other_things_and_of_the_class():
    found = drift.figures([*OTHERS, *OWN], {"cat": [plain(0), plain(90)]}, Judges(Judge()), **RESAMPLED)
    assert found[None]["drift"].value == pytest.approx((1 - cos(60)) / 2, abs=1e-6)
    assert (found[None]["drift"].low, found[None]["drift"].high) == pytest.approx((0, 1 - cos(60)), abs=1e-6)
    assert found["cat"]["class_drift"].value == pytest.approx((2 - cos(10) - cos(20)) / 3, abs=1e-6)
    assert found[None]["class_drift"] == found["cat"]["class_drift"]
    assert set(found["cat"]) == {"class_drift", "prior_kid"}
    adapter, real = (Judge().images([plain(red) for red in reds]) for reds in ((10, 20, 30), (0, 90)))
    base = Judge().images([plain(10)] * 3)
    expected = (kid(adapter, real), kid(base, real))
    assert (found["cat"]["prior_kid"].value, found["cat"]["prior_kid"].base) == pytest.approx(expected, abs=1e-6)


def test_what_cannot_be_measured_is_left_out():
    assert drift.figures([], {}, Judges(Judge()), **RESAMPLED) == {}
    assert set(drift.figures(OTHERS, {}, Judges(Judge()), **RESAMPLED)[None]) == {"drift"}
    assert set(drift.figures(OWN, {"cat": [plain(0)]}, Judges(Judge()), **RESAMPLED)[None]) == {"class_drift"}


def test_drift_is_measured_by_the_identity_encoder_where_there_is_one():
    class Constant:
        def images(self, images):
            return np.tile(np.float32([[1, 0]]), (len(images), 1))

    found = drift.figures(OTHERS, {}, Judges(Judge(), Constant()), **RESAMPLED)
    assert found[None]["drift"].value == 0


def test_the_figures_are_in_metrics_json():
    figures = drift.figures([*OTHERS, *OWN], {"cat": [plain(0), plain(90)]}, Judges(Judge()), **RESAMPLED)
    written = json.loads(scores.Summary({}, {"cat": {}}, 1, 1, figures=figures).to_json())
    assert set(written["drift"]) == {"value", "low", "high"}
    assert written["prior_kid"] == written["concepts"]["cat"]["prior_kid"]
    assert "drift" not in written["concepts"]["cat"]


# controls


def chosen(folder, count=2, concepts=CONCEPTS, text="a car\n# a\na catalog  # b\n\na Cat\ndogs\na bus\n"):
    (folder / "drift.txt").write_text(text)
    return drift.control_prompts(Evaluate(prompts=str(folder), drift_prompts=count), concepts, PROMPTS)


def test_controls_are_other_things_then_each_concepts_own_prompts(tmp_path):
    assert chosen(tmp_path) == [Prompt("a car", (), "other"), Prompt("a catalog", (), "other"), *PROMPTS[:2]]
    assert [prompt.template for prompt in chosen(tmp_path, 9) if not prompt.concepts] == ["a car", "a catalog", "a bus"]
    assert chosen(tmp_path, 0) == []
    (tmp_path / "drift.txt").unlink()
    settings = Evaluate(prompts=str(tmp_path), drift_prompts=2)
    assert drift.control_prompts(settings, CONCEPTS, PROMPTS) == PROMPTS[:2]


def test_both_models_get_the_class_and_the_same_seeds(tiny_base, tmp_path):
    concepts = {"cat": concept_values(), "dog": concept_values("<new2>", "dog")}
    folder = random_adapter(tiny_base, tmp_path / "adapter", concepts=concepts)
    CountingGeneration.counts.clear()
    how = generation(tiny_base, tmp_path / "cache", CountingGeneration, batch_size=1)
    controls = [Prompt("a red pot", ()), PROMPTS[0]]
    ((_, pairs),) = generate_pairs(how, {"a": folder}, PROMPTS[:1], controls)
    own, without = pairs[:2], pairs[2:]
    assert [pair.is_control for pair in pairs] == [False, False, True, True]
    assert [pair.text for pair in without] == ["a red pot", "a cat on red"]
    assert without[1].base.tobytes() == own[0].base.tobytes(), "the base model's image of the same prompt and seed"
    assert without[1].customized.tobytes() not in (own[0].customized.tobytes(), own[0].base.tobytes())
    # two steps an image: 2 + 1 of the base model, 2 + 2 of the adapter
    assert CountingGeneration.counts["evaluations"] == 2 * 7
    ((_, alone),) = generate_pairs(how, {"a": folder}, PROMPTS[:1])
    assert [pair.customized.tobytes() for pair in alone] == [pair.customized.tobytes() for pair in own]
    write_images(pairs, tmp_path / "images")
    assert len(list((tmp_path / "images/customized/without-token").iterdir())) == 2
    assert len(list((tmp_path / "images/base/cat").iterdir())) == 2


def test_an_adapter_of_one_concept_gives_no_controls_of_the_other(tiny_base, tmp_path):
    folder = random_adapter(tiny_base, tmp_path / "adapter")
    ((_, pairs),) = generate_pairs(generation(tiny_base), {"a": folder}, PROMPTS[:2], PROMPTS[:2])
    assert [pair.prompt.concepts for pair in pairs if pair.is_control] == [("cat",)]


def test_the_strip_shows_other_things_and_the_class_base_above_adapter():
    sheet = np.asarray(drift.strip([*OTHERS, *OWN, control(PROMPTS[1], 5, 7)]))
    assert drift.strip([]) is None
    for red, count in ((60, 1), (7, 1), (30, 3)):
        assert (sheet == (red, 0, 0)).all(axis=2).sum() == count * 96 * 96


def test_class_images_are_read_where_there_are_some(tmp_path):
    (tmp_path / "cat/images").mkdir(parents=True)
    plain(9).save(tmp_path / "cat/images/1.png")
    (tmp_path / "cat/images/1.txt").write_text("a cat")
    found = drift.read_class_images(tmp_path, CONCEPTS)
    assert list(found) == ["cat"]
    assert len(found["cat"]) == 1
