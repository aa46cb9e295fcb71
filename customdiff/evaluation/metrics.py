"""Alignment metrics of the paper, and their bootstrap intervals.

Every function takes embeddings as rows of norm 1, so that a dot product is a cosine, and computes in float64.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

CLIPSCORE_WEIGHT = 2.5
DIGITS = 6  # of a metric in files
MIN_ROOM = (
    0.05  # below it the judge hardly tells the base model's images from photos: as far as a delta's interval reaches
)


@dataclass(frozen=True)
class PairedMetric:
    """A metric of the base model and of an adapter, on the same prompts and seeds.

    Attributes:
        base, adapter: means over concepts of the means over prompts.
        delta: adapter minus base.
        delta_low, delta_high: 95 % interval of the paired difference; see `bootstrap_interval`.
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
    """A mean with its 95 % interval; see `bootstrap_interval`."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class KidMetric(IntervalMetric):
    """The `kid` of an adapter's images, and that of the base model's; real images of many kinds are far from both."""

    base: float


@dataclass(frozen=True)
class PhotoShare(IntervalMetric):
    """The share of the way from the base model to the photos.

    Attributes:
        ceiling: the metric of the photos.
        name: in files: `holdout_share` if they are holdout photos, `photo_share` if they are the instance images.
        metric: by which it is measured.
    """

    ceiling: float
    name: str = "photo_share"
    metric: str = "image_alignment"

    def to_dict(self) -> dict[str, float]:
        """The share as it is in metrics.json."""
        return {"value": self.value, "low": self.low, "high": self.high, "ceiling": self.ceiling}


def photo_share(
    metric: PairedMetric, ceiling: float, *, name: str = "photo_share", metric_name: str = "image_alignment"
) -> PhotoShare | None:
    """(adapter - base) / (ceiling - base) of an alignment, with the interval of the difference on the same scale.

    0: as far from the photos as the base model; 1: as near to them as they are to one another. The interval is of
    the prompts; it does not cover that the ceiling is of few photos.

    Args:
        metric: an alignment with the instance images.
        ceiling: the same of photos; see `leave_one_out_alignment`.
        name, metric_name: see `PhotoShare`.

    Returns:
        None if ceiling and base are nearer than `MIN_ROOM`.
    """
    room = ceiling - metric.base
    if room < MIN_ROOM:
        return None
    value, low, high = (round(each / room, DIGITS) for each in (metric.delta, metric.delta_low, metric.delta_high))
    return PhotoShare(value, low, high, round(ceiling, DIGITS), name, metric_name)


def paired_metric(
    base: Sequence[np.ndarray], adapter: Sequence[np.ndarray], *, resamples: int, seed: int
) -> PairedMetric:
    """Summarize one metric of base and adapter: one array per concept as for `bootstrap_interval`."""
    deltas = [np.asarray(after) - np.asarray(before) for before, after in zip(base, adapter, strict=True)]
    low, high = bootstrap_interval(deltas, resamples=resamples, seed=seed)
    before, after = (round(mean_over_groups(groups), DIGITS) for groups in (base, adapter))
    return PairedMetric(before, after, round(after - before, DIGITS), round(low, DIGITS), round(high, DIGITS))


def interval_metric(groups: Sequence[np.ndarray], *, resamples: int, seed: int) -> IntervalMetric:
    """Summarize one metric of one model: one array per concept as for `bootstrap_interval`."""
    low, high = bootstrap_interval(groups, resamples=resamples, seed=seed)
    return IntervalMetric(round(mean_over_groups(groups), DIGITS), round(low, DIGITS), round(high, DIGITS))


def mean_over_groups(groups: Sequence[np.ndarray]) -> float:
    """The mean over concepts of each concept's mean over prompts."""
    return float(np.mean([np.mean(group) for group in groups]))


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


def leave_one_out_alignment(instances: np.ndarray) -> float | None:
    """Image alignment of the photos themselves: the mean cosine of each instance image to all others.

    It is what a further photo of the subject would have, on average; an image is not compared with itself.

    Args:
        instances: (M, D), the concept's instance images.

    Returns:
        -1 to 1; None for fewer than two images.
    """
    count = len(instances)
    if count < 2:
        return None
    rows = instances.astype(np.float64)
    cosines = rows @ rows.T
    return float((cosines.sum() - np.trace(cosines)) / (count * (count - 1)))


