"""One comparison as arrays: every setting's scores and times by task and picture, and its bootstrap."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from gripvlm.budget import Budget
from gripvlm.eval.results import Results
from gripvlm.eval.schema import ResultsError
from gripvlm.eval.statistics import bootstrap
from gripvlm.eval.variants import BLIND, FULL, ORACLE
from gripvlm.pruners.registry import _load

__all__ = ["Scores", "Setting", "method_of", "scores_of", "was_trained"]

Array = np.ndarray
MEAN = "mean"


@dataclass(frozen=True)
class Setting:
    """One method at one budget, all of its seeds.

    Attributes:
        method: the pruner as typed, without its seed.
        keep: the budget as asked, a number or `"<=64"`.
        arms: the labels of its seeds, one for each.
        seeds: the mean score over tasks of each arm.
        kept, tokens: the share and the number of visual tokens that were paid for, mean over tasks.
        trained: whether the method has weights that were trained for pruning.
        file: the number of the results file it was measured in.
    """

    method: str
    keep: int | float | str
    arms: tuple[str, ...]
    seeds: tuple[float, ...]
    kept: float
    tokens: float
    trained: bool
    file: int = 0

    @property
    def full(self) -> bool:
        return self.method == FULL

    @property
    def heuristic(self) -> bool:
        """A method that anybody can use without training: no reference and not trained."""
        return not self.trained and self.method not in (FULL, ORACLE)


@dataclass(frozen=True, eq=False)
class Scores:
    """S settings, G tasks, I pictures.

    Attributes:
        settings: [S], `full` first.
        tasks: [G] names.
        images: [I] names; a picture that two tasks ask about is one.
        sums: [S, G, I] sums of a picture's scores, mean over seeds.
        seconds: [S, G, I] sums of its questions' times.
        counts: [G, I] its questions.
        seed: of the bootstrap.
        draws: how many times the pictures are drawn.
    """

    settings: tuple[Setting, ...]
    tasks: tuple[str, ...]
    images: tuple[str, ...]
    sums: Array
    seconds: Array
    counts: Array
    seed: int = 0
    draws: int = 2000

    @cached_property
    def means(self) -> Array:
        """[S, G] scores."""
        return self.sums.sum(-1) / self.counts.sum(-1)

    @cached_property
    def times(self) -> Array:
        """[S] seconds a question, mean over tasks."""
        return (self.seconds.sum(-1) / self.counts.sum(-1)).mean(-1)

    @cached_property
    def drawn(self) -> Array:
        """[usable draws, S, G] scores under the bootstrap; the same pictures for every setting, so that they pair.

        The draws of `bootstrap`, as for the rows' intervals; none where there are too few pictures.
        """
        return bootstrap(self.sums, self.counts, self.seed, self.draws)

    @cached_property
    def drawn_times(self) -> Array:
        """[draws, S] seconds a question under the same draws."""
        return bootstrap(self.seconds, self.counts, self.seed, self.draws).mean(-1)

    def index(self, method: str, keep: Any = None) -> int | None:
        """The setting of this name and budget, None where there is none; any budget for `full`."""
        for number, one in enumerate(self.settings):
            if one.method == method and (keep is None or one.full or one.keep == keep):
                return number
        return None

    @property
    def keeps(self) -> list[int | float | str]:
        """Budgets as asked, without `full`'s, the largest first."""
        found = {one.keep for one in self.settings if not one.full}
        return sorted(found, key=lambda keep: Budget.of(keep).order, reverse=True)


def method_of(label: str) -> str:
    """`random:seed=3` -> `random`: the label without its own seed."""
    head, _, options = label.rpartition(":")
    if not head or ")" in options:
        return label
    rest = [option for option in options.split(",") if not re.fullmatch(r"\s*seed\s*=\s*-?\d+\s*", option)]
    return f"{head}:{','.join(rest)}" if rest else head


