"""Table of REPORT.md.

python -m experiments.grip_transfer.analyze
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from experiments.results import percent, read_json, table
from experiments.tables import fill
from gripvlm.eval.stats import bootstrap, percentile_ends

RESULTS = Path(__file__).parent / "results/transfer.json"
SCRATCH, WHOLE = ("random", 0), ("random", 200)
"""What shares of the gain are counted from, and up to."""
NAMES = {"kept": "the first lab's, as it is", "aligned": "its trunk, entry aligned", "new": "its trunk, new entry"}


def curves(content: dict[str, Any]) -> dict[tuple[str, int], np.ndarray]:
    """(start, steps) -> [questions] probability of the right answer, mean over budgets and seeds."""
    found = defaultdict(list)
    for row in content["rows"]:
        found[row["start"], row["steps"]].append(np.mean([*row["probability"].values()], axis=0))
    return {name: np.mean(runs, axis=0) for name, runs in found.items()}


def drawn(content: dict[str, Any], values: dict[tuple[str, int], np.ndarray]) -> np.ndarray:
    """[1 + draws, settings] means over families; the first row is the sample itself, others draw pictures."""
    families, pictures = (np.unique(content[name], return_inverse=True)[1] for name in ("families", "pictures"))
    shape = families.max() + 1, pictures.max() + 1
    counts, sums = np.zeros(shape), np.zeros((len(values), *shape))
    np.add.at(counts, (families, pictures), 1)
    for row, each in zip(sums, values.values(), strict=True):
        np.add.at(row, (families, pictures), each)
    itself = (sums.sum(-1) / counts.sum(-1)).mean(-1)
    return np.vstack((itself, bootstrap(sums, counts, seed=0).mean(-1)))


def transfer() -> str:
    content = read_json(RESULTS)
    values = curves(content)
    means = dict(zip(values, drawn(content, values).T, strict=True))
    seeds = defaultdict(int)
    for row in content["rows"]:
        seeds[row["start"], row["steps"]] += 1
    rows = []
    for (start, steps), each in sorted(means.items(), key=lambda item: (item[0][1], item[1][0])):
        gained = (each - means[SCRATCH]) / (means[WHOLE] - means[SCRATCH])
        low, high = percentile_ends(gained[1:])
        share = f"{gained[0]:.2f}" + (f" [{low:.2f}, {high:.2f}]" if (start, steps) not in (SCRATCH, WHOLE) else "")
        name = NAMES.get(start, start)
        rows.append([name, str(steps), str(seeds[start, steps]), percent(float(each[0])), share])
    return table(["start", "steps on `lab-dense`", "runs", "answer's probability", "share of the gain"], rows)


def tables() -> dict[str, dict[str, str]]:
    return {"experiments/grip_transfer/REPORT.md": {"transfer": transfer()}}


if __name__ == "__main__":
    for page, each in tables().items():
        fill(page, each)
