"""Results files made up for tests: as `gripvlm eval` writes them, with scores from a formula and no model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from gripvlm.eval.journal import samples_path
from gripvlm.eval.results import SCHEMA, make_row, mean_rows, write_result

ARMS = (("random:seed=0", 0.5), ("random:seed=1", 0.5), ("grid", 0.6), ("mine", 0.75))
KEEPS = (0.5, 0.1, 0.025)
TASKS = ("lab/reading", "lab/text")
FULL_SECONDS = 0.1


def header(**changes: Any) -> dict[str, Any]:
    """A header that the schema allows."""
    plain = {
        "model": "m",
        "weights": "abc",
        "tasks": [f"{task} (80, 1234)" for task in TASKS],
        "arms": ["full 1.0 {}"],
        "limit": None,
        "seed": 0,
        "batch_size": 4,
        "positions": "original",
        "dtype": "float32",
        "device": "cpu",
        "versions": {"torch": "2"},
        "command": "gripvlm eval --model m",
        "git": {"commit": "0" * 40, "dirty": False},
        "hardware": {"processor": "an abacus", "cores": 2},
        "attention": "sdpa",
        "finished": "2026-01-01T00:00:00+00:00",
        "seconds": 1.0,
        "sessions": [],
    }
    return plain | changes


def made_up(
    out: Path,
    arms: tuple[tuple[str, float], ...] = ARMS,
    keeps: tuple[float, ...] = KEEPS,
    seed: int = 0,
    pictures: int = 40,
    answers: bool = True,
    **changes: Any,
) -> Path:
    """Two questions a picture and task; a pruner's score falls with the budget, faster the worse it is."""
    rng = np.random.default_rng(seed)
    hard = {task: rng.random((pictures, 2)) for task in TASKS}
    records, rows, scored = [], [], {}
    for t, task in enumerate(TASKS):
        for arm, keep in [("full", 1.0), *((arm, keep) for arm, _ in arms for keep in keeps)]:
            skill = 0.9 if arm == "full" else dict(arms)[arm] * (1 + 0.12 * np.log2(keep)) + 0.1 * (keep >= 0.5)
            noise = rng.normal(0, 0.08, (pictures, 2)) * (arm != "full")
            right = hard[task] + noise < skill - 0.1 * t
            mine = [
                {
                    "task": task,
                    "pruner": arm,
                    "keep": str(keep),
                    "id": f"{i}-{j}",
                    "image_id": f"p{i}",
                    "answer": "yes",
                    "prediction": "yes" if right[i, j] else "no",
                    "score": float(right[i, j]),
                    "k": int(256 * keep),
                    "n": 256,
                    "seconds": dict.fromkeys(
                        ("vision", "pruner", "overhead", "prefill", "decode"), FULL_SECONDS * (0.5 + 0.5 * keep) / 5
                    ),
                    "peak_memory": None,
                }
                for i in range(pictures)
                for j in range(2)
            ]
            head = {"model": "m", "task": task, "pruner": arm, "pruner_config": {"name": arm.partition(":")[0]}}
            head |= {"keep": keep, "trained": arm == "mine"}
            rows.append(make_row(head, mine, 0.2, 0.5, 0) | {"extras": {}})
            scored[task, arm, str(keep)] = ([r["score"] for r in mine], [r["image_id"] for r in mine])
            records += mine
    result = {"schema": SCHEMA, "header": header(**changes), "rows": rows, "means": mean_rows(rows, scored, 0)}
    result["samples"] = samples_path(out).name
    out.parent.mkdir(parents=True, exist_ok=True)
    if answers:
        lines = [{"config": header(**changes)}, *records]
        samples_path(out).write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_result(out, result)
    return out
