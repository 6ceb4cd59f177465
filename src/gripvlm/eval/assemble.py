"""From answers to a results file: one record a sample, rows and means of complete records."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from gripvlm.errors import GripError
from gripvlm.eval.answering import Outcome
from gripvlm.eval.chunks import Chunk
from gripvlm.eval.journal import Key
from gripvlm.eval.kept import packed
from gripvlm.eval.schema import SCHEMA, checked_result
from gripvlm.eval.statistics import Scored, majority, mean_rows, row
from gripvlm.eval.variants import BLIND, Arm
from gripvlm.models.encoded import Encoded, Item
from gripvlm.tasks import Sample, Task
from gripvlm.types import Selection
from gripvlm.utils import disk

__all__ = ["assembled", "sample_records", "utc", "write_result"]


def _whole(number: float) -> int | float:
    """An int where it is one, so that counts look like counts."""
    return int(number) if number == int(number) else round(number, 4)


def sample_records(chunk: Chunk, arm: Arm, outcome: Outcome, encoded: Encoded) -> list[dict[str, Any]]:
    """One record a sample; the batch's seconds are shared out evenly. `kept` has one entry a visual item (see `packed`)
    where rows are dropped before the language model."""
    share = {name: seconds / len(chunk.samples) for name, seconds in outcome.seconds.items()}
    return [
        {
            "task": chunk.task.name,
            "pruner": arm.label,
            "keep": arm.keep_text,
            "id": sample.id,
            "image_id": sample.image_id,
            "answer": sample.answer,
            "prediction": prediction,
            "score": _scored(chunk.task, prediction, sample),
            "k": _whole(sum(selection.paid for selection in selections)),
            "n": sum(selection.n for selection in selections),
            "seconds": share,
            "peak_memory": outcome.peak_memory,
            **_what_was_kept(selections, items),
        }
        for sample, prediction, selections, items in zip(
            chunk.samples, outcome.predictions, outcome.selections, encoded.samples, strict=True
        )
    ]


def _scored(task: Task, prediction: str, sample: Sample) -> float:
    score = float(task.score(prediction, sample))
    if not math.isfinite(score):
        raise GripError(f"task {task.name!r} scores sample {sample.id!r} with {score}: return a finite number")
    return score


def _what_was_kept(selections: Sequence[Selection], items: Sequence[Item]) -> dict[str, Any]:
    if any(selection.layers for selection in selections):
        return {"layers": [selection.counts for selection in selections]}
    if not selections:
        return {}
    return {"kept": [packed(selection, item) for selection, item in zip(selections, items, strict=True)]}


def assembled(
    name: str,
    config: Mapping[str, Any],
    arms: Sequence[Arm],
    tasks: Sequence[Task],
    drawn: Mapping[str, list[Sample]],
    asked: Mapping[str, list[Sample]],
    kept: Mapping[Key, dict[str, Any]],
    seed: int,
) -> dict[str, Any]:
    """Header, rows and means from complete records.

    Args:
        drawn: all samples of each task, whose commonest answer counts.
        asked: those of them that have records; fewer in a shard.
        kept: every record by its key.
    """
    rows: list[dict[str, Any]] = []
    scored: dict[tuple[str, str, str], Scored] = {}
    for task in tasks:
        if task.name not in asked:  # a shard without any of its batches
            continue
        mine = asked[task.name]
        common, common_score = majority(task, drawn[task.name])

        def of(arm: Arm, task: Task = task, mine: list[Sample] = mine) -> list[dict[str, Any]]:
            return [kept[task.name, arm.label, arm.keep_text, sample.id] for sample in mine]

        blind = next((sum(r["score"] for r in of(arm)) / len(mine) for arm in arms if arm.label == BLIND), None)
        for arm in arms:
            if arm.label == BLIND:
                continue
            records = of(arm)
            head = {
                "model": name,
                "task": task.name,
                "pruner": arm.label,
                "pruner_config": arm.config,
                "keep": arm.keep,
                "trained": arm.trained,
            }
            extras = {"majority_answer": common, **task.summary(records)}
            rows.append(row(head, records, blind, common_score, seed) | {"extras": extras})
            scored[task.name, arm.label, arm.keep_text] = (
                [record["score"] for record in records],
                [record["image_id"] for record in records],
            )
    return {"schema": SCHEMA, "header": dict(config), "rows": rows, "means": mean_rows(rows, scored, seed)}


def write_result(target: Path, result: Mapping[str, Any]) -> None:
    """Checked against the published schema, then written; never half of it.

    Raises:
        ResultsError: a task's own numbers are none that the schema allows.
    """
    checked_result(json.loads(json.dumps(result)), str(target))
    disk.write(target, json.dumps(result, indent=1, ensure_ascii=False) + "\n")


def utc() -> str:
    """Now, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
