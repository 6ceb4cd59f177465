"""Training data: which questions each step sees, told by (seed, step) alone, so that any step can be made again."""

from __future__ import annotations

import hashlib
import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch

from gripvlm.errors import TrainError
from gripvlm.tasks import JsonlTask, LabTask, Sample, Task, get_tasks
from gripvlm.tasks.lab_tasks import SAMPLE as SHIPPED

_PLACES = 10_000
"""Of a picture between training and validation, from a hash of its name."""

__all__ = ["Questions", "generator", "load_questions", "name_of", "picture_of", "split"]


def generator(seed: int, *names: object) -> torch.Generator:
    """A stream of random numbers of its own for each (seed, names): nothing to save, nothing to resume."""
    text = "/".join(map(str, (seed, *names)))
    high, low = zlib.crc32(text.encode()), zlib.crc32(text[::-1].encode() + b"gripvlm")
    return torch.Generator().manual_seed((high << 32 | low) & (2**63 - 1))


def load_questions(data: str | Task | Sequence[Task]) -> list[tuple[Task, Sample]]:
    """All questions of a task's name, of `PATH.jsonl` (answers may be left out there), or of `Task` objects.

    Raises:
        TrainError: nothing is named, or questions that scores are published on: the lab's, or a benchmark's unless its
            split is typed.
    """
    if isinstance(data, str):
        if not data.strip():
            raise TrainError("no training data: type --data questions.jsonl, or the name of a task")
        path = data.removeprefix("jsonl:")
        if path.endswith((".jsonl", ".json")) and not re.search(r"[:,]\w+=", path):  # else it is a task with options
            tasks: Iterable[Task] = [JsonlTask(Path(path), answers=False)]
        else:
            tasks = get_tasks([part.strip() for part in data.split(",")])
    else:
        tasks = [data] if isinstance(data, Task) else data
    if any(isinstance(task, LabTask) and task.folder == SHIPPED for task in tasks):
        raise TrainError(
            "the lab tasks are the test split, and training on it would make every later score worthless: make "
            "training questions with examples/lab_vlm (`python -m lab_vlm.dataset FOLDER`) and type "
            "--data FOLDER/questions.jsonl"
        )
    if held := [task.name for task in tasks if task.held_out]:
        raise TrainError(
            f"scores are published on the questions of {held[0]}, and training on them would make every later score "
            f"worthless: name another split, {held[0]}:split=train, where it has one; to train on them all the same, "
            "type their split"
        )
    questions = [(task, sample) for task in tasks for sample in task.samples]
    if not questions:
        raise TrainError("the training data has no questions: bring at least two pictures with a question each")
    return questions


def check_pictures(questions: Sequence[tuple[Task, Sample]]) -> None:
    """Passes where the file of every picture exists, before anything long begins.

    Raises:
        TrainError: with the first sample whose picture is missing.
    """
    there: dict[Path, bool] = {}
    missing = []
    for _, sample in questions:
        if isinstance(sample.picture, Path) and not there.setdefault(sample.picture, sample.picture.is_file()):
            missing.append(sample)
    if missing:
        more = f" (and {len(missing) - 1} more samples)" if len(missing) > 1 else ""
        raise TrainError(
            f"sample {missing[0].id!r} asks about {str(missing[0].picture)!r}, but there is no such file{more}: mend "
            "the paths, or type --on-bad skip"
        )


def picture_of(task: Task, sample: Sample) -> str:
    """What the samples about one picture share: its file; for pictures that are made, the task and its image id."""
    if isinstance(sample.picture, Path):
        return str(sample.picture)
    return f"{task.name}/{sample.image_id or sample.id}"


def split(questions: list[tuple[Task, Sample]], share: float) -> tuple[list, list]:
    """(training, validation) questions: whole images, chosen by a hash of their names, so that it never changes."""

    places = [zlib.crc32(f"validation {s.image_id or s.id}".encode()) % _PLACES for _, s in questions]
    held = [place < share * _PLACES for place in places]
    train = [q for q, out in zip(questions, held, strict=True) if not out]
    validation = [q for q, out in zip(questions, held, strict=True) if out]
    if not train or not validation:
        other = _share_that_splits(places, share)
        typed = "bring more pictures" if other is None else f"type --val-share {other:g}, bring more pictures"
        side = "validation" if not validation else "training"
        raise TrainError(
            f"{len(questions)} questions about {len({picture_of(*q) for q in questions})} pictures: --val-share "
            f"{share:g} leaves none for {side}; {typed}, or name --val-data"
        )
    return train, validation


def _share_that_splits(places: Sequence[int], share: float) -> float | None:
    """The share nearest to `share`, in whole percents where one will do, that leaves questions on both sides."""
    least, most = min(places), max(places)
    able = [n / 100 for n in range(1, 100) if least < n / 100 * _PLACES <= most]
    if not able and least < most:
        able = [most / _PLACES]
    return min(able, key=lambda one: abs(one - share), default=None)


@dataclass
class Questions:
    """An endless, shuffled stream of images with some questions about each.

    Attributes:
        questions: (task, sample) pairs; see `picture_of` for those that share an image.
        images: how many images a micro-batch has.
        each: at most so many questions an image.
        seed: of the order.
        skipped: "task/id" -> why, for samples that were left out.
    """

    questions: list[tuple[Task, Sample]]
    images: int
    each: int
    seed: int
    skipped: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        groups: dict[str, list[int]] = {}
        for i, pair in enumerate(self.questions):
            groups.setdefault(picture_of(*pair), []).append(i)
        self._groups = list(groups.values())
        self._order: tuple[int, list[int]] = (-1, [])

    def __len__(self) -> int:
        """Images."""
        return len(self._groups)

    @cached_property
    def digest(self) -> str:
        """Tells whether two streams ask the same questions in the same order."""
        texts = (f"{name_of(*pair)}\0{pair[1].question}\0{pair[1].answer}\0" for pair in self.questions)
        return hashlib.sha256("".join(texts).encode()).hexdigest()[:16]

    def batch(self, number: int) -> list[tuple[Task, Sample]]:
        """The questions of micro-batch `number` (0, 1, 2, ...), those of an image side by side."""
        chosen = []
        for place in range(number * self.images, (number + 1) * self.images):
            epoch, index = divmod(place, len(self._groups))
            if self._order[0] != epoch:
                shuffled = torch.randperm(len(self._groups), generator=generator(self.seed, "order", epoch))
                self._order = (epoch, shuffled.tolist())
            group = self._groups[self._order[1][index]]
            draw = torch.randperm(len(group), generator=generator(self.seed, "questions", place))
            chosen += [self.questions[group[i]] for i in draw[: self.each].tolist()]
        return [pair for pair in chosen if name_of(*pair) not in self.skipped]

    def skip(self, pair: tuple[Task, Sample], why: str) -> None:
        """Leaves a question out from now on.

        Raises:
            TrainError: it was the last one.
        """
        self.skipped[name_of(*pair)] = why
        if all(name_of(*one) in self.skipped for one in self.questions):
            raise TrainError(f"not one of {len(self.questions)} questions can be used; the last: {why}")


def name_of(task: Task, sample: Sample) -> str:
    """Ids are unique in their task only."""
    return f"{task.name}/{sample.id}"