def was_trained(row: dict[str, Any]) -> bool:
    """As the row says; for files that do not say, whether its pruner's class has trained weights."""
    if "trained" in row:
        return bool(row["trained"])
    try:
        return bool(getattr(_load(row["pruner_config"]["name"]), "trained", False))
    except (ValueError, ImportError):
        return False


def scores_of(results: Sequence[Results], seed: int = 0, draws: int = 2000) -> Scores:
    """The answers of one run, or of several that asked the same questions of the same model.

    `full` is taken from the first; every setting's times stay with its own file (see `Setting.file`).

    Raises:
        ResultsError: answers are missing, the runs asked different questions, or one of them has a
            setting that another has too.
    """
    first = results[0]
    for one in results:
        if one.records is None:
            raise ResultsError(f"the answers of {one.path} are not there ({one.missing}): copy them beside it")
        if one.questions != first.questions:
            raise ResultsError(
                f"{one.path} and {first.path} differ in model, weights, questions or positions: compare within one file"
            )
    tasks = tuple(dict.fromkeys(row["task"] for row in first.rows))
    order = {task: sorted(first.of(task, FULL, "1.0")) for task in tasks}
    clusters = {task: [first.of(task, FULL, "1.0")[i]["image_id"] for i in order[task]] for task in tasks}
    images = tuple(sorted({image for mine in clusters.values() for image in mine}))
    place = {image: number for number, image in enumerate(images)}
    where = {task: np.array([place[image] for image in clusters[task]]) for task in tasks}
    counts = np.stack([np.bincount(where[task], minlength=len(images)) for task in tasks]).astype(float)

    settings: dict[tuple[str, str], Setting] = {}
    sums: dict[tuple[str, str], list[Array]] = {}
    seconds: dict[tuple[str, str], list[Array]] = {}
    for number, one in enumerate(results):
        for row in one.rows:
            if row["task"] != tasks[0] or row["pruner"] == BLIND or (number and row["pruner"] == FULL):
                continue
            arm, asked = row["pruner"], str(row["keep"])
            key = method_of(arm), asked
            known = settings.get(key)
            if known is not None and (known.file != number or arm in known.arms):
                raise ResultsError(
                    f"{one.path} and {results[known.file].path} both have {arm} at {asked}: leave one out"
                )
            mine = [one.of(task, arm, asked) for task in tasks]
            for task, records in zip(tasks, mine, strict=True):
                if sorted(records) != order[task]:
                    raise ResultsError(f"{one.path}: {arm} at {asked} was asked other questions of {task} than full")
            score, time = (
                np.stack(
                    [
                        np.bincount(where[t], [value(r[i]) for i in order[t]], minlength=len(images))
                        for t, r in zip(tasks, mine, strict=True)
                    ]
                )
                for value in (lambda r: r["score"], lambda r: sum(r["seconds"].values()))
            )
            mean = float((score.sum(-1) / counts.sum(-1)).mean())
            rows = [r for r in one.rows if r["pruner"] == arm and str(r["keep"]) == asked]
            kept, tokens = (float(np.mean([r[name] for r in rows])) for name in ("keep_fraction", "tokens"))
            new = Setting(key[0], row["keep"], (arm,), (mean,), kept, tokens, was_trained(row), number)
            settings[key] = new if known is None else _joined(known, new)
            sums.setdefault(key, []).append(score)
            seconds.setdefault(key, []).append(time)
    return Scores(
        tuple(settings.values()),
        tasks,
        images,
        np.stack([np.mean(sums[key], axis=0) for key in settings]),
        np.stack([np.mean(seconds[key], axis=0) for key in settings]),
        counts,
        seed,
        draws,
    )


def _joined(known: Setting, new: Setting) -> Setting:
    """The setting with one more seed."""
    n = len(known.arms)
    kept, tokens = ((getattr(known, f) * n + getattr(new, f)) / (n + 1) for f in ("kept", "tokens"))
    return replace(known, arms=known.arms + new.arms, seeds=known.seeds + new.seeds, kept=kept, tokens=tokens)
