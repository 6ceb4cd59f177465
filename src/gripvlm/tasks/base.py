"""A task: samples, the prompt of each, and a score that is also the training reward."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from gripvlm.tasks.pictures import TaskError, open_image

__all__ = ["Sample", "Task", "TaskError", "default_score", "named_choice", "normalise"]

_REMOVED = re.compile(r"(?<=\d),(?=\d)|['\u2019]")  # 1,000 is 1000; don't is dont
_SPACE = re.compile(r"(?<!\d)[^\w\s-]|[^\w\s-](?!\d)|(?<=\w)-|-(?!\d)|_")  # 3.5, 12:30 and -4 stay whole


def normalise(text: str) -> str:
    """An answer as it is compared, the same for every task.

    Lower case; punctuation is gone, except inside numbers (3.5, 12:30) and a number's minus; runs of white space are
    one space.
    """
    return " ".join(_SPACE.sub(" ", _REMOVED.sub("", text.casefold())).split())


def named_choice(prediction: str, choices: Sequence[str]) -> str | None:
    """The one choice that a prediction names, or None where it names none or several.

    The whole prediction equals it, or it is the only choice that occurs in it as whole words ("The answer is a cat."
    names "cat"). A choice inside a longer one that also occurs does not count.
    """
    text = normalise(prediction)
    originals = {normalise(choice): choice for choice in choices}
    if text in originals:
        return originals[text]
    present = [choice for choice in originals if choice and f" {choice} " in f" {text} "]
    longest = [a for a in present if not any(a != b and f" {a} " in f" {b} " for b in present)]
    return originals[longest[0]] if len(longest) == 1 else None


@dataclass(frozen=True)
class Sample:
    """One question about one image or several.

    Attributes:
        id: unique in its task.
        pictures: each image's file, or a function that makes it, in the order of the prompt; at least one.
        question, answer: as text.
        choices: the answers to choose from, () where the answer is free.
        family: the kind of question, such as "reading".
        pair: the two questions of a yes/no pair share it, and no others of their `image_id`; None elsewhere.
        evidence: raster indices of the patches that hold the answer, most covered first; may be (). Counted through
            the images one after another: patch c of image p is p * h * w + c where the raster is [h, w].
        image_id: samples that have an image in common share it; intervals are clustered by it.
        answers: all that are accepted, or that people gave, where there are several; else ().
    """

    id: str
    pictures: tuple[Path | Callable[[], Image.Image], ...]
    question: str
    answer: str
    choices: tuple[str, ...] = ()
    family: str = ""
    pair: str | None = None
    evidence: tuple[int, ...] = ()
    image_id: str = ""
    answers: tuple[str, ...] = ()

    @property
    def accepted(self) -> tuple[str, ...]:
        """`answers`, or the one `answer` where there are no others."""
        return self.answers or (self.answer,)

    @property
    def images(self) -> list[Image.Image]:
        """The images, RGB. Read again at each call, so that a long run holds none of them."""
        return [open_image(one) if isinstance(one, Path) else one().convert("RGB") for one in self.pictures]

    def evidence_by_image(self, grid: tuple[int, int]) -> list[list[int]]:
        """For each image the raster indices of its patches that hold the answer, in the order of `evidence`.

        Args:
            grid: (h, w) of the raster that `evidence` counts in.

        Raises:
            TaskError: a patch beyond the last image.
        """
        (h, w), count = grid, len(self.pictures)
        if max(self.evidence, default=0) >= count * h * w:
            raise TaskError(
                f"sample {self.id!r} marks patch {max(self.evidence)}, but evidence_grid {[h, w]} has patches 0 to "
                f"{count * h * w - 1} in {count} picture{'s' * (count > 1)}: count them from 0, picture after picture"
            )
        return [[patch % (h * w) for patch in self.evidence if patch // (h * w) == p] for p in range(count)]


def default_score(prediction: str, sample: Sample) -> float:
    """1.0 for a right answer, else 0.0.

    Choices and yes/no questions are judged by the choice that is named, everything else by equality with one of the
    accepted answers; both after `normalise`.
    """
    right = normalise(sample.answer)
    choices = sample.choices or (("yes", "no") if right in ("yes", "no") else ())
    if choices:
        named = named_choice(prediction, choices)
        return float(named is not None and normalise(named) == right)
    return float(normalise(prediction) in {normalise(answer) for answer in sample.accepted})


class Task:
    """Samples under one name, with the prompt and the score that belong to them.

    Subclasses set `name`, fill `samples`, and override what differs.

    Attributes:
        name: as typed in `--tasks`.
        max_new_tokens: how long an answer may get.
        evidence_grid: (h, w) of each image's raster that `Sample.evidence` counts in; None without evidence.
        held_out: scores are published on its samples; training takes them only by their split's name.
    """

    name: str = ""
    max_new_tokens: int = 16
    held_out: bool = False
    evidence_grid: tuple[int, int] | None = None

    @cached_property
    def spec(self) -> str:
        """What `get_tasks` makes this task of: its name, with the options that the name leaves out."""
        return self.name

    @cached_property
    def samples(self) -> tuple[Sample, ...]:
        """All samples, in a fixed order."""
        raise NotImplementedError

    def prompt(self, sample: Sample) -> str:
        """The user's turn, without the images and without any template."""
        return sample.question

    def score(self, prediction: str, sample: Sample) -> float:
        """Between 0.0 and 1.0, 1.0 for a right answer; here `default_score`."""
        return default_score(prediction, sample)

    def summary(self, records: Iterable[Mapping[str, Any]]) -> dict[str, float]:
        """Further numbers of this task from its records (`id`, `prediction`, `score`); {} for none.

        The place for what is no mean over samples (F1, pair scores), under the names the field uses.
        """
        return {}

    def with_samples(self, records: Iterable[Mapping[str, Any]]) -> list[tuple[Mapping[str, Any], Sample]]:
        """Each record with its sample."""
        by_id = {sample.id: sample for sample in self.samples}
        return [(record, by_id[record["id"]]) for record in records]

    def take(self, limit: int | None, seed: int) -> list[Sample]:
        """At most `limit` samples: whole pairs, drawn with `seed`, in the task's own order.

        A larger limit with the same seed contains the smaller one's samples, except that an odd place at the end may be
        filled by a sample without a pair.
        """
        if limit is None or limit >= len(self.samples):
            return list(self.samples)
        if limit < 1:
            raise TaskError(f"limit={limit} leaves no sample: use 1 or more")
        # Scores of pairs count only where both questions were asked, so pairs are drawn whole.
        groups: dict[tuple[str, str], list[int]] = {}
        for index, sample in enumerate(self.samples):
            key = (sample.image_id, sample.pair) if sample.pair is not None else ("", f"one {sample.id}")
            groups.setdefault(key, []).append(index)
        drawn: list[int] = []
        members = list(groups.values())
        # One permutation of everything, cut at the limit: a larger limit then holds the smaller one.
        for group in np.random.default_rng(seed).permutation(len(members)):
            if len(drawn) + len(members[group]) <= limit:
                drawn += members[group]
            if len(drawn) == limit:
                break
        # A limit of 1 where everything comes in pairs: half a pair is better than nothing.
        if not drawn:
            drawn = members[0][:limit]
        return [self.samples[index] for index in sorted(drawn)]
