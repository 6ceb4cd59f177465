"""From per-sample records to rows: means, and bootstrap intervals clustered by image."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from gripvlm.tasks.base import Sample, Task, normalise

__all__ = ["SECONDS", "bootstrap", "ends", "interval", "majority", "mean_rows", "row"]

SECONDS = ("vision", "pruner", "overhead", "prefill", "decode")
Scored = tuple[Sequence[float], Sequence[str]]
"""Scores [n] and the image [n] each belongs to."""
_PICTURES, _USABLE = 2, 0.5


def bootstrap(values: np.ndarray, counts: np.ndarray, seed: int, draws: int = 2000) -> np.ndarray:
    """[usable draws, S, G] means over questions, from drawing whole pictures with replacement.

    Questions about one picture are not independent, so whole pictures are drawn, each with all its
    questions in all groups. A draw that misses a group says nothing about the mean and is left out.
    None is usable, so that there is no interval, where a group has fewer than two pictures (its
    mean would never vary) or where half of the draws or more miss a group (those that are left
    would be chosen by what they hit).

    Args:
        values: [S, G, I] sums of each picture's values in each group, of S settings.
        counts: [G, I] its questions.
        seed: the same seed and counts draw the same pictures.
    """
    images = counts.shape[1]
    none = np.empty((0, *values.shape[:2]))
    if (counts > 0).sum(axis=1).min() < _PICTURES:
        return none
    rng, found = np.random.default_rng(seed), []
    flat = values.reshape(-1, images).T
    for start in range(0, draws, 200):  # in slices, so that memory stays small
        size = min(200, draws - start)
        times = rng.multinomial(images, np.full(images, 1 / images), size=size)  # [size, I]
        seen = times @ counts.T  # [size, G]
        whole = seen.all(axis=1)
        found.append((times[whole] @ flat).reshape(-1, *values.shape[:2]) / seen[whole][:, None, :])
    usable = np.concatenate(found)
    return usable if len(usable) > _USABLE * draws else none


def ends(drawn: np.ndarray, level: float = 0.95) -> tuple[float, float] | tuple[None, None]:
    """The percentiles of draws [draws] that hold `level` of them; None where there are no draws."""
    if not len(drawn):
        return None, None
    tail = 50 * (1 - level)
    low, high = np.percentile(drawn, [tail, 100 - tail])
    return float(low), float(high)


def interval(
    groups: Sequence[Scored], seed: int, draws: int = 2000, level: float = 0.95
) -> tuple[float, float] | tuple[None, None]:
    """Percentile interval of the mean over groups of each group's mean score (see `bootstrap`).

    Where all scores are equal the interval is a point, which understates what is unknown; with too
    few pictures there is none.

    Args:
        groups: one (scores, images) for each task; one group for a single task.
        seed: the same seed and data give the same interval.
    """
    names = sorted({image for _, images in groups for image in images})
    place = {name: i for i, name in enumerate(names)}
    sums, counts = np.zeros((2, len(groups), len(names)))
    for g, (scores, images) in enumerate(groups):
        where = [place[image] for image in images]
        np.add.at(sums[g], where, np.asarray(scores, dtype=float))
        np.add.at(counts[g], where, 1.0)
    return ends(bootstrap(sums[None], counts, seed, draws).mean(-1)[:, 0], level)


def majority(task: Task, samples: Sequence[Sample]) -> tuple[str, float]:
    """The commonest answer, and the mean score of always giving it."""
    counts = Counter(normalise(sample.answer) for sample in samples)
    common = min(counts, key=lambda answer: (-counts[answer], answer))
    return common, float(np.mean([task.score(common, sample) for sample in samples]))


def row(
    head: dict[str, Any], records: Sequence[dict[str, Any]], blind: float | None, common: float, seed: int
) -> dict[str, Any]:
    """One line of the results: `head` (model, task, pruner, ...) and what its records say."""
    scores = [record["score"] for record in records]
    low, high = interval([(scores, [record["image_id"] for record in records])], seed)
    peaks = [record["peak_memory"] for record in records if record.get("peak_memory") is not None]
    times = {f"seconds_{name}": float(np.mean([record["seconds"][name] for record in records])) for name in SECONDS}
    return {
        **head,
        "keep_fraction": float(np.mean([record["k"] / record["n"] for record in records])),
        "tokens": float(np.mean([record["k"] for record in records])),
        "score": float(np.mean(scores)),
        "ci_low": low,
        "ci_high": high,
        "n": len(records),
        "blind": blind,
        "majority": common,
        **times,
        "seconds_total": sum(times.values()),
        "peak_memory": max(peaks, default=None),
    }


def mean_rows(rows: Sequence[dict[str, Any]], scored: dict[tuple[str, str, str], Scored], seed: int) -> list[dict]:
    """One row for each pruner and keep: the plain mean over tasks, with its own interval.

    Args:
        rows: as `row` made them, all tasks.
        scored: (task, pruner, keep) -> scores and images.
    """
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for one in rows:
        groups.setdefault((one["pruner"], str(one["keep"])), []).append(one)
    means = []
    for (pruner, keep), members in groups.items():
        if len(members) < 2:
            continue
        low, high = interval([scored[one["task"], pruner, keep] for one in members], seed)
        averaged = ["keep_fraction", "tokens", "score", "majority", "seconds_total", *(f"seconds_{s}" for s in SECONDS)]
        if all(one["blind"] is not None for one in members):
            averaged.append("blind")
        peaks = [one["peak_memory"] for one in members if one["peak_memory"] is not None]
        means.append(
            members[0]
            | {"task": "mean", "ci_low": low, "ci_high": high, "n": sum(one["n"] for one in members), "extras": {}}
            | {"peak_memory": max(peaks, default=None)}
            | {name: float(np.mean([one[name] for one in members])) for name in averaged}
        )
    return means
