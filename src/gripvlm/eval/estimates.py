"""What scores say: intervals, paired differences with Holm's correction, relative accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gripvlm.eval.schema import ResultsError
from gripvlm.eval.scores import Scores
from gripvlm.eval.statistics import ends
from gripvlm.eval.variants import FULL

__all__ = ["Difference", "Estimate", "absolute", "differences_from", "estimate", "holm", "relative", "sign_flip"]

LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A number and the ends of its 95 % interval, None where there are too few pictures for one."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Difference:
    """A setting minus the baseline, question by question.

    Attributes:
        setting: its number in `Scores.settings`.
        by_task: one for each task.
        mean: over tasks.
        p: of no difference in the mean, two-sided, from sign flips (see `sign_flip`).
        p_holm: the same after Holm's correction for all settings that were compared.
    """

    setting: int
    by_task: tuple[Estimate, ...]
    mean: Estimate
    p: float
    p_holm: float


def estimate(value: float, drawn: np.ndarray) -> Estimate:
    """The value with the percentiles of its bootstrap draws [draws]."""
    return Estimate(float(value), *ends(drawn, LEVEL))


def absolute(scores: Scores) -> list[tuple[Estimate, ...]]:
    """[S] settings: the score in each task, then the plain mean over tasks."""
    drawn, means = scores.drawn, scores.means
    return [
        (
            *(estimate(means[s, g], drawn[:, s, g]) for g in range(len(scores.tasks))),
            estimate(means[s].mean(), drawn[:, s].mean(-1)),
        )
        for s in range(len(scores.settings))
    ]


def relative(scores: Scores) -> list[Estimate | None]:
    """[S] settings: the mean over tasks of score / the full model's score; None where a full score is 0.

    Both are drawn on the same pictures, so the interval is of the ratio. Draws in which the full
    model scores nothing in a task are left out; where those are half or more there is no interval.
    """
    full = scores.index(FULL)
    if full is None or not scores.means[full].all():
        return [None] * len(scores.settings)
    drawn = scores.drawn
    usable = np.flatnonzero(drawn[:, full].all(axis=-1))
    if len(usable) <= len(drawn) / 2:
        usable = usable[:0]
    ratios = (drawn[usable] / drawn[usable][:, full, None]).mean(-1)
    exact = (scores.means / scores.means[full]).mean(-1)
    return [estimate(exact[s], ratios[:, s]) for s in range(len(scores.settings))]


def sign_flip(shares: np.ndarray, seed: int, draws: int = 10000) -> np.ndarray:
    """[S] two-sided p-values that the sums over pictures of [S, I] are no more than chance.

    Under no difference each picture's share could as well have had the other sign (a paired
    randomisation test, clustered by picture). p = (1 + flips at least as far from 0) / (1 + draws).
    """
    rng = np.random.default_rng(seed)
    seen = np.abs(shares.sum(-1)) - 1e-12
    beyond = np.zeros(len(shares))
    for start in range(0, draws, 500):
        signs = rng.integers(0, 2, (min(500, draws - start), shares.shape[1])) * 2.0 - 1.0
        beyond += (np.abs(signs @ shares.T) >= seen).sum(axis=0)
    return (1 + beyond) / (1 + draws)


def holm(p: Sequence[float]) -> list[float]:
    """p-values corrected for their number (Holm 1979, step-down): below 0.05 all are right with 95 %.

    The smallest is multiplied by m, the next by m - 1, ...; none is below one before it, none above 1.
    """
    found, worst = [0.0] * len(p), 0.0
    for rank, index in enumerate(np.argsort(p, kind="stable")):
        worst = max(worst, min(1.0, (len(p) - rank) * p[index]))
        found[index] = worst
    return found


def differences_from(scores: Scores, baseline: str) -> list[Difference]:
    """Every other method minus the baseline at the same asked budget; `full` serves for every budget.

    Holm's correction is over all of these differences of means together.

    Raises:
        ResultsError: no such method.
    """
    if not any(one.method == baseline for one in scores.settings):
        names = dict.fromkeys(one.method for one in scores.settings)
        raise ResultsError(f"no method {baseline!r} to compare with: type one of {', '.join(names)}")
    pairs = []
    for s, one in enumerate(scores.settings):
        b = scores.index(baseline, one.keep)
        if b is not None and one.method != baseline and not one.full:
            pairs.append((s, b))
    if not pairs:
        return []
    drawn, means, total = scores.drawn, scores.means, scores.counts.sum(-1)
    mine, theirs = (np.array(side) for side in zip(*pairs, strict=True))
    shares = ((scores.sums[mine] - scores.sums[theirs]) / total[:, None]).mean(axis=1)
    p = sign_flip(shares, scores.seed)
    corrected = holm(p.tolist())
    return [
        Difference(
            s,
            tuple(
                estimate(means[s, g] - means[b, g], drawn[:, s, g] - drawn[:, b, g]) for g in range(len(scores.tasks))
            ),
            estimate((means[s] - means[b]).mean(), (drawn[:, s] - drawn[:, b]).mean(-1)),
            float(p[n]),
            corrected[n],
        )
        for n, (s, b) in enumerate(pairs)
    ]
