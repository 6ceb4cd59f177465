"""From per-sample records to rows: means, and bootstrap intervals clustered by image."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from gripvlm.tasks.base import Sample, Task, normalise

__all__ = ["SECONDS", "interval", "majority", "mean_rows", "row"]

SECONDS = ("vision", "pruner", "surgery", "prefill", "decode")
Scored = tuple[Sequence[float], Sequence[str]]
"""Scores [n] and the image [n] each belongs to."""


def interval(
    groups: Sequence[Scored], seed: int, draws: int = 2000, level: float = 0.95
) -> tuple[float, float] | tuple[None, None]:
    """Percentile bootstrap of the mean over groups of each group's mean score, resampling images.

    Questions about one picture are not independent, so whole pictures are drawn, with replacement,
    each with all its questions in all groups. Where all scores are equal the interval is a point,
    which understates what is unknown; with fewer than two pictures there is none.

    Args:
        groups: one (scores, images) for each task; one group for a single task.
        seed: the same seed and data give the same interval.
    """
    names = sorted({image for _, images in groups for image in images})
    if len(names) < 2:
        return None, None
    place = {name: i for i, name in enumerate(names)}
    sums, counts = np.zeros((2, len(groups), len(names)))
    for g, (scores, images) in enumerate(groups):
        where = [place[image] for image in images]
        np.add.at(sums[g], where, np.asarray(scores, dtype=float))
        np.add.at(counts[g], where, 1.0)
    rng = np.random.default_rng(seed)
    means = []
    for start in range(0, draws, 200):  # in slices, so that memory stays small
        size = min(200, draws - start)
        times = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=size)  # [size, images]
        seen = times @ counts.T  # [size, groups]
        whole = seen.all(axis=1)  # a draw that misses a group says nothing about the mean
        means.append(((times @ sums.T)[whole] / seen[whole]).mean(axis=1))
    tail = 50 * (1 - level)
    low, high = np.percentile(np.concatenate(means), [tail, 100 - tail])
    return float(low), float(high)


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
