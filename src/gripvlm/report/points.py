"""Results files as comparisons of points: one method at one budget, its scores, its time, and what to type for it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gripvlm.budget import Budget
from gripvlm.errors import GripError
from gripvlm.eval.results import Results
from gripvlm.eval.scores import Scores, absolute, method_of, scores_of
from gripvlm.eval.stats import Estimate
from gripvlm.eval.variants import FULL, ORACLE
from gripvlm.report.tables import MEAN, Row, averaged, by_setting
from gripvlm.tasks.lab_tasks import FAMILIES

Keep = int | float | str
Setting = tuple[str, str]
"""(method, budget as text)."""


@dataclass(frozen=True)
class Point:
    """One method at one budget.

    Attributes:
        method: the pruner as typed, without its seed.
        rows: task -> row (and "mean" -> row), numbers averaged over seeds, with `ratio`: its time / the full model's.
        seeds: the label of each seed in the file, and its mean score over tasks.
        results: the file that it was measured in.
    """

    method: str
    rows: dict[str, Row]
    seeds: dict[str, float]
    results: Results

    @property
    def mean(self) -> Row:
        return self.rows[MEAN]

    @property
    def keep(self) -> Keep:
        """The requested budget."""
        return self.mean["keep"]

    @property
    def full(self) -> bool:
        return self.method == FULL

    @property
    def budget(self) -> str:
        return "all" if self.full else Budget.of(self.keep).words

    @property
    def name(self) -> str:
        return self.method if self.full else f"{self.method} at {self.budget}"

    def answers(self, task: str) -> dict[str, dict[str, Any]]:
        """id -> answer; of its first seed where it has several."""
        return self.results.of(task, next(iter(self.seeds)), str(self.keep))

    def command(self) -> str:
        """What to type to measure this point alone; the run's own command where that was a script."""
        head = self.results.header
        try:
            words = shlex.split(head["command"])
        except ValueError:  # an open quote: no shell has run it
            return head["command"]
        # `gripvlm eval`, `python -m gripvlm eval`, a full path to either; all else is a script
        if "eval" not in words[:4] or not any(name in words[0] for name in ("gripvlm", "__main__", "python")):
            return head["command"]
        tasks = list(self.results.task_specs.values())
        if tasks == [f"lab/{family}" for family in FAMILIES]:
            tasks = ["lab"]
        line = ["gripvlm", "eval", "--model", head["model"], "--tasks", ",".join(tasks)]
        line += ["--pruners", ",".join(self.seeds)]
        line += [] if self.full else ["--keep", str(self.keep)]
        line += [] if head["limit"] is None else ["--limit", str(head["limit"])]
        line += ["--seed", str(head["seed"]), "--batch", str(head["batch_size"])]
        line += [] if head["positions"] == "original" else ["--positions", head["positions"]]
        return shlex.join(line)


@dataclass(frozen=True, eq=False)
class Comparison:
    """Runs of one model on the same questions.

    Attributes:
        results: the files.
        tasks: names.
        points: `full` first.
        scores: every answer as arrays; None where a samples file is missing.
    """

    results: tuple[Results, ...]
    tasks: tuple[str, ...]
    points: tuple[Point, ...]
    scores: Scores | None

    @property
    def name(self) -> str:
        return " and ".join(results.path.name.removesuffix(".json") for results in self.results)

    @property
    def pruned(self) -> list[Point]:
        return [point for point in self.points if not point.full]

    @property
    def blind(self) -> dict[str, float]:
        """Task (and "mean") -> the score without the image; empty where it was not measured."""
        # where one task lacks it, the mean would be that of other tasks
        scores = {task: self.points[0].rows[task]["blind"] for task in self.tasks}
        return {} if None in scores.values() else scores | {MEAN: float(np.mean(list(scores.values())))}

    @property
    def seeded(self) -> list[Point]:
        return [point for point in self.pruned if len(point.seeds) > 1]

    @property
    def methods(self) -> list[str]:
        return list(dict.fromkeys(point.method for point in self.pruned))

    @property
    def keeps(self) -> list[Keep]:
        """The requested budgets, the largest first."""
        return sorted({p.keep for p in self.pruned}, key=lambda keep: Budget.of(keep).order, reverse=True)

    @property
    def enough(self) -> Point | None:
        """The point with the fewest tokens whose interval reaches the full model's score; of equals the best."""
        goal = self.points[0].mean["score"]
        found = [
            point
            for point in self.pruned
            if point.method != ORACLE and point.mean["ci_high"] is not None and point.mean["ci_high"] >= goal
        ]
        return min(found, key=lambda point: (point.mean["keep_fraction"], -point.mean["score"]), default=None)

    def beside(self, point: Point, method: str) -> Point | None:
        """Another method's point at the same requested budget."""
        return next((other for other in self.pruned if (other.method, other.keep) == (method, point.keep)), None)

    @property
    def ranked(self) -> list[str]:
        """Methods, the best first: by mean score over the budgets that most of them have."""
        budgets = [frozenset(p.keep for p in self.pruned if p.method == method) for method in self.methods]
        # many budgets of a single method must not make it the best, so a sum over all of its own does not do
        usual = max(budgets, key=lambda keeps: (budgets.count(keeps), len(keeps)), default=frozenset())
        total = dict.fromkeys(self.methods, 0.0)
        for point in self.pruned:
            total[point.method] += point.mean["score"] if point.keep in usual else 0.0
        return sorted(total, key=lambda method: -total[method])


