"""How well images follow their prompts and their concept: the figures of the paper, on unit vectors.

Every function takes embeddings as rows of norm 1, so that a dot product is a cosine, and computes in float64.
"""

import re
from collections.abc import Sequence

import numpy as np

CLIPSCORE_WEIGHT = 2.5


def without_token(prompt: str, *tokens: str) -> str:
    """A prompt without its modifier tokens: "photo of a <new1> cat" -> "photo of a cat".

    The paper grades against this text (section 4, and the prompts of CustomConcept101): the judge has never
    seen the token, and the class word stays.
    """
    for token in tokens:
        prompt = re.sub(rf"(?<!\S){re.escape(token)}(?!\S)", " ", prompt)
    return " ".join(prompt.split())


def text_alignment(images: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """CLIPScore (Hessel et al. 2021) without its prefix, as in the paper's code: 2.5 * max(cos, 0).

    Args:
        images: (N, D), one row an image.
        texts: (N, D), the prompt of each image, modifier token removed.

    Returns:
        (N,), 0 to 2.5.
    """
    cosines = np.sum(images.astype(np.float64) * texts.astype(np.float64), axis=1)
    return CLIPSCORE_WEIGHT * np.maximum(cosines, 0)


def image_alignment(images: np.ndarray, instances: np.ndarray) -> np.ndarray:
    """Each image's mean cosine to all instance images; their mean is the paper's mean pairwise cosine.

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
        groups: one array a concept, one value a prompt. Prompts are resampled within their concept, so that
            the interval belongs to the figure beside it, a mean over concepts.
        resamples: how many times.
        seed: of numpy's generator.
        level: share of resampled means that lies inside.

    Returns:
        The interval's ends, low and high.

    Raises:
        ValueError: no group, or an empty one.
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


def kernel_distance(first: np.ndarray, second: np.ndarray) -> float:
    """KID (Binkowski et al. 2018): unbiased squared MMD under the kernel (x.y / D + 1)^3, over whole sets.

    Zero in expectation for two sets of one distribution, and so at times below zero. Features of any norm.

    Args:
        first, second: (N, D) and (M, D), at least two rows each.

    Raises:
        ValueError: a set has fewer than two rows.
    """
    x, y = first.astype(np.float64), second.astype(np.float64)
    n, m = len(x), len(y)
    if min(n, m) < 2:
        raise ValueError(f"kernel distance needs two rows or more on each side (here: {n} and {m})")

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a @ b.T / a.shape[1] + 1) ** 3

    within = [(k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in (kernel(x, x), kernel(y, y))]
    return float(sum(within) - 2 * kernel(x, y).mean())
