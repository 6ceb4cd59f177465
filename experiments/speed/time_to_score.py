"""How long each pruner takes to reach a score: the scores of `lab-dense`, the times of shapes that were measured.

The scores are those of one model and the times mostly of others, so this says what pruning as well as on `lab-dense`
would be worth at these sizes, not what it is worth.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.results import BUDGETS, Result, load, read_json

GRIP = "grip_scorer_lab-dense"
TRAINED = (GRIP, "grip_scorer_lab-dense-blind")
"""Not among the training-free pruners, nor are `full` and `oracle`, which is given the answer's evidence."""
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
DRAWS = 2000


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
    """Pruner -> [1 + DRAWS, budgets] mean over families; the first row is the sample itself, others draw pictures."""
    random, questions = np.random.default_rng(0), results["full"][0].questions
    counts = {}
    for family, ids in questions.items():
        pictures = [name.partition("-")[0] for name in ids]
        known, index = np.unique(pictures, return_inverse=True)
        chosen = random.multinomial(len(known), np.full(len(known), 1 / len(known)), DRAWS)
        counts[family] = np.vstack((np.ones(len(ids)), chosen[:, index]))
    found = {}
    for name, runs in results.items():
        columns = []
        for budget in (*reversed(BUDGETS), "1.0"):
            result = results["full"] if budget == "1.0" else runs
            right = [each.correct(budget) for each in result]
            families = []
            for family, weights in counts.items():
                values = np.mean([each[family] for each in right], axis=0)
                families.append(weights @ values / weights.sum(1))
            columns.append(np.mean(families, axis=0))
        found[name] = np.stack(columns, axis=1)
    return found


def to_score() -> list[dict[str, Any]]:
    """For each shape and target: share of the unpruned time of the scorer and of the fastest training-free pruner."""
    results = load("lab_dense/results/input")
    curves = drawn({name: runs for name, runs in results.items() if name != "oracle"})
    free = [name for name in curves if name not in (*TRAINED, "full")]
    rows = []
    for shape, (file, batch, pruner) in SHAPES.items():
        for below in BELOW:
            target = curves["full"][:, -1] - below
            ours = np.interp(reached(curves[GRIP], target), *times(file, batch, pruner))
            # The fastest of all, in each draw anew, and at no cost of its own: both favour them.
            needed = np.min([reached(curves[name], target) for name in free], axis=0)
            theirs = np.interp(needed, *times(file, batch, None))
            rows.append(
                {"shape": shape, "below": below, "grip": _interval(ours), "free": _interval(theirs)}
                | {"ratio": _interval(ours / theirs)}
            )
    return rows


def _interval(values: np.ndarray) -> Sequence[float]:
    """The sample's own value, and 95 % of the draws."""
    low, high = np.quantile(values[1:], (0.025, 0.975))
    return float(values[0]), float(low), float(high)
