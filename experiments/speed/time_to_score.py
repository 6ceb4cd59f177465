"""How long each pruner takes to reach a score: the scores of `lab-dense`, the times of shapes that were measured.

The scores are those of one model and the times mostly of others, so this says what pruning as well as on `lab-dense`
would be worth at these sizes, not what it is worth.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from experiments.results import BUDGETS, Result, load, read_json
from gripvlm.eval.stats import bootstrap, percentile_ends

GRIP = "grip_scorer_lab-dense"
FREE = ("grid", "pool", "mmr_norm")
"""The best training-free pruners of lab_dense's table at 25, 12.5 and 6 %."""
SHAPES = {
    "lab-dense itself, CPU, batch 1": ("speed/results/cpu_lab-dense.json", 1, "grip:scorer=lab-dense"),
    "lab-dense itself, CPU, batch 16": ("speed/results/cpu_lab-dense.json", 16, "grip:scorer=lab-dense"),
    "0.5 B, CPU, batch 1": ("speed/results/cpu_llava-0.5b.json", 1, "grip"),
    "LLaVA 7 B, H200, batch 1": ("gpu/results/h200_bench-llava-1.5-7b.json", 1, "grip"),
    "LLaVA 7 B, H200, batch 32": ("gpu/results/h200_bench-llava-1.5-7b.json", 32, "grip"),
}
"""What ran -> its file, batch size, and the pruner whose time the trained scorer has there."""
BELOW = (0.01, 0.02, 0.05)
"""Scores that are to be reached: so far below that of all tokens."""


def times(file: str, batch: int, pruner: str | None) -> tuple[list[float], list[float]]:
    """(shares of the tokens, shares of the unpruned time), ascending; None: tokens that nobody had to choose."""
    rows = [row for row in read_json(file)["rows"] if row["batch"] == batch and row["kind"] != "full"]
    found = {row["keep"]: row["to_full"]["whole"]["median"] for row in rows if row["pruner"] == pruner}
    shares = sorted(found)
    return [*shares, 1.0], [*(found[each] for each in shares), 1.0]


def reached(scores: np.ndarray, target: np.ndarray) -> np.ndarray:
    """[draws] the least share of the tokens that reaches target [draws], between budgets on a logarithmic axis.

    Args:
        scores: [draws, budgets], from few tokens to all.
    """
    budgets = np.log([*map(float, reversed(BUDGETS)), 1.0])
    best = np.maximum.accumulate(scores, axis=1)
    first = (best >= target[:, None]).argmax(1)
    row, before = np.arange(len(best)), np.maximum(first - 1, 0)
    low, high = best[row, before], best[row, first]
    part = np.where(high > low, (target - low) / np.where(high > low, high - low, 1), 1.0)
    found = budgets[before] + np.clip(part, 0, 1) * (budgets[first] - budgets[before])
    return np.exp(np.where(first == 0, budgets[0], found))


def drawn(results: dict[str, list[Result]]) -> dict[str, np.ndarray]:
    """Pruner -> [1 + draws, budgets] mean over families; the first row is the sample itself, others draw pictures."""
    questions = results["full"][0].questions
    pictures = sorted({name.partition("-")[0] for ids in questions.values() for name in ids})
    belongs = [np.array([pictures.index(name.partition("-")[0]) for name in ids]) for ids in questions.values()]
    counts = np.stack([np.bincount(index, minlength=len(pictures)) for index in belongs])
    settings = [(name, budget) for name in results for budget in (*reversed(BUDGETS), "1.0")]
    sums = np.zeros((len(settings), *counts.shape))
    for row, (name, budget) in enumerate(settings):
        runs = [result.correct(budget) for result in results["full" if budget == "1.0" else name]]
        for group, (family, index) in enumerate(zip(questions, belongs, strict=True)):
            right = np.mean([run[family] for run in runs], axis=0)
            sums[row, group] = np.bincount(index, right, minlength=len(pictures))
    itself = (sums.sum(-1) / counts.sum(-1)).mean(-1)
    means = np.vstack((itself, bootstrap(sums, counts, seed=0).mean(-1)))
    return dict(zip(results, np.split(means, len(results), axis=1), strict=True))


def to_score() -> list[dict[str, Any]]:
    """For each shape and target: share of the unpruned time of the scorer and of the fastest training-free pruner."""
    curves = drawn(load("lab_dense/results/large"))
    rows = []
    for shape, (file, batch, pruner) in SHAPES.items():
        for below in BELOW:
            target = curves["full"][:, -1] - below
            ours = np.interp(reached(curves[GRIP], target), *times(file, batch, pruner))
            # The fastest of all, in each draw anew, and at no cost of its own: both favour them.
            needed = np.min([reached(curves[name], target) for name in FREE], axis=0)
            theirs = np.interp(needed, *times(file, batch, None))
            rows.append(
                {"shape": shape, "below": below, "grip": _interval(ours), "free": _interval(theirs)}
                | {"ratio": _interval(ours / theirs)}
            )
    return rows


def _interval(values: np.ndarray) -> tuple[float, ...]:
    """The sample's own value, and where 95 % of the draws lie."""
    return float(values[0]), *(float(end) for end in percentile_ends(values[1:]) if end is not None)
