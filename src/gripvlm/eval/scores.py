"""Answers of one comparison as arrays: absolute and relative scores, paired differences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from gripvlm.eval.results import Results, ResultsError
from gripvlm.eval.stats import Estimate, bootstrap, estimate, holm, sign_flip
from gripvlm.eval.variants import BLIND, FULL
from gripvlm.utils.spec import parse_spec

__all__ = ["Difference", "Scores", "Setting", "absolute", "differences_from", "method_of", "relative", "scores_of"]

Array = np.ndarray


@dataclass(frozen=True)
class Setting:
    """One method at one budget, all of its seeds.

    Attributes:
        method: the pruner as typed, without its seed.
        keep: the requested budget, a number or `"<=64"`.
        labels: of the variants, one for each seed.
        file: the number of the results file it was measured in.
    """

    method: str
    keep: int | float | str
    labels: tuple[str, ...]
    file: int = 0


@dataclass(frozen=True, eq=False)
class Scores:
    """S settings, G tasks, I images.

    Attributes:
        settings: [S], `full` first.
        tasks: [G] names.
        images: [I] names; an image that two tasks ask about is one, and so are images that a question shows together.
        sums: [S, G, I] sums of an image's scores, mean over seeds.
        counts: [G, I] its questions.
    """

    settings: tuple[Setting, ...]
    tasks: tuple[str, ...]
    images: tuple[str, ...]
    sums: Array
    counts: Array

    @cached_property
    def means(self) -> Array:
        """[S, G] scores."""
        return self.sums.sum(-1) / self.counts.sum(-1)

    @cached_property
    def drawn(self) -> Array:
        """[usable draws, S, G] scores under the bootstrap; the same images for every setting, so that they pair."""
        return bootstrap(self.sums, self.counts, seed=0)

    def index(self, method: str, keep: Any = None) -> int | None:
        """The setting of this name and budget, None where there is none; any budget for `full`."""
        for number, setting in enumerate(self.settings):
            if setting.method == method and (method == FULL or setting.keep == keep):
                return number
        return None


def method_of(label: str) -> str:
    """`random:seed=3` -> `random`: the label without its own seed."""
    spec = parse_spec(label)
    name = spec.name if spec.inner is None else f"{spec.name}({spec.inner})"
    others = [f"{word}={value}" for word, value in spec.options if word != "seed"]
    return f"{name}:{','.join(others)}" if others else name


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

    def sums(self, result: Results, label: str, keep: str) -> Array:
        """[G, I] sums over each image's questions of one variant's scores.

        Raises:
            ResultsError: it has other questions than the full model.
        """
        scores = []
        for task, ids in zip(self.tasks, self.ids, strict=True):
            records = result.of(task, label, keep)
            if sorted(records) != ids:
                raise ResultsError(f"{result.path}: {label} at {keep} has other questions of {task} than full")
            scores.append(np.array([records[i]["score"] for i in ids]))
        return self._by_image(scores)

    def _by_image(self, values: Sequence[Array]) -> Array:
        pairs = zip(self._place, values, strict=True)
        return np.stack([np.bincount(place, weights, minlength=len(self.images)) for place, weights in pairs])


def scores_of(results: Sequence[Results]) -> Scores:
    """The answers of one run, or of several that asked the same questions of the same model.

    `full` is taken from the first.

    Raises:
        ResultsError: answers are missing, the runs asked different questions, or one of them has a setting that another
            has too.
    """
    _check_same_questions(results)
    questions = _Questions(results[0])
    settings: dict[tuple[str, str], Setting] = {}
    sums: dict[tuple[str, str], list[Array]] = {}
    for number, result in enumerate(results):
        for row in result.rows:
            label, keep = row["pruner"], str(row["keep"])
            # One row a setting is enough: the answers to its other tasks are looked up by name.
            if row["task"] != questions.tasks[0] or label == BLIND or (number and label == FULL):
                continue
            key = method_of(label), keep
            known = settings.setdefault(key, Setting(key[0], row["keep"], (), number))
            if known.file != number or label in known.labels:
                raise ResultsError(
                    f"{result.path} and {results[known.file].path} both have {label} at {keep}: leave one out"
                )
            settings[key] = replace(known, labels=(*known.labels, label))
            sums.setdefault(key, []).append(questions.sums(result, label, keep))
    by_setting = np.stack([np.mean(sums[key], axis=0) for key in settings])
    return Scores(tuple(settings.values()), questions.tasks, questions.images, by_setting, questions.counts)


def _check_same_questions(results: Sequence[Results]) -> None:
    first = results[0]
    for result in results:
        if result.records is None:
            raise ResultsError(f"the answers of {result.path} are not there ({result.missing}): copy them beside it")
        if result.questions != first.questions:
            raise ResultsError(
                f"{result.path} and {first.path} differ in model, weights, questions or positions: compare within one "
                "file"
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
        mean: over tasks.
        p_holm: of no difference in the mean, two-sided, from sign flips (see `sign_flip`), after Holm's correction for
            all settings that were compared.
    """

    setting: int
    mean: Estimate
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
        if b is not None and setting.method not in (baseline, FULL):
            pairs.append((s, b))
    if not pairs:
        return []
    compared, baselines = (np.array(side) for side in zip(*pairs, strict=True))
    questions = scores.counts.sum(-1)
    # Each image's share of the mean difference: the shares sum to it, and each may flip its sign.
    shares = ((scores.sums[compared] - scores.sums[baselines]) / questions[:, None]).mean(axis=1)
    corrected = holm(sign_flip(shares, seed=0).tolist())
    differences = []
    for (s, b), p in zip(pairs, corrected, strict=True):
        mean, drawn = scores.means[s] - scores.means[b], scores.drawn[:, s] - scores.drawn[:, b]  # [G], [draws, G]
        differences.append(Difference(s, estimate(mean.mean(), drawn.mean(-1)), p))
    return differences
