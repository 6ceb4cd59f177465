"""Answers of one comparison as arrays, and what they say: absolute and relative scores, paired differences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from gripvlm.budget import Budget
from gripvlm.eval.results import Results, ResultsError
from gripvlm.eval.stats import Estimate, bootstrap, estimate, holm, sign_flip
from gripvlm.eval.variants import BLIND, FULL
from gripvlm.utils.spec import parse_spec

__all__ = ["Difference", "Scores", "Setting", "absolute", "differences_from", "relative", "scores_of", "was_trained"]

Array = np.ndarray


@dataclass(frozen=True)
class Setting:
    """One method at one budget, all of its seeds.

    Attributes:
        method: the pruner as typed, without its seed.
        keep: the requested budget, a number or `"<=64"`.
        labels: of the variants, one for each seed.
        seeds: the mean score over tasks of each variant.
        kept, tokens: the share and the number of visual tokens that were paid for, mean over tasks.
        trained: whether the method has weights that were trained for pruning.
        file: the number of the results file it was measured in.
    """

    method: str
    keep: int | float | str
    labels: tuple[str, ...]
    seeds: tuple[float, ...]
    kept: float
    tokens: float
    trained: bool
    file: int = 0

    @property
    def full(self) -> bool:
        return self.method == FULL


@dataclass(frozen=True, eq=False)
class Scores:
    """S settings, G tasks, I images.

    Attributes:
        settings: [S], `full` first.
        tasks: [G] names.
        images: [I] names; an image that two tasks ask about is one.
        sums: [S, G, I] sums of an image's scores, mean over seeds.
        seconds: [S, G, I] sums of its questions' times.
        counts: [G, I] its questions.
        seed: of the bootstrap.
        draws: how many times the images are drawn.
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
        """[usable draws, S, G] scores under the bootstrap; the same images for every setting, so that they pair."""
        return bootstrap(self.sums, self.counts, self.seed, self.draws)

    def index(self, method: str, keep: Any = None) -> int | None:
        """The setting of this name and budget, None where there is none; any budget for `full`."""
        for number, setting in enumerate(self.settings):
            if setting.method == method and (keep is None or setting.full or setting.keep == keep):
                return number
        return None

    @property
    def keeps(self) -> list[int | float | str]:
        """Requested budgets, without `full`'s, the largest first."""
        keeps = {setting.keep for setting in self.settings if not setting.full}
        return sorted(keeps, key=lambda keep: Budget.of(keep).order, reverse=True)


def method_of(label: str) -> str:
    """`random:seed=3` -> `random`: the label without its own seed."""
    spec = parse_spec(label)
    name = spec.name if spec.inner is None else f"{spec.name}({spec.inner})"
    others = [f"{word}={value}" for word, value in spec.options if word != "seed"]
    return f"{name}:{','.join(others)}" if others else name


def was_trained(row: dict[str, Any]) -> bool:
    """Whether the row's pruner has weights that were trained for pruning."""
    # The first published files have no such field, and `grip` was the only one then.
    return bool(row.get("trained", row["pruner_config"]["name"] == "grip"))


class _Questions:
    """The questions of a comparison, in one order for all settings, and the image that each is about."""

    def __init__(self, results: Results) -> None:
        self.tasks = tuple(dict.fromkeys(row["task"] for row in results.rows))
        full = [results.of(task, FULL, "1.0") for task in self.tasks]
        self.ids = [sorted(records) for records in full]
        names = [[records[i]["image_id"] for i in ids] for records, ids in zip(full, self.ids, strict=True)]
        self.images = tuple(sorted({image for images in names for image in images}))
        place = {image: number for number, image in enumerate(self.images)}
        self._place = [np.array([place[image] for image in images], dtype=int) for images in names]
        self.counts = self._by_image([np.ones(len(ids)) for ids in self.ids])

    def sums(self, answers: Sequence[dict[str, Any]], value: Callable[[dict[str, Any]], float]) -> Array:
        """[G, I] sums over each image's questions of a value of their records, from one {id: record} a task."""
        return self._by_image(
            [np.array([value(records[i]) for i in ids]) for records, ids in zip(answers, self.ids, strict=True)]
        )

    def _by_image(self, values: Sequence[Array]) -> Array:
        pairs = zip(self._place, values, strict=True)
        return np.stack([np.bincount(place, weights, minlength=len(self.images)) for place, weights in pairs])


