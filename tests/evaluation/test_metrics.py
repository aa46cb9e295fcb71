"""Figures against hand-worked cases and plain loops in float64."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from customdiff.evaluation.metrics import (
    bootstrap_interval,
    image_alignment,
    kernel_distance,
    text_alignment,
    without_token,
)


def unit(*angles):
    """Unit vectors of the plane at angles in degrees."""
    return np.array([[math.cos(math.radians(a)), math.sin(math.radians(a))] for a in angles], np.float32)


@pytest.mark.parametrize(
    ("prompt", "tokens", "expected"),
    [
        ("photo of a <new1> cat", ["<new1>"], "photo of a cat"),
        ("<new1> cat sitting in a bucket", ["<new1>"], "cat sitting in a bucket"),
        ("a <new1> cat and a <new2> pot", ["<new1>", "<new2>"], "a cat and a pot"),
        ("a <new10> cat", ["<new1>"], "a <new10> cat"),
        ("a sks catsks", ["sks"], "a catsks"),
        ("a cat", [], "a cat"),
    ],
)
def test_the_token_goes_and_the_class_word_stays(prompt, tokens, expected):
    assert without_token(prompt, *tokens) == expected


def test_text_alignment_is_clipscore_worked_by_hand():
    # 60 degrees: cos 1/2; 0: 1; 120: -1/2, cut to 0
    np.testing.assert_allclose(text_alignment(unit(60, 0, 120), unit(0, 0, 0)), [1.25, 2.5, 0], atol=1e-6)


def test_image_alignment_is_the_mean_pairwise_cosine_worked_by_hand():
    generated, instances = unit(0, 90), unit(0, 60, 90)
    by_image = [(1 + 0.5 + 0) / 3, (0 + math.sqrt(3) / 2 + 1) / 3]
    np.testing.assert_allclose(image_alignment(generated, instances), by_image, atol=1e-6)
    pairs = [float(g @ i) for g, i in itertools.product(generated, instances)]
    assert image_alignment(generated, instances).mean() == pytest.approx(sum(pairs) / len(pairs), abs=1e-6)


def test_a_bootstrap_interval_agrees_with_scipys():
    values = np.random.default_rng(0).normal(0.1, 0.05, 30)
    ours = bootstrap_interval([values], resamples=20000, seed=1)
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=20000, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    np.testing.assert_allclose(ours, theirs, atol=6e-4)  # Monte Carlo; the interval is 0.04 wide


def test_every_possible_resample_of_two_values_is_found():
    # means 0, 1/2, 1 with probabilities 1/4, 1/2, 1/4: 95 % reach both ends, 40 % neither
    assert bootstrap_interval([np.array([0, 1])], resamples=4000, seed=0) == (0, 1)
    assert bootstrap_interval([np.array([0, 1])], resamples=4000, seed=0, level=0.4) == (0.5, 0.5)


def test_concepts_weigh_the_same_however_many_prompts_they_have():
    # the figure is (0 + 1) / 2; pooling the prompts would put it at 9/10
    assert bootstrap_interval([np.zeros(2), np.ones(18)], resamples=500, seed=0) == (0.5, 0.5)


def test_the_seed_fixes_the_interval():
    values = [np.random.default_rng(0).normal(size=12)]
    assert bootstrap_interval(values, resamples=300, seed=4) == bootstrap_interval(values, resamples=300, seed=4)
    assert bootstrap_interval(values, resamples=300, seed=4) != bootstrap_interval(values, resamples=300, seed=5)


@pytest.mark.parametrize("groups", [[], [np.ones(3), np.array([])]])
def test_no_values_no_interval(groups):
    with pytest.raises(ValueError, match="at least one value"):
        bootstrap_interval(groups, resamples=100, seed=0)


def test_kernel_distance_is_the_double_sum_of_its_definition():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(5, 3)), rng.normal(0.5, 1, size=(4, 3))

    def kernel(a, b):
        return (sum(float(p) * float(q) for p, q in zip(a, b, strict=True)) / 3 + 1) ** 3

    within_x = sum(kernel(x[i], x[j]) for i in range(5) for j in range(5) if i != j) / (5 * 4)
    within_y = sum(kernel(y[i], y[j]) for i in range(4) for j in range(4) if i != j) / (4 * 3)
    between = sum(kernel(a, b) for a in x for b in y) / (5 * 4)
    assert kernel_distance(x, y) == pytest.approx(within_x + within_y - 2 * between, rel=1e-12)


def test_kernel_distance_is_unbiased():
    rng = np.random.default_rng(1)
    same = [kernel_distance(rng.normal(size=(8, 4)), rng.normal(size=(8, 4))) for _ in range(2000)]
    assert abs(np.mean(same)) < 3 * np.std(same) / math.sqrt(len(same))
    assert kernel_distance(rng.normal(size=(50, 4)), rng.normal(1, 1, size=(50, 4))) > 1


def test_kernel_distance_needs_two_rows():
    with pytest.raises(ValueError, match="1 and 3"):
        kernel_distance(np.ones((1, 2)), np.ones((3, 2)))