def frontier(comparison: Comparison, cost: str) -> list[Point]:
    """The points that no other beats in mean score and cost ("keep_fraction" or "ratio"), `oracle` apart."""
    best: list[Point] = []
    # the oracle knows the answer, so that it would stand alone there
    points = [point for point in comparison.points if point.method != ORACLE]
    # cheapest first, and of equal costs the best: one pass is enough
    for point in sorted(points, key=lambda point: (point.mean[cost], -point.mean["score"])):
        if not best or point.mean["score"] > best[-1].mean["score"]:
            best.append(point)
    return best


def comparisons(results: Sequence[Results]) -> list[Comparison]:
    """The files that go together (same model, questions, positions; no setting twice), in the order given."""
    groups: list[list[Results]] = []
    for new in results:
        for group in groups:
            # the same setting in two files is two runs, which no mean may hide
            if group[0].questions == new.questions and not any(_settings(new) & _settings(old) for old in group):
                group.append(new)
                break
        else:
            groups.append([new])
    return [_comparison(group) for group in groups]


def _settings(results: Results) -> set[Setting]:
    return {setting for setting in by_setting(results.rows) if setting[0] != FULL}


def _comparison(group: list[Results]) -> Comparison:
    tasks = tuple(dict.fromkeys(row["task"] for row in group[0].rows))
    if all(row["pruner"] != FULL for row in group[0].rows):
        raise GripError(f"{group[0].path} has no row of the full model, which every comparison needs: run it again")
    scores, estimates = None, {}
    if all(results.records is not None for results in group):
        scores = scores_of(group)
        keys = [(setting.method, str(setting.keep)) for setting in scores.settings]
        estimates = dict(zip(keys, absolute(scores), strict=True))
    points = [point for results in group for point in _points(results, tasks, estimates)]
    full = next(point for point in points if point.full)
    return Comparison(tuple(group), tasks, (full, *(p for p in points if not p.full)), scores)


def _points(results: Results, tasks: tuple[str, ...], estimates: dict[Setting, tuple[Estimate, ...]]) -> list[Point]:
    """The file's points. Without answers each seed is a point of its own, with its rows' intervals."""
    # times are divided within a file: another file may be another machine, or the same on a busier day
    full = [row["seconds_total"] for row in results.rows if row["pruner"] == FULL]
    if not full or min(full) <= 0:
        raise GripError(f"{results.path} has no times of the full model, which times are compared with: run it again")
    seeds: dict[Setting, dict[str, dict[str, Row]]] = {}
    for (label, keep), by_task in by_setting([*results.rows, *results.means]).items():
        if len(tasks) == 1 and tasks[0] in by_task:
            # the mean over one task is that task, interval included
            by_task.setdefault(MEAN, {**by_task[tasks[0]], "task": MEAN})
        if any(task not in by_task for task in (*tasks, MEAN)):
            raise GripError(f"{results.path}: {label} was not measured on every task: run the evaluation again")
        seeds.setdefault((method_of(label) if estimates else label, keep), {})[label] = by_task
    points = []
    for (method, keep), by_label in seeds.items():
        rows: dict[str, Row] = {}
        for number, task in enumerate((*tasks, MEAN)):
            of_seeds = [by_task[task] for by_task in by_label.values()]
            row = averaged(of_seeds)
            row["pruner"] = method
            row["ratio"] = row["seconds_total"] / float(np.mean(full))
            # only answers know how seeds vary together by picture; without them one row's interval is all there is
            if estimates:
                score = estimates[method, keep][number]
                row |= {"score": score.value, "ci_low": score.low, "ci_high": score.high}
            else:
                row |= {name: of_seeds[0][name] for name in ("ci_low", "ci_high")}
            rows[task] = row
        points.append(Point(method, rows, {label: r[MEAN]["score"] for label, r in by_label.items()}, results))
    return points