def scores_of(results: Sequence[Results], seed: int = 0, draws: int = 2000) -> Scores:
    """The answers of one run, or of several that asked the same questions of the same model.

    `full` is taken from the first; every setting's times stay with its own file (see `Setting.file`).

    Raises:
        ResultsError: answers are missing, the runs asked different questions, or one of them has a setting that another
            has too.
    """
    _check_same_questions(results)
    questions = _Questions(results[0])
    settings: dict[tuple[str, str], Setting] = {}
    sums: dict[tuple[str, str], list[Array]] = {}
    seconds: dict[tuple[str, str], list[Array]] = {}
    for number, result in enumerate(results):
        for row in result.rows:
            label, keep = row["pruner"], str(row["keep"])
            # One row a setting is enough: its other tasks are looked up below.
            if row["task"] != questions.tasks[0] or label == BLIND or (number and label == FULL):
                continue
            key = method_of(label), keep
            known = settings.get(key)
            if known is not None and (known.file != number or label in known.labels):
                raise ResultsError(
                    f"{result.path} and {results[known.file].path} both have {label} at {keep}: leave one out"
                )
            answers = [result.of(task, label, keep) for task in questions.tasks]
            for task, records, ids in zip(questions.tasks, answers, questions.ids, strict=True):
                if sorted(records) != ids:
                    raise ResultsError(f"{result.path}: {label} at {keep} has other questions of {task} than full")
            score = questions.sums(answers, lambda record: record["score"])
            time = questions.sums(answers, lambda record: sum(record["seconds"].values()))
            rows = [r for r in result.rows if (r["pruner"], str(r["keep"])) == (label, keep)]
            new = Setting(
                method=key[0],
                keep=row["keep"],
                labels=(label,),
                seeds=(float((score.sum(-1) / questions.counts.sum(-1)).mean()),),
                kept=float(np.mean([r["keep_fraction"] for r in rows])),
                tokens=float(np.mean([r["tokens"] for r in rows])),
                trained=was_trained(row),
                file=number,
            )
            settings[key] = new if known is None else _with_seed(known, new)
            sums.setdefault(key, []).append(score)
            seconds.setdefault(key, []).append(time)
    return Scores(
        settings=tuple(settings.values()),
        tasks=questions.tasks,
        images=questions.images,
        sums=np.stack([np.mean(sums[key], axis=0) for key in settings]),
        seconds=np.stack([np.mean(seconds[key], axis=0) for key in settings]),
        counts=questions.counts,
        seed=seed,
        draws=draws,
    )


def _check_same_questions(results: Sequence[Results]) -> None:
    first = results[0]
    for result in results:
        result.check_answers()
        if result.questions != first.questions:
            raise ResultsError(
                f"{result.path} and {first.path} differ in model, weights, questions or positions: compare within one "
                "file"
            )


def _with_seed(known: Setting, new: Setting) -> Setting:
    """The setting with one more seed."""
    n = len(known.labels)
    return replace(
        known,
        labels=known.labels + new.labels,
        seeds=known.seeds + new.seeds,
        kept=(known.kept * n + new.kept) / (n + 1),
        tokens=(known.tokens * n + new.tokens) / (n + 1),
    )


def absolute(scores: Scores) -> list[tuple[Estimate, ...]]:
    """[S] settings: the score in each task, then the plain mean over tasks."""
    cells = []
    for s in range(len(scores.settings)):
        by_task = [estimate(scores.means[s, g], scores.drawn[:, s, g]) for g in range(len(scores.tasks))]
        cells.append((*by_task, estimate(scores.means[s].mean(), scores.drawn[:, s].mean(-1))))
    return cells


def relative(scores: Scores) -> list[Estimate | None]:
    """[S] settings: the mean over tasks of score / the full model's score; None where a full score is 0.

    Both are drawn on the same images, so the interval is of the ratio. Draws in which the full model scores nothing in
    a task are left out; where those are half or more there is no interval.
    """
    full = scores.index(FULL)
    if full is None or not scores.means[full].all():
        return [None] * len(scores.settings)
    drawn = scores.drawn
    # A ratio to a score of 0 is none.
    usable = np.flatnonzero(drawn[:, full].all(axis=-1))
    if len(usable) <= len(drawn) / 2:
        usable = usable[:0]
    ratios = (drawn[usable] / drawn[usable][:, full, None]).mean(-1)
    exact = (scores.means / scores.means[full]).mean(-1)
    return [estimate(exact[s], ratios[:, s]) for s in range(len(scores.settings))]


@dataclass(frozen=True)
class Difference:
    """A setting minus the baseline, question by question.

    Attributes:
        setting: its number in `Scores.settings`.
        by_task: one for each task.
        mean: over tasks.
        p: of no difference in the mean, two-sided, from sign flips (see `sign_flip`).
        p_holm: the same after Holm's correction for all settings that were compared.
    """

    setting: int
    by_task: tuple[Estimate, ...]
    mean: Estimate
    p: float
    p_holm: float


def differences_from(scores: Scores, baseline: str) -> list[Difference]:
    """Every other method minus the baseline at the same requested budget; `full` serves for every budget.

    Holm's correction is over all of these differences of means together.

    Raises:
        ResultsError: no such method.
    """
    methods = dict.fromkeys(setting.method for setting in scores.settings)
    if baseline not in methods:
        raise ResultsError(f"no method {baseline!r} to compare with: use one of {', '.join(methods)}")
    pairs = []
    for s, setting in enumerate(scores.settings):
        b = scores.index(baseline, setting.keep)
        if b is not None and setting.method != baseline and not setting.full:
            pairs.append((s, b))
    if not pairs:
        return []
    compared, baselines = (np.array(side) for side in zip(*pairs, strict=True))
    questions = scores.counts.sum(-1)
    # Each image's share of the mean difference: the shares sum to it, and each may flip its sign.
    shares = ((scores.sums[compared] - scores.sums[baselines]) / questions[:, None]).mean(axis=1)
    p = sign_flip(shares, scores.seed)
    corrected = holm(p.tolist())
    differences = []
    for n, (s, b) in enumerate(pairs):
        mean, drawn = scores.means[s] - scores.means[b], scores.drawn[:, s] - scores.drawn[:, b]  # [G], [draws, G]
        by_task = tuple(estimate(mean[g], drawn[:, g]) for g in range(len(scores.tasks)))
        differences.append(Difference(s, by_task, estimate(mean.mean(), drawn.mean(-1)), float(p[n]), corrected[n]))
    return differences
