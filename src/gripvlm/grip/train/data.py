"""Training data: which questions each step sees, and at which budgets.

Both are functions of the seed and the step alone, so that any step can be made again.
"""

from __future__ import annotations

import hashlib
import os
import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from gripvlm.errors import TrainError
from gripvlm.grip.train.config import TrainConfig, parse_shares
from gripvlm.tasks import JsonlTask, LabTask, Sample, Task, get_tasks
from gripvlm.tasks.lab_tasks import SAMPLES

Question: TypeAlias = tuple[Task, Sample]

_PLACES = 10_000
"""A picture's place between training and validation, from a hash of its name, is one of so many."""


def generator(seed: int, *names: object) -> torch.Generator:
    """A stream of random numbers of its own for each (seed, names): nothing to save, nothing to resume."""
    text = "/".join(map(str, (seed, *names)))
    # Two hashes, 63 bits: with the 32 of one, two of a hundred thousand names would likely share a stream.
    high, low = zlib.crc32(text.encode()), zlib.crc32(text[::-1].encode() + b"gripvlm")
    return torch.Generator().manual_seed((high << 32 | low) & (2**63 - 1))


def load_questions(data: str | Task | Sequence[Task]) -> list[Question]:
    """All questions of a task's name, of `PATH.jsonl` (answers may be missing there), or of `Task` objects.

    Raises:
        TrainError: nothing is named, or questions that scores are published on: the lab's, or a benchmark's unless its
            split is named.
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
    # Scores on questions that were trained on say nothing.
    if any(isinstance(task, LabTask) and task.folder in SAMPLES.values() for task in tasks):
        raise TrainError(
            "the lab tasks are the test split, and training on it would make every later score worthless: make "
            "training questions (docs/lab.md; for lab `PYTHONPATH=examples python -m lab_vlm.dataset FOLDER`) and type "
            "--data FOLDER/questions.jsonl"
        )
    if held_out := [task.name for task in tasks if task.held_out]:
        raise TrainError(
            f"scores are published on the questions of {held_out[0]}, and training on them would make every later "
            f"score worthless: name another split, {held_out[0]}:split=train, where it has one; to train on them all "
            "the same, name their split"
        )
    questions = [(task, sample) for task in tasks for sample in task.samples]
    if not questions:
        raise TrainError("the training data has no questions: bring at least two pictures with a question each")
    return questions


def check_pictures(questions: Sequence[Question]) -> None:
    """Refuses questions about files that do not exist, before anything long begins.

    Raises:
        TrainError: with the first sample whose picture is missing.
    """
    files = {path for _, sample in questions for path in sample.pictures if isinstance(path, Path)}
    lost = {path for path in files if not path.is_file()}
    if missing := [sample for _, sample in questions if lost.intersection(sample.pictures)]:
        path = next(path for path in missing[0].pictures if path in lost)
        more = f" (and {len(missing) - 1} more samples)" if len(missing) > 1 else ""
        raise TrainError(
            f"sample {missing[0].id!r} asks about {str(path)!r}, but there is no such file{more}: mend the paths, or "
            "type --on-bad-sample skip"
        )


def check_apart(questions: Sequence[Question], held_out: Sequence[Question]) -> None:
    """Refuses validation questions that are training questions: the same words about the same files.

    Raises:
        TrainError: some are.
    """

    def asked(sample: Sample) -> tuple[Any, ...]:
        return (*(os.path.abspath(path) for path in _files(sample)), sample.question)

    known = {asked(s) for _, s in questions if _files(s)}
    if same := [s.id for _, s in held_out if _files(s) and asked(s) in known]:
        raise TrainError(
            f"{len(same)} of {len(held_out)} validation questions are training questions too, such as {same[0]!r}: "
            "name others with --eval-data, or leave it out, and --eval-share of the pictures is held out"
        )


def key_of(task: Task, sample: Sample) -> str:
    """A sample's id is unique in its task only."""
    return f"{task.name}/{sample.id}"


def pictures_of(task: Task, sample: Sample) -> str:
    """What the samples with the same pictures share: the files; for a picture that is made, the task and its image id.

    Of several pictures that are made nothing says whether two samples show the same ones.
    """
    if files := _files(sample):
        return "\n".join(map(str, files))
    return f"{task.name}/{sample.id if len(sample.pictures) > 1 else sample.image_id or sample.id}"


def _files(sample: Sample) -> list[Path]:
    """The files of its pictures, [] where one of them is made by a function."""
    files = [path for path in sample.pictures if isinstance(path, Path)]
    return files if len(files) == len(sample.pictures) else []


