"""Intervals and tests: the bootstrap over whole images, the sign-flip test, Holm's correction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Estimate", "interval"]

ScoresByImage = tuple[Sequence[float], Sequence[str]]
"""Scores [n], and the image [n] that each belongs to."""
_MIN_IMAGES, _MIN_USABLE = 2, 0.5


@dataclass(frozen=True)
class Estimate:
    """A number and the ends of its 95 % interval, None where there are too few images for one."""

    value: float
    low: float | None
    high: float | None


def estimate(value: float, draws: np.ndarray) -> Estimate:
    """The value with the percentiles of its bootstrap draws [draws]."""
    return Estimate(float(value), *percentile_ends(draws))


def bootstrap(values: np.ndarray, counts: np.ndarray, seed: int, draws: int = 2000) -> np.ndarray:
    """[usable draws, S, G] means over questions, from drawing whole images with replacement.

    Questions about one image are not independent, so whole images are drawn, each with all its questions in all groups.
    A draw that misses a group says nothing about the mean and is left out. None is usable, so that there is no
    interval, where a group has fewer than two images (its mean would never vary) or where half of the draws or more
    miss a group (those that are left would be chosen by what they hit).

    Args:
        values: [S, G, I] sums of each image's values in each group, of S settings.
        counts: [G, I] its questions.
        seed: the same seed and counts draw the same images.
    """
    images = counts.shape[1]
    none = np.empty((0, *values.shape[:2]))
    if (counts > 0).sum(axis=1).min() < _MIN_IMAGES:
        return none
    rng, usable = np.random.default_rng(seed), []
    flat = values.reshape(-1, images).T
    # In slices, so that memory stays small.
    for start in range(0, draws, 200):
        size = min(200, draws - start)
        times = rng.multinomial(images, np.full(images, 1 / images), size=size)  # [size, I]
        questions = times @ counts.T  # [size, G]
        # A draw without a question of a group has no mean for it.
        whole = questions.all(axis=1)
        usable.append((times[whole] @ flat).reshape(-1, *values.shape[:2]) / questions[whole][:, None, :])
    means = np.concatenate(usable)
    return means if len(means) > _MIN_USABLE * draws else none


def percentile_ends(draws: np.ndarray) -> tuple[float, float] | tuple[None, None]:
    """The percentiles of [draws] that hold 95 % of them; None where there are no draws."""
    if not len(draws):
        return None, None
    # Not 2.5: published intervals have been counted with this rounding of it.
    tail = 50 * (1 - 0.95)
    low, high = np.percentile(draws, [tail, 100 - tail])
    return float(low), float(high)


def interval(groups: Sequence[ScoresByImage], seed: int, draws: int = 2000) -> tuple[float, float] | tuple[None, None]:
    """The 95 % interval of the mean over groups of each group's mean score (see `bootstrap`).

    Where all scores are equal the interval is a point, which understates what is unknown; with too few images there is
    none.

    Args:
        groups: one (scores, images) for each task; one group for a single task.
        seed: the same seed and data give the same interval.
    """
    # Sorted, so that the same data in another order draw the same images.
    names = sorted({image for _, images in groups for image in images})
    place = {name: i for i, name in enumerate(names)}
    sums, counts = np.zeros((2, len(groups), len(names)))
    for group, (scores, images) in enumerate(groups):
        indices = [place[image] for image in images]
        np.add.at(sums[group], indices, np.asarray(scores, dtype=float))
        np.add.at(counts[group], indices, 1.0)
    return percentile_ends(bootstrap(sums[None], counts, seed, draws).mean(-1)[:, 0])


def sign_flip(shares: np.ndarray, seed: int, draws: int = 10000) -> np.ndarray:
    """[S] two-sided p-values that the sums over images of [S, I] are no more than chance.

    Under no difference each image's share could as well have had the other sign (a paired randomisation test, clustered
    by image). p = (1 + flips at least as far from 0) / (1 + draws).
    """
    # By hand: scipy.stats.permutation_test is the same test, but scipy is no dependency and 15 lines are less than it.
    rng = np.random.default_rng(seed)
    # Sums of the same shares round differently: an equal one must count as equally far.
    observed = np.abs(shares.sum(-1)) - 1e-12
    beyond = np.zeros(len(shares))
    for start in range(0, draws, 500):
        signs = rng.integers(0, 2, (min(500, draws - start), shares.shape[1])) * 2.0 - 1.0
        beyond += (np.abs(signs @ shares.T) >= observed).sum(axis=0)
    return (1 + beyond) / (1 + draws)


def holm(p: Sequence[float]) -> list[float]:
    """p-values corrected for their number (Holm 1979, step-down): below 0.05 all are right with 95 %.

    The smallest is multiplied by m, the next by m - 1, ...; none is below one before it, none above 1.
    """
    corrected, largest = [0.0] * len(p), 0.0
    for rank, index in enumerate(np.argsort(p, kind="stable")):
        largest = max(largest, min(1.0, (len(p) - rank) * p[index]))
        corrected[index] = largest
    return corrected
