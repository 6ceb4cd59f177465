"""The points of a comparison: one method at one budget, its scores, time as a ratio, and the command that makes it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gripvlm.budget import Budget
from gripvlm.errors import GripError
from gripvlm.eval.results import Results
from gripvlm.eval.scores import Scores, absolute, scores_of, was_trained
from gripvlm.eval.variants import FULL
from gripvlm.report.tables import with_means
from gripvlm.tasks.lab_tasks import FAMILIES

__all__ = ["Cell", "Comparison", "Point", "command_of", "comparisons", "keep_text"]


@dataclass(frozen=True)
class Cell:
    """A score and its 95 % interval, None where it is not known."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Point:
    """One method at one budget.

    Attributes:
        method, keep, kept, tokens, trained, seeds: as in `Setting`.
        cells: one for each task.
        mean: over tasks.
        ratio: its time a question / the full model's in the same run.
        file: the number of its results file in the comparison.
        command: what to type for it alone.
    """

    method: str
    keep: int | float | str
    kept: float
    tokens: float
    trained: bool
    seeds: tuple[float, ...]
    cells: tuple[Cell, ...]
    mean: Cell
    ratio: float
    file: int
    command: str

    @property
    def full(self) -> bool:
        return self.method == FULL

    @property
    def label(self) -> str:
        return self.method if self.full else f"{self.method} at {keep_text(self.keep)}"


@dataclass(frozen=True, eq=False)
class Comparison:
    """Runs of one model on the same questions.

    Attributes:
        results: the files.
        tasks: names.
        points: `full` first.
        blind: the score without the image, one a task, then the mean; None where not measured.
        scores: every answer as arrays; None where a samples file is missing.
    """

    results: tuple[Results, ...]
    tasks: tuple[str, ...]
    points: tuple[Point, ...]
    blind: tuple[float, ...] | None
    scores: Scores | None

    @property
    def name(self) -> str:
        return " and ".join(one.path.name.removesuffix(".json") for one in self.results)

    @property
    def keeps(self) -> list[int | float | str]:
        found = {p.keep for p in self.points if not p.full}
        return sorted(found, key=lambda keep: Budget.of(keep).order, reverse=True)

    def nearest(self, keep: float = 0.1) -> int | float | str | None:
        """The asked budget whose achieved share is nearest to `keep`, on a log scale."""
        measured = [p for p in self.points if not p.full]
        near = min(
            measured, key=lambda p: (abs(np.log(max(p.kept, 1e-9) / keep)), Budget.of(p.keep).order), default=None
        )
        return None if near is None else near.keep


def keep_text(keep: int | float | str) -> str:
    """`12.5 %`, `64 tokens`, or `at most 64 tokens`."""
    return Budget.of(keep).words


def comparisons(results: Sequence[Results]) -> list[Comparison]:
    """The files that go together (same model, questions, positions; no setting twice), in the order given."""
    groups: list[list[Results]] = []
    for one in results:
        mine = _settings(one)
        for group in groups:
            if group[0].questions == one.questions and not any(mine & _settings(other) for other in group):
                group.append(one)
                break
        else:
            groups.append([one])
    return [_comparison(group) for group in groups]


def _settings(one: Results) -> set[tuple[str, str]]:
    return {(row["pruner"], str(row["keep"])) for row in one.rows if row["pruner"] != FULL}


def _comparison(group: list[Results]) -> Comparison:
    tasks = tuple(dict.fromkeys(row["task"] for row in group[0].rows))
    if any(row["pruner"] == FULL for row in group[0].rows) is False:
        raise GripError(f"{group[0].path} has no row of the full model, which every comparison needs: run it again")
    first = {row["task"]: row for row in group[0].rows if row["pruner"] == FULL}
    blind = [first[task]["blind"] for task in tasks]
    known = None if any(one is None for one in blind) else (*blind, float(np.mean(blind)))
    scores = scores_of(group) if all(one.records is not None for one in group) else None
    points = _from_scores(group, scores) if scores is not None else _from_rows(group, tasks)
    return Comparison(tuple(group), tasks, tuple(points), known, scores)


def _from_scores(group: list[Results], scores: Scores) -> list[Point]:
    fulls = [_full_seconds(one) for one in group]
    found = []
    for s, (one, cells) in enumerate(zip(scores.settings, absolute(scores), strict=True)):
        parts = tuple(Cell(cell.value, cell.low, cell.high) for cell in cells)
        command = command_of(group[one.file], one.labels, one.keep)
        found.append(
            Point(
                one.method, one.keep, one.kept, one.tokens, one.trained, one.seeds, parts[:-1], parts[-1],
                float(scores.times[s]) / fulls[one.file], one.file, command,
            )
        )  # fmt: skip
    return found


def _from_rows(group: list[Results], tasks: tuple[str, ...]) -> list[Point]:
    found = []
    for number, one in enumerate(group):
        seconds, rows = _full_seconds(one), with_means([*one.rows, *one.means])
        by_key: dict[tuple[str, str], dict[str, Any]] = {}
        for row in rows:
            by_key.setdefault((row["pruner"], str(row["keep"])), {})[row["task"]] = row
        for (label, _), mine in by_key.items():
            if label == FULL and number:
                continue
            if any(task not in mine for task in tasks):
                raise GripError(f"{one.path}: {label} was not measured on every task: run the evaluation again")
            mean = mine.get("mean", mine[tasks[0]])
            cells = [Cell(row["score"], row["ci_low"], row["ci_high"]) for row in (*(mine[t] for t in tasks), mean)]
            command = command_of(one, (label,), mean["keep"])
            found.append(
                Point(
                    label, mean["keep"], mean["keep_fraction"], mean["tokens"], was_trained(mean), (mean["score"],),
                    tuple(cells[:-1]), cells[-1], mean["seconds_total"] / seconds, number, command,
                )
            )  # fmt: skip
    return found


def _full_seconds(one: Results) -> float:
    """The full model's time a question in this run, mean over tasks."""
    seconds = [row["seconds_total"] for row in one.rows if row["pruner"] == FULL]
    if not seconds or min(seconds) <= 0:
        raise GripError(f"{one.path} has no times of the full model, which times are compared with: run it again")
    return float(np.mean(seconds))


def command_of(one: Results, arms: Sequence[str], keep: int | float | str) -> str:
    """What to type to measure these arms at this budget alone; the run's own command where that was a script."""
    head = one.header
    try:
        words = shlex.split(head["command"])
    except ValueError:  # an open quote: no shell has run it
        return head["command"]
    typed = "eval" in words[:4] and any(word in words[0] for word in ("gripvlm", "__main__", "python"))
    if not typed:
        return head["command"]
    tasks = list(one.task_specs.values())
    if tasks == [f"lab/{family}" for family in FAMILIES]:
        tasks = ["lab"]
    line = ["gripvlm", "eval", "--model", head["model"], "--tasks", ",".join(tasks), "--pruners", ",".join(arms)]
    line += [] if tuple(arms) == (FULL,) else ["--keep", str(keep)]
    line += [] if head["limit"] is None else ["--limit", str(head["limit"])]
    line += ["--seed", str(head["seed"]), "--batch", str(head["batch_size"])]
    line += [] if head["positions"] == "original" else ["--positions", head["positions"]]
    return shlex.join(line)
