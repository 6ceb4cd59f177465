"""Samples from a JSON Lines file: the lab's own, and any that a user brings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from gripvlm.tasks.base import Sample, Task, TaskError
from gripvlm.tasks.metrics import get_metric
from gripvlm.utils.disk import read_text
from gripvlm.utils.strict_json import BadJSON, parse

__all__ = ["JsonlTask", "read_samples"]

_EXAMPLE = '{"image": "cat.png", "question": "What is this?", "answer": "a cat"}'


def read_samples(file: Path, images: Path, answers: bool = True, grid: tuple[int, int] | None = None) -> list[Sample]:
    """One sample a line; blank lines are skipped. Without `answers` a line may leave its answer out.

    A line is an object with `image` (a path relative to `images`, or a list of them), `question` and `answer`, and if
    wanted `choices` (list of strings), `id`, `family`, `pair`, `evidence` (list of patch indices, see `Sample`),
    `answers` (list of strings: all that are accepted, or that people gave; the commonest is the `answer` where none is
    written).

    Args:
        grid: (h, w) that `evidence` counts in; where it is None, indices are not checked.

    Raises:
        TaskError: with the line's number, where a line is none of that or an id comes twice.
    """
    samples: dict[str, Sample] = {}
    names: list[tuple[str, ...]] = []
    for number, row in _rows(file):
        where = f"{file}:{number}"
        names.append(_pictures(row, where))
        sample = _sample(row, where, number, tuple(images / name for name in names[-1]), answers)
        if sample.id in samples:
            raise TaskError(f"{str(file)!r} has the id {sample.id!r} twice: ids must differ")
        samples[sample.id] = sample
        if grid is not None:
            try:
                sample.evidence_by_image(grid)
            except TaskError as error:
                raise TaskError(f"{where}: {error}") from None
    if not samples:
        raise TaskError(f"{str(file)!r} has no questions: write one a line, such as {_EXAMPLE}")
    clusters = zip(samples.values(), _clusters(names), strict=True)
    return [replace(sample, image_id=cluster) for sample, cluster in clusters]


def _clusters(names: Sequence[tuple[str, ...]]) -> list[str]:
    """For each question's pictures [n] the name of their cluster, which is one of its pictures.

    Two pictures are in one cluster where a question shows both, or a chain of such pairs leads from one to the other:
    questions of different clusters have no picture in common, so that they can be drawn independently.
    """
    leads = {name: name for question in names for name in question}

    def first(name: str) -> str:
        while leads[name] != name:
            leads[name] = leads[leads[name]]  # chains stay short
            name = leads[name]
        return name

    for question in names:
        for other in question[1:]:
            leads[first(other)] = first(question[0])
    return [first(question[0]) for question in names]


def _rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, object) of each line that is not blank."""
    try:
        # Editors on Windows put a mark in front of the text, which is no part of the first line.
        lines = read_text(file, "utf-8-sig").split("\n")
    except FileNotFoundError:
        raise TaskError(
            f"no file {str(file)!r}: check the path; the file has one question a line, such as {_EXAMPLE}"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise TaskError(f"{str(file)!r} cannot be read as text: {reason}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        advice = f"write one object a line, such as {_EXAMPLE}"
        try:
            row = parse(line)
        except BadJSON as error:
            raise TaskError(f"{file}:{number} is not JSON that can be used (it {error}): {advice}") from None
        if not isinstance(row, dict):
            raise TaskError(f"{file}:{number} is a {type(row).__name__}: {advice}")
        yield number, row


def _pictures(row: dict[str, Any], where: str) -> tuple[str, ...]:
    """The names of the row's pictures, one or several."""
    value = row.get("image")
    names = value if isinstance(value, list) else [value]
    if not names or not all(isinstance(name, str) and name.strip() for name in names):
        raise TaskError(
            f"{where} needs a picture's path 'image', or a list of such paths, got {value!r}: write for instance "
            f"{_EXAMPLE}"
        )
    return tuple(names)


def _sample(row: dict[str, Any], where: str, number: int, pictures: tuple[Path, ...], answers: bool) -> Sample:
    accepted = _list_of(row, "answers", where, "texts", lambda text: isinstance(text, str) and text.strip() != "")
    choices = _list_of(row, "choices", where, "texts", lambda text: isinstance(text, str))
    evidence = _list_of(row, "evidence", where, "patch indices", lambda patch: type(patch) is int and patch >= 0)
    if row.get("answer") is None and accepted:
        row["answer"] = Counter(accepted).most_common(1)[0][0]
    # Training may take the model's own answer, and reports blank ones itself.
    if row.get("answer") is None and not answers:
        row["answer"] = ""
    for key in ("question", "answer"):
        value, may_be_blank = row.get(key), key == "answer" and not answers
        if not isinstance(value, str) or not (value.strip() or may_be_blank):
            raise TaskError(f"{where} needs a text {key!r}, got {value!r}: write for instance {_EXAMPLE}")
    # An answer that is no choice could never be scored as right.
    if choices and row["answer"] and row["answer"] not in choices:
        raise TaskError(f"{where}: the answer {row['answer']!r} is none of the choices {list(choices)}")
    return Sample(
        id=str(row.get("id", number)),
        pictures=pictures,
        question=row["question"],
        answer=row["answer"],
        choices=choices,
        family=str(row.get("family", "custom")),
        pair=None if row.get("pair") is None else str(row["pair"]),
        evidence=evidence,
        answers=accepted,
    )


def _list_of(row: dict[str, Any], key: str, where: str, kind: str, fits: Callable[[Any], bool]) -> tuple[Any, ...]:
    """The row's list of that name, () where there is none."""
    values = row.get(key) or []
    if not isinstance(values, list) or not all(map(fits, values)):
        raise TaskError(f"{where}: {key} must be a list of {kind}, got {values!r}")
    return tuple(values)


class JsonlTask(Task):
    """A user's own questions, `jsonl:PATH` or `custom:PATH`; images are looked up beside the file.

    They are scored by one of `METRICS`, `jsonl:PATH,metric=vqa`; by default "choice".

    Where a line has choices that its question does not name, the prompt lists them. Without `answers`
    lines may leave theirs out: enough to train on, but not to be scored. `evidence` counts in the raster of a picture
    that the first line names as `evidence_grid`, [h, w].
    """

    max_new_tokens = 32

    def __init__(self, path: str | Path, answers: bool = True, metric: str = "choice", name: str | None = None) -> None:
        self.path, self.answers = Path(path).expanduser(), answers
        self.metric = get_metric(metric)
        self.name = name or f"jsonl:{path}"

    @cached_property
    def samples(self) -> tuple[Sample, ...]:
        folder = self.path.parent
        samples = tuple(read_samples(self.path, folder, self.answers, self.evidence_grid))
        # Before the run and not in the middle of it; training decides by itself what a missing picture does.
        paths = dict.fromkeys(path for sample in samples for path in sample.pictures if self.answers)
        if missing := [path for path in paths if isinstance(path, Path) and not path.exists()]:
            more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            name = str(missing[0].relative_to(folder) if missing[0].is_relative_to(folder) else missing[0])
            raise TaskError(
                f"{str(self.path)!r} asks about {name!r}{more}, but there is no such file: paths are relative to "
                f"the folder {str(folder)!r}"
            )
        return samples

    @cached_property
    def evidence_grid(self) -> tuple[int, int] | None:  # type: ignore[override]
        """(h, w) as the file's first line says, None where it does not."""
        _, first = next(_rows(self.path), (0, {}))
        grid = first.get("evidence_grid")
        if grid is None:
            return None
        if not (isinstance(grid, list) and len(grid) == 2 and all(type(side) is int and side > 0 for side in grid)):
            raise TaskError(f"{self.path}:1: evidence_grid must be [rows, columns], got {grid!r}")
        return grid[0], grid[1]

    def score(self, prediction: str, sample: Sample) -> float:
        return self.metric(prediction, sample)

    def prompt(self, sample: Sample) -> str:
        # A question that lists its choices itself needs no second list.
        if all(choice in sample.question for choice in sample.choices):
            return sample.question
        return f"{sample.question}\nAnswer with one of: {', '.join(sample.choices)}."
