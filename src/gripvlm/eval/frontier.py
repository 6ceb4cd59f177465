"""Accuracy against cost: the Pareto frontier, its hypervolume, and the time to equal accuracy."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from gripvlm.eval.estimates import LEVEL, Estimate, estimate
from gripvlm.eval.schema import ResultsError
from gripvlm.eval.scores import Scores
from gripvlm.eval.variants import FULL, ORACLE

__all__ = ["EqualTime", "hypervolumes", "pareto", "time_to_accuracy", "usual_budgets"]

_SAME = 1e-12


@dataclass(frozen=True)
class EqualTime:
    """How long a method takes to be as accurate as the reference.

    Attributes:
        method: its name.
        setting: its fastest setting that is as accurate, by number; None where none is.
        ratio: that setting's time / the reference setting's, inf where none is as accurate.
        low, high: 95 % interval of the ratio; inf where draws in which it is never as accurate reach into it.
        reached: the share of draws in which it has a setting that is as accurate.
    """

    method: str
    setting: int | None
    ratio: float
    low: float
    high: float
    reached: float


def pareto(cost: Sequence[float], score: Sequence[float]) -> list[int]:
    """Numbers of the points that no other beats: none costs at most as much and scores more, or less and as much."""
    found, best = [], -np.inf
    for i in sorted(range(len(cost)), key=lambda i: (cost[i], -score[i])):
        if score[i] > best:
            found.append(i)
            best = score[i]
    return found


def usual_budgets(budgets: Collection[frozenset[int | float | str]]) -> frozenset[int | float | str]:
    """Of the methods' sets of budgets the commonest one; of several as common the largest."""
    return max(budgets, key=lambda keeps: (sum(keeps == one for one in budgets), len(keeps)))


def hypervolumes(scores: Scores, floor: float = 0.0, axis: str = "log") -> dict[str, Estimate | None]:
    """Method -> the area below its frontier of mean score over the share of tokens kept.

    Reference point: all tokens kept (share 1) and the score `floor`. A setting covers all shares
    from its own up to 1, between `floor` and its mean score; the area is of what the settings
    cover together, with the logarithm of the share as the axis (`axis="linear"`: the share itself),
    divided by the area of a method that would score as the full model from the smallest share on.
    So 1 is the full model's accuracy at the smallest budget, 0 is `floor` everywhere. Shares are as
    achieved.

    None where a method was not measured at the budgets that most were (`usual_budgets`), which would
    not compare.
    """
    if axis not in ("log", "linear"):
        raise ResultsError(f"axis {axis!r}: type log or linear")
    full = scores.index(FULL)
    methods = dict.fromkeys(one.method for one in scores.settings if not one.full)
    if full is None or not methods:
        return dict.fromkeys(methods)
    budgets = {m: frozenset(one.keep for one in scores.settings if one.method == m) for m in methods}
    usual = usual_budgets(budgets.values())
    smallest = min(one.kept for one in scores.settings if budgets.get(one.method) == usual)
    if smallest >= 1:
        return dict.fromkeys(methods)
    place = np.log if axis == "log" else lambda share: share
    drawn, means = scores.drawn.mean(-1), scores.means.mean(-1)
    found: dict[str, Estimate | None] = {}
    for method in methods:
        mine = [s for s, one in enumerate(scores.settings) if one.method == method]
        if budgets[method] != usual:
            found[method] = None
            continue
        mine.sort(key=lambda s: scores.settings[s].kept)
        edges = place(np.array([*(scores.settings[s].kept for s in mine), 1.0]))
        wide = np.diff(edges) / (place(1.0) - place(smallest))
        both = np.concatenate([means[None], drawn])
        heights = np.maximum.accumulate(np.clip(both[:, mine] - floor, 0, None), axis=1)
        whole = np.clip(both[:, full] - floor, _SAME, None)
        area = (heights * wide).sum(-1) / whole
        found[method] = estimate(area[0], area[1:])
    return found


def time_to_accuracy(
    scores: Scores, keep: int | float | str | None = None, within: float = 0.0
) -> tuple[int, list[EqualTime]]:
    """For each method the fastest setting that reaches the reference's accuracy, as a ratio of times.

    The reference is the most accurate heuristic at the budget `keep`, or with None the full model.
    The interval is from a bootstrap over pictures in which everything is chosen anew: the best
    heuristic, its accuracy, and every method's fastest setting that reaches it; so it holds what
    the choice adds to the uncertainty. Times are drawn with their pictures; what another run of
    the clock would add is not in it.

    Args:
        keep: as asked.
        within: how much of the mean score may be missing.

    Returns:
        The reference setting's number, and one `EqualTime` a method; `oracle` is left out.

    Raises:
        ResultsError: no heuristic was measured at `keep`, no full model, too few pictures for an
            interval, or the settings were not measured in one run, so that their times do not compare.
    """
    if len({one.file for one in scores.settings}) > 1:
        raise ResultsError("times of several runs do not compare: pass the results of one run")
    if not len(scores.drawn):
        raise ResultsError("there are too few pictures for an interval: ask about more of them (a larger --limit)")
    full = scores.index(FULL)
    pool = [s for s, one in enumerate(scores.settings) if one.heuristic and one.keep == keep]
    pool = [full] if keep is None and full is not None else pool
    if not pool:
        raise ResultsError(
            f"no training-free method was measured at keep {keep}: type one of {', '.join(map(str, scores.keeps))}"
            if keep is not None
            else "the full model was not measured"
        )
    accuracy = np.concatenate([scores.means.mean(-1)[None], scores.drawn.mean(-1)])  # [1 + draws, S]
    seconds = np.concatenate([scores.times[None], scores.drawn_times])
    lines = np.arange(len(accuracy))
    best = np.array(pool)[accuracy[:, pool].argmax(axis=1)]
    target, time = accuracy[lines, best] - within - _SAME, seconds[lines, best]
    found = []
    for method in dict.fromkeys(one.method for one in scores.settings):
        if method in (FULL, ORACLE):
            continue
        mine = np.array([s for s, one in enumerate(scores.settings) if one.method == method])
        cost = np.where(accuracy[:, mine] >= target[:, None], seconds[:, mine], np.inf)
        ratio = cost.min(axis=1) / time
        drawn, tail = np.sort(ratio[1:]), (1 - LEVEL) / 2
        low, high = (drawn[min(len(drawn) - 1, int(share * len(drawn)))] for share in (tail, 1 - tail))
        setting = int(mine[cost[0].argmin()]) if np.isfinite(ratio[0]) else None
        reached = float(np.isfinite(drawn).mean())
        found.append(EqualTime(method, setting, float(ratio[0]), float(low), float(high), reached))
    return int(best[0]), sorted(found, key=lambda one: (one.ratio, one.low))
