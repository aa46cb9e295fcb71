"""Metrics against hand-worked cases, plain loops in float64, and scipy's bootstrap."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from customdiff.evaluation.metrics import (
    bootstrap_interval,
    image_alignment,
    interval_metric,
    paired_metric,
    text_alignment,
)
from customdiff.models.modifier_tokens import without_tokens


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
        ('a poster that says "<new1> cat"', ["<new1>"], 'a poster that says "cat"'),
        ("a cat, (<new1>), asleep", ["<new1>"], "a cat, (), asleep"),
        ("a cat", [], "a cat"),
    ],
)
def test_tokens_are_removed_and_the_class_stays(prompt, tokens, expected):
    assert without_tokens(prompt, *tokens) == expected


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


def test_every_possible_resample_of_two_values_occurs():
    # means 0, 1/2, 1 with probabilities 1/4, 1/2, 1/4: 95 % reach both ends, 40 % neither
    assert bootstrap_interval([np.array([0, 1])], resamples=4000, seed=0) == (0, 1)
    assert bootstrap_interval([np.array([0, 1])], resamples=4000, seed=0, level=0.4) == (0.5, 0.5)


def test_concepts_have_equal_weight_however_many_prompts_they_have():
    # the mean is (0 + 1) / 2; pooling the prompts would give 9/10
    assert bootstrap_interval([np.zeros(2), np.ones(18)], resamples=500, seed=0) == (0.5, 0.5)


def test_the_seed_determines_the_interval():
    values = [np.random.default_rng(0).normal(size=12)]
    assert bootstrap_interval(values, resamples=300, seed=4) == bootstrap_interval(values, resamples=300, seed=4)
    assert bootstrap_interval(values, resamples=300, seed=4) != bootstrap_interval(values, resamples=300, seed=5)


def test_a_hierarchical_resample_draws_prompts_and_then_seeds_of_each():
    values = np.array([[0.0, 4.0], [10.0, 11.0]])
    # all resamples are equally likely: two prompts, and for each of them two of its two seeds
    every = [
        np.mean([values[first, a], values[first, b], values[second, c], values[second, d]])
        for first, second, a, b, c, d in itertools.product(range(2), repeat=6)
    ]
    for level in (0.2, 0.6, 0.9):
        found = bootstrap_interval([values], resamples=40000, seed=0, level=level)
        ends = np.quantile(every, [(1 - level) / 2, (1 + level) / 2], method="inverted_cdf")
        assert found == pytest.approx(tuple(ends), abs=1e-9)


def test_a_single_noise_seed_gives_the_interval_of_prompts():
    values = np.random.default_rng(0).normal(size=12)
    alone = bootstrap_interval([values], resamples=300, seed=4)
    assert bootstrap_interval([values[:, None]], resamples=300, seed=4) == alone


@pytest.mark.parametrize(
    ("between", "within", "expected"),
    # share of intervals that contain the true difference; widest where the noise decides, see docs/comparison.md
    [(1.0, 0.5, (0.88, 0.955)), (1.0, 1.0, (0.9, 0.975)), (1.0, 2.0, (0.93, 0.995)), (0.2, 1.0, (0.94, 1.0))],
)
def test_the_interval_contains_the_true_difference_about_as_often_as_it_says(between, within, expected):
    rng, covered, pooled = np.random.default_rng(7), [], []
    for seed in range(400):
        true = 0.3
        values = true + rng.normal(0, between, (12, 1)) + rng.normal(0, within, (12, 3))
        for found, groups in ((covered, [values]), (pooled, [values.ravel()])):
            low, high = bootstrap_interval(groups, resamples=200, seed=seed)
            found.append(low <= true <= high)
    assert expected[0] <= np.mean(covered) <= expected[1]
    if between > within:  # images of one prompt are no further prompts
        assert np.mean(pooled) < 0.8


@pytest.mark.parametrize("groups", [[], [np.ones(3), np.array([])]])
def test_without_values_there_is_no_interval(groups):
    with pytest.raises(ValueError):  # noqa: PT011
        bootstrap_interval(groups, resamples=100, seed=0)


def test_a_paired_metric_has_the_interval_of_the_differences():
    # base and adapter vary alike over prompts, so their paired difference does not
    base = [np.array([0.1, 0.9]), np.array([0.4])]
    adapter = [np.array([0.3, 1.1]), np.array([0.8])]
    found = paired_metric(base, adapter, resamples=500, seed=0)
    assert found.to_dict() == pytest.approx(
        {"base": 0.45, "adapter": 0.75, "delta": 0.3, "delta_low": 0.3, "delta_high": 0.3}, abs=1e-6
    )


def test_an_interval_metric_holds_the_mean_over_concepts():
    # the two prompts' mean is 1, 1.5 or 2; the other concept's only prompt stays
    found = interval_metric([np.array([1.0, 2.0]), np.array([3.0])], resamples=4000, seed=0)
    assert (found.value, found.low, found.high) == pytest.approx((2.25, 2, 2.5), abs=1e-6)