def split(questions: list[Question], share: float) -> tuple[list[Question], list[Question]]:
    """(training, validation) questions: whole clusters of images (`Sample.image_id`), chosen by a hash of their names.

    Raises:
        TrainError: one side would be empty; with a share for which neither is.
    """
    # A hash and no draw, so that it never changes: pictures that are added later do not move the others.
    places = [zlib.crc32(f"validation {s.image_id or s.id}".encode()) % _PLACES for _, s in questions]
    train = [q for q, place in zip(questions, places, strict=True) if place >= share * _PLACES]
    held_out = [q for q, place in zip(questions, places, strict=True) if place < share * _PLACES]
    if not train or not held_out:
        side = "validation" if not held_out else "training"
        raise TrainError(
            f"questions: {len(questions)}, pictures: {len({pictures_of(*q) for q in questions})}: --eval-share "
            f"{share:g} leaves none for {side}; type another --eval-share, bring more pictures, or name --eval-data"
        )
    return train, held_out


@dataclass
class QuestionStream:
    """An endless, shuffled stream of images with some questions about each.

    An image here is what a question shows: for a question about several pictures, all of them together.

    Attributes:
        questions: (task, sample) pairs; see `pictures_of` for those that share an image.
        images: images in a micro-batch.
        per_image: questions an image at most.
        seed: of the order.
        skipped: `key_of` -> reason, for samples that were left out.
    """

    questions: list[Question]
    images: int
    per_image: int
    seed: int
    skipped: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        groups: dict[str, list[int]] = {}
        for i, pair in enumerate(self.questions):
            groups.setdefault(pictures_of(*pair), []).append(i)
        self._groups = list(groups.values())
        self._order: tuple[int, list[int]] = (-1, [])

    def __len__(self) -> int:
        """Images."""
        return len(self._groups)

    @cached_property
    def digest(self) -> str:
        """Equal for two streams that ask the same questions in the same order."""
        texts = (f"{key_of(*pair)}\0{pair[1].question}\0{pair[1].answer}\0" for pair in self.questions)
        return hashlib.sha256("".join(texts).encode()).hexdigest()[:16]

    def batch(self, number: int) -> list[Question]:
        """The questions of micro-batch `number` (0, 1, 2, ...), those of an image side by side."""
        chosen = []
        for place in range(number * self.images, (number + 1) * self.images):
            epoch, index = divmod(place, len(self._groups))
            # One epoch is kept; a resumed run makes it again, from the same numbers.
            if self._order[0] != epoch:
                shuffled = torch.randperm(len(self._groups), generator=generator(self.seed, "order", epoch))
                self._order = (epoch, shuffled.tolist())
            group = self._groups[self._order[1][index]]
            draw = torch.randperm(len(group), generator=generator(self.seed, "questions", place))
            chosen += [self.questions[group[i]] for i in draw[: self.per_image].tolist()]
        # Only now, so that a question that is left out does not change the draw of the others.
        return [pair for pair in chosen if key_of(*pair) not in self.skipped]

    def skip(self, pair: Question, reason: str) -> None:
        """Leaves a question out from now on.

        Raises:
            TrainError: it was the last one.
        """
        self.skipped[key_of(*pair)] = reason
        if all(key_of(*question) in self.skipped for question in self.questions):
            raise TrainError(f"not one of {len(self.questions)} questions can be used; the last: {reason}")


def draw_counts(config: TrainConfig, sizes: Tensor, owner: Tensor, random: torch.Generator) -> Tensor:
    """[I] tokens to keep of each image; the images of one question share a fraction.

    Args:
        config: `log_uniform` draws a fraction between keep_low and keep_high, `choices` one of keep_choices.
        sizes: [I] tokens of each image.
        owner: [I] the question each image belongs to.
    """
    u = torch.rand(int(owner.max()) + 1, generator=random, dtype=torch.float64)
    if config.budgets == "choices":
        choices = torch.tensor(parse_shares(config.keep_choices, "keep_choices"), dtype=torch.float64)
        fraction = choices[(u * len(choices)).long()]
    else:
        fraction = config.keep_low * (config.keep_high / config.keep_low) ** u
    counts = (fraction[owner.cpu()] * sizes.cpu() + 0.5).floor().long()  # rounded as `Budget.count`
    return counts.clamp(min=1).minimum(sizes.cpu()).to(sizes.device)


def draw_tower_counts(config: TrainConfig, sizes: Tensor, counts: Tensor, random: torch.Generator) -> Tensor:
    """[I] tokens to keep inside the vision tower: log-uniform from tower_low to tower_high, at least `counts` [I]."""
    u = torch.rand(len(sizes), generator=random, dtype=torch.float64)
    share = config.tower_low * (config.tower_high / config.tower_low) ** u
    found = (share * sizes.cpu() + 0.5).floor().long().clamp(min=1).minimum(sizes.cpu())
    return torch.maximum(found.to(sizes.device), counts)
