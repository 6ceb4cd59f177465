"""Samples from a JSON Lines file: the lab's own, and any that a user brings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from gripvlm.tasks.base import Sample, Task, TaskError
from gripvlm.tasks.metrics import get_metric
from gripvlm.utils.disk import read_text
from gripvlm.utils.strict_json import BadJSON, parse

__all__ = ["JsonlTask", "read_samples"]

_EXAMPLE = '{"image": "cat.png", "question": "What is this?", "answer": "a cat"}'


def read_samples(file: Path, images: Path, answers: bool = True) -> list[Sample]:
    """One sample a line; blank lines are skipped. Without `answers` a line may leave its answer out.

    A line is an object with `image` (a path, relative to `images`), `question` and `answer`, and if
    wanted `choices` (list of strings), `id`, `family`, `pair`, `evidence` (list of patch indices), `answers` (list of
    strings: all that are accepted, or that people gave; the commonest is the `answer` where none is written).

    Raises:
        TaskError: with the line's number, where a line is none of that or an id comes twice.
    """
    try:
        lines = read_text(file, "utf-8-sig").split("\n")
    except FileNotFoundError:
        raise TaskError(
            f"no file {str(file)!r}: type jsonl:PATH with one question a line, such as {_EXAMPLE}"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise TaskError(f"{str(file)!r} cannot be read as text: {reason}") from None
    samples = [_sample(line, f"{file}:{i}", i, images, answers) for i, line in enumerate(lines, 1) if line.strip()]
    if not samples:
        raise TaskError(f"{str(file)!r} has no questions: write one a line, such as {_EXAMPLE}")
    seen: set[str] = set()
    for sample in samples:
        if sample.id in seen:
            raise TaskError(f"{str(file)!r} has the id {sample.id!r} twice: ids must differ")
        seen.add(sample.id)
    return samples


def _sample(line: str, where: str, number: int, images: Path, answers: bool) -> Sample:
    try:
        row: Any = parse(line)
    except BadJSON as error:
        raise TaskError(
            f"{where} is not JSON that can be used (it {error}): write one object a line, such as {_EXAMPLE}"
        ) from None
    if not isinstance(row, dict):
        raise TaskError(f"{where} is a {type(row).__name__}: write one object a line, such as {_EXAMPLE}")
    accepted = _list_of(row, "answers", where, "texts", lambda text: isinstance(text, str) and text.strip() != "")
    choices = _list_of(row, "choices", where, "texts", lambda text: isinstance(text, str))
    evidence = _list_of(row, "evidence", where, "patch indices", lambda patch: type(patch) is int and patch >= 0)
    if accepted and row.get("answer") is None:
        row["answer"] = Counter(accepted).most_common(1)[0][0]
    if not answers and row.get("answer") is None:
        row["answer"] = ""
    for key in ("image", "question", "answer"):
        if key == "answer" and not answers and isinstance(row[key], str):
            # Training may take the model's own answer, and reports blank ones itself.
            continue
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise TaskError(f"{where} needs a text {key!r}, got {row.get(key)!r}: write for instance {_EXAMPLE}")
    # An answer that is no choice could never be scored as right.
    if choices and row["answer"] and row["answer"] not in choices:
        raise TaskError(f"{where}: the answer {row['answer']!r} is none of the choices {list(choices)}")
    pair = row.get("pair")
    return Sample(
        id=str(row.get("id", number)),
        picture=images / row["image"],
        question=row["question"],
        answer=row["answer"],
        choices=choices,
        family=str(row.get("family", "custom")),
        pair=None if pair is None else str(pair),
        evidence=evidence,
        image_id=row["image"],
        answers=accepted,
    )


def _list_of(row: dict[str, Any], key: str, where: str, kind: str, fits: Callable[[Any], bool]) -> tuple[Any, ...]:
    """The row's list of that name, () where there is none."""
    values = row.get(key) or []
    if not isinstance(values, list) or not all(fits(value) for value in values):
        raise TaskError(f"{where}: {key} must be a list of {kind}, got {values!r}")
    return tuple(values)


class JsonlTask(Task):
    """A user's own questions, `jsonl:PATH` or `custom:PATH`; images are looked up beside the file.

    They are scored by one of `METRICS`, `jsonl:PATH,metric=vqa`; by default "choice".

    Where a line has choices that its question does not name, the prompt lists them. Without `answers`
    lines may leave theirs out: enough to train on, but not to be scored. `evidence` counts in the raster that the
    first line names as `evidence_grid`, [h, w].
    """

    max_new_tokens = 32

    def __init__(self, path: str | Path, answers: bool = True, metric: str = "choice", name: str | None = None) -> None:
        self.path, self.answers = Path(path).expanduser(), answers
        self.metric = get_metric(metric)
        self.name = name or f"jsonl:{path}"

    @cached_property
    def samples(self) -> tuple[Sample, ...]:
        samples = tuple(read_samples(self.path, self.path.parent, self.answers))
        if (grid := self.evidence_grid) is not None:
            for sample in samples:
                if max(sample.evidence, default=0) >= grid[0] * grid[1]:
                    raise TaskError(
                        f"{str(self.path)!r}: sample {sample.id!r} marks patch {max(sample.evidence)}, but "
                        f"evidence_grid {list(grid)} has patches 0 to {grid[0] * grid[1] - 1}"
                    )
        if not self.answers:
            # Training decides by itself what a missing picture does.
            return samples
        # Before the run and not in the middle of it.
        missing = [
            name for name in dict.fromkeys(s.image_id for s in samples) if not (self.path.parent / name).exists()
        ]
        if missing:
            more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise TaskError(
                f"{str(self.path)!r} asks about {missing[0]!r}{more}, but there is no such file: paths are relative to "
                f"the folder {str(self.path.parent)!r}"
            )
        return samples

    @cached_property
    def evidence_grid(self) -> tuple[int, int] | None:  # type: ignore[override]
        """(h, w) as the file's first line says, None where it does not."""
        try:
            lines = read_text(self.path, "utf-8-sig").split("\n")
            first = parse(next((line for line in lines if line.strip()), "{}"))
        except (OSError, UnicodeDecodeError, BadJSON) as error:
            raise TaskError(f"{str(self.path)!r} cannot be read: {error}") from None
        grid = first.get("evidence_grid") if isinstance(first, dict) else None
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