def diversity(images: np.ndarray) -> float:
    """How different the images of a prompt are: the mean of 1 - cosine over all pairs.

    Args:
        images: (N, D), at least two.

    Returns:
        0 (all the same) to 2.
    """
    rows = images.astype(np.float64)
    first, second = np.triu_indices(len(rows), 1)
    return float(np.mean(1 - np.sum(rows[first] * rows[second], axis=1)))


def feature_distance(base: np.ndarray, adapter: np.ndarray) -> np.ndarray:
    """How far each image is from its counterpart: 1 - cosine.

    Args:
        base, adapter: (N, D), of the same prompts and seeds.

    Returns:
        (N,), 0 to 2.
    """
    return 1 - np.sum(base.astype(np.float64) * adapter.astype(np.float64), axis=1)


def follows_prompt(images: np.ndarray, prompts: np.ndarray, own: Sequence[int]) -> np.ndarray:
    """Whether no other prompt of the concept fits an image better than its own.

    All prompts name the same class, so it does not matter how well the judge knows the subject, as it does for the
    text alignment.

    Args:
        images: (N, D), generated images of one concept.
        prompts: (P, D), all prompts of the concept, without modifier tokens.
        own: row of each image's prompt.

    Returns:
        (N,), 0 or 1.
    """
    cosines = images.astype(np.float64) @ prompts.astype(np.float64).T
    return (cosines[np.arange(len(own)), list(own)] >= cosines.max(axis=1)).astype(np.float64)


def kid(generated: np.ndarray, real: np.ndarray) -> float:
    """Unbiased kernel distance of two sets of images (Binkowski et al. 2018): the squared MMD.

    The kernel is (x . y / D + 1)^3 of features of norm sqrt(D), that is (cos + 1)^3 of features of norm 1.

    Args:
        generated, real: (N, D) and (M, D), at least two each, of norm 1.

    Returns:
        About 0 for images of one distribution, also slightly below; larger is further apart.
    """
    x, y = generated.astype(np.float64), real.astype(np.float64)
    within = [
        (kernel.sum() - np.trace(kernel)) / (len(kernel) * (len(kernel) - 1)) for kernel in (_cubic(x, x), _cubic(y, y))
    ]
    return float(sum(within) - 2 * _cubic(x, y).mean())


def _cubic(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x @ y.T + 1) ** 3


def kid_metric(groups: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]], *, subsets: int, seed: int) -> KidMetric:
    """The mean `kid` over concepts, with the 95 % range of its value on random halves of both sets.

    A half has fewer images, so the range is wider than that of the value itself. Resampling with replacement would
    compare images with themselves, which the unbiased estimate leaves out.

    Args:
        groups: images of the base model, of the adapter, and real images of each concept, see `kid`.
        subsets: number of halves.
        seed: of numpy's generator.
    """
    rng = np.random.default_rng(seed)

    def half(features: np.ndarray) -> np.ndarray:
        return features[rng.permutation(len(features))[: max(2, len(features) // 2)]]

    values = [np.mean([kid(half(adapter), half(real)) for _, adapter, real in groups]) for _ in range(subsets)]
    low, high = (float(each) for each in np.quantile(values, [0.025, 0.975]))
    base, value = (float(np.mean([kid(group[i], group[2]) for group in groups])) for i in (0, 1))
    return KidMetric(round(value, DIGITS), round(low, DIGITS), round(high, DIGITS), round(base, DIGITS))


def bootstrap_interval(
    groups: Sequence[np.ndarray], *, resamples: int, seed: int, level: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean over groups of each group's mean.

    Prompts are resampled with replacement within their concept, as the mean is one over concepts. With several noise
    seeds the bootstrap is hierarchical: for each prompt that was drawn, its seeds are resampled with replacement as
    well (Davison and Hinkley 1997, section 3.8, strategy 2). Each prompt has noise of its own, so seeds are nested in
    prompts. The resampled means have the variance within prompts a second time, so an interval is rather too wide than
    too narrow where the noise decides (docs/comparison.md has the measured coverage).

    Args:
        groups: one array per concept: (P,), one value per prompt, or (P, S), one per prompt and noise seed. Differences
            of two models on the same prompts and seeds give the paired bootstrap.
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
        values = np.asarray(group, np.float64).reshape(len(group), -1)
        prompts, seeds = values.shape
        rows = rng.integers(prompts, size=(resamples, prompts))[:, :, None]
        columns = rng.integers(seeds, size=(resamples, prompts, seeds)) if seeds > 1 else 0
        means += values[rows, columns].mean(axis=(1, 2))
    low, high = np.quantile(means / len(groups), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
