"""Results files as comparisons of points: one method at one budget, its scores, its time, and what to type for it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gripvlm.budget import Budget
from gripvlm.errors import GripError
from gripvlm.eval.estimates import Estimate, absolute
from gripvlm.eval.results import Results
from gripvlm.eval.scores import Scores, method_of, scores_of
from gripvlm.eval.variants import FULL, ORACLE
from gripvlm.report.tables import MEAN, Row, by_setting, with_means
from gripvlm.tasks.lab_tasks import FAMILIES

__all__ = ["Comparison", "Keep", "Point", "command_of", "comparisons", "frontier"]

Keep = int | float | str
Setting = tuple[str, str]
"""(method, budget as text)."""


@dataclass(frozen=True)
class Point:
    """One method at one budget.

    Attributes:
        method: the pruner as typed, without its seed.
        keep: the budget as asked.
        labels: of its seeds in the file, one for each.
        seeds: the mean score over tasks of each.
        kept, tokens: the share and the number of visual tokens, mean over tasks and seeds.
        tasks: its score in each task.
        mean: over tasks.
        ratio: its time a question / the full model's in the same run.
        results: the file that it was measured in.
    """

    method: str
    keep: Keep
    labels: tuple[str, ...]
    seeds: tuple[float, ...]
    kept: float
    tokens: float
    tasks: tuple[Estimate, ...]
    mean: Estimate
    ratio: float
    results: Results

    @property
    def full(self) -> bool:
        return self.method == FULL

    @property
    def budget(self) -> str:
        return "all" if self.full else Budget.of(self.keep).words

    @property
    def name(self) -> str:
        return self.method if self.full else f"{self.method} at {self.budget}"

    @property
    def command(self) -> str:
        return command_of(self.results, self.labels, self.keep)

    def answers(self, task: str) -> dict[str, dict[str, Any]]:
        """id -> answer; of its first seed where it has several."""
        return self.results.of(task, self.labels[0], str(self.keep))


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
        return " and ".join(results.path.name.removesuffix(".json") for results in self.results)

    @property
    def pruned(self) -> list[Point]:
        return [point for point in self.points if not point.full]

    @property
    def methods(self) -> list[str]:
        return list(dict.fromkeys(point.method for point in self.pruned))

    @property
    def keeps(self) -> list[Keep]:
        """Budgets as asked, the largest first."""
        return sorted({p.keep for p in self.pruned}, key=lambda keep: Budget.of(keep).order, reverse=True)

    @property
    def ranked(self) -> list[str]:
        """Methods, the best first: by mean score over the budgets that most of them have."""
        budgets = [frozenset(p.keep for p in self.pruned if p.method == method) for method in self.methods]
        # many budgets of a single method must not make it the best, so a sum over all of its own does not do
        usual = max(budgets, key=lambda keeps: (budgets.count(keeps), len(keeps)), default=frozenset())
        total = dict.fromkeys(self.methods, 0.0)
        for point in self.pruned:
            total[point.method] += point.mean.value if point.keep in usual else 0.0
        return sorted(total, key=lambda method: -total[method])


def frontier(comparison: Comparison, cost: str) -> list[Point]:
    """The points that no other beats in mean score and `cost` ("kept" or "ratio"), `oracle` apart."""
    best: list[Point] = []
    able = [point for point in comparison.points if point.method != ORACLE]
    for point in sorted(able, key=lambda point: (getattr(point, cost), -point.mean.value)):
        if not best or point.mean.value > best[-1].mean.value:
            best.append(point)
    return best


def comparisons(results: Sequence[Results]) -> list[Comparison]:
    """The files that go together (same model, questions, positions; no setting twice), in the order given."""
    groups: list[list[Results]] = []
    for new in results:
        for group in groups:
            if group[0].questions == new.questions and not any(_settings(new) & _settings(old) for old in group):
                group.append(new)
                break
        else:
            groups.append([new])
    return [_comparison(group) for group in groups]


def _settings(results: Results) -> set[Setting]:
    return {setting for setting in by_setting(results.rows) if setting[0] != FULL}


def _comparison(group: list[Results]) -> Comparison:
    first = {row["task"]: row for row in group[0].rows if row["pruner"] == FULL}
    tasks = tuple(dict.fromkeys(row["task"] for row in group[0].rows))
    if not first:
        raise GripError(f"{group[0].path} has no row of the full model, which every comparison needs: run it again")
    values = [row["blind"] for row in first.values()]
    blind = None if None in values else (*values, float(np.mean(values)))
    scores, estimates = None, {}
    if all(results.records is not None for results in group):
        scores = scores_of(group)
        keys = [(setting.method, str(setting.keep)) for setting in scores.settings]
        estimates = dict(zip(keys, absolute(scores), strict=True))
    points = [point for results in group for point in _points(results, tasks, estimates)]
    full = next(point for point in points if point.full)
    return Comparison(tuple(group), tasks, (full, *(p for p in points if not p.full)), blind, scores)


def _points(results: Results, tasks: tuple[str, ...], estimates: dict[Setting, tuple[Estimate, ...]]) -> list[Point]:
    """The file's points. Without answers each seed is a point of its own, with its rows' intervals."""
    full = [row["seconds_total"] for row in results.rows if row["pruner"] == FULL]
    if not full or min(full) <= 0:
        raise GripError(f"{results.path} has no times of the full model, which times are compared with: run it again")
    seeds: dict[Setting, dict[str, dict[str, Row]]] = {}
    for (label, keep), by_task in by_setting(with_means([*results.rows, *results.means])).items():
        if any(task not in by_task for task in tasks):
            raise GripError(f"{results.path}: {label} was not measured on every task: run the evaluation again")
        seeds.setdefault((method_of(label) if estimates else label, keep), {})[label] = by_task
    points = []
    for setting, by_label in seeds.items():
        means = [by_task.get(MEAN, by_task[tasks[0]]) for by_task in by_label.values()]
        average = {
            name: float(np.mean([r[name] for r in means])) for name in ("keep_fraction", "tokens", "seconds_total")
        }
        *cells, mean = estimates.get(setting) or _from_rows([next(iter(by_label.values()))[t] for t in tasks], means[0])
        points.append(
            Point(
                method=setting[0],
                keep=means[0]["keep"],
                labels=tuple(by_label),
                seeds=tuple(row["score"] for row in means),
                kept=average["keep_fraction"],
                tokens=average["tokens"],
                tasks=tuple(cells),
                mean=mean,
                ratio=average["seconds_total"] / float(np.mean(full)),
                results=results,
            )
        )
    return points


def _from_rows(rows: Sequence[Row], mean: Row) -> list[Estimate]:
    return [Estimate(row["score"], row["ci_low"], row["ci_high"]) for row in (*rows, mean)]


def command_of(results: Results, labels: Sequence[str], keep: Keep) -> str:
    """What to type to measure these pruners at this budget alone; the run's own command where that was a script."""
    head = results.header
    try:
        words = shlex.split(head["command"])
    except ValueError:  # an open quote: no shell has run it
        return head["command"]
    if "eval" not in words[:4] or not any(name in words[0] for name in ("gripvlm", "__main__", "python")):
        return head["command"]
    tasks = list(results.task_specs.values())
    if tasks == [f"lab/{family}" for family in FAMILIES]:
        tasks = ["lab"]
    line = ["gripvlm", "eval", "--model", head["model"], "--tasks", ",".join(tasks), "--pruners", ",".join(labels)]
    line += [] if tuple(labels) == (FULL,) else ["--keep", str(keep)]
    line += [] if head["limit"] is None else ["--limit", str(head["limit"])]
    line += ["--seed", str(head["seed"]), "--batch", str(head["batch_size"])]
    line += [] if head["positions"] == "original" else ["--positions", head["positions"]]
    return shlex.join(line)
