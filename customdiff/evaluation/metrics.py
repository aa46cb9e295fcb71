"""Alignment metrics of the paper, and their bootstrap intervals.

Every function takes embeddings as rows of norm 1, so that a dot product is a cosine, and computes in float64.
"""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

CLIPSCORE_WEIGHT = 2.5
DIGITS = 6  # of a metric in files


@dataclass(frozen=True)
class PairedMetric:
    """A metric of the base model and of an adapter, on the same prompts and seeds.

    Attributes:
        base, adapter: means over concepts of the means over prompts.
        delta: adapter minus base.
        delta_low, delta_high: 95 % bootstrap interval of the paired difference over prompts.
    """

    base: float
    adapter: float
    delta: float
    delta_low: float
    delta_high: float

    def to_dict(self) -> dict[str, float]:
        """The metric as it is in metrics.json."""
        return asdict(self)


@dataclass(frozen=True)
class IntervalMetric:
    """A mean with its 95 % bootstrap interval over prompts."""

    value: float
    low: float
    high: float


def paired_metric(
    base: Sequence[np.ndarray], adapter: Sequence[np.ndarray], *, resamples: int, seed: int
) -> PairedMetric:
    """Summarize one metric of base and adapter: one array per concept, one value per prompt."""
    deltas = [np.asarray(after) - np.asarray(before) for before, after in zip(base, adapter, strict=True)]
    low, high = bootstrap_interval(deltas, resamples=resamples, seed=seed)
    before, after = (round(mean_over_groups(groups), DIGITS) for groups in (base, adapter))
    return PairedMetric(before, after, round(after - before, DIGITS), round(low, DIGITS), round(high, DIGITS))


def interval_metric(groups: Sequence[np.ndarray], *, resamples: int, seed: int) -> IntervalMetric:
    """Summarize one metric of one model: one array per concept, one value per prompt."""
    low, high = bootstrap_interval(groups, resamples=resamples, seed=seed)
    return IntervalMetric(round(mean_over_groups(groups), DIGITS), round(low, DIGITS), round(high, DIGITS))


def mean_over_groups(groups: Sequence[np.ndarray]) -> float:
    """The mean over concepts of each concept's mean over prompts."""
    return float(np.mean([np.mean(group) for group in groups]))


def without_tokens(prompt: str, *tokens: str) -> str:
    """A prompt without its modifier tokens: "photo of a <new1> cat" -> "photo of a cat".

    The paper compares images with this text (section 4, and the prompts of CustomConcept101): the judge does not know
    the token, and the class stays.
    """
    for token in tokens:
        prompt = re.sub(rf"(?<!\S){re.escape(token)}(?!\S)", " ", prompt)
    return " ".join(prompt.split())


def text_alignment(images: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """CLIPScore (Hessel et al. 2021) without its prefix, as in the paper's code: 2.5 * max(cos, 0).

    Args:
        images: (N, D), one row per image.
        texts: (N, D), the prompt of each image, without modifier tokens.

    Returns:
        (N,), 0 to 2.5.
    """
    cosines = np.sum(images.astype(np.float64) * texts.astype(np.float64), axis=1)
    return CLIPSCORE_WEIGHT * np.maximum(cosines, 0)


def image_alignment(images: np.ndarray, instances: np.ndarray) -> np.ndarray:
    """Each image's mean cosine to all instance images; the mean over images is the paper's mean pairwise cosine.

    Args:
        images: (N, D), generated images.
        instances: (M, D), the concept's instance images.

    Returns:
        (N,), -1 to 1.
    """
    return (images.astype(np.float64) @ instances.astype(np.float64).T).mean(axis=1)


def bootstrap_interval(
    groups: Sequence[np.ndarray], *, resamples: int, seed: int, level: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean over groups of each group's mean.

    Args:
        groups: one array per concept, one value per prompt. Prompts are resampled within their concept, as the mean is
            one over concepts.
        resamples: number of resamples.
        seed: of numpy's generator.
        level: share of the resampled means inside the interval.

    Returns:
        Low and high end.

    Raises:
        ValueError: there is no group, or an empty one.
    """
    if not groups or any(len(group) == 0 for group in groups):
        raise ValueError("an interval needs at least one value in each group")
    rng = np.random.default_rng(seed)
    means = np.zeros(resamples)
    for group in groups:
        values = np.asarray(group, np.float64)
        means += values[rng.integers(len(values), size=(resamples, len(values)))].mean(axis=1)
    low, high = np.quantile(means / len(groups), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
