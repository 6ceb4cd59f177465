"""Which questions are asked, in which batches, and which of these are one machine's share."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from gripvlm.errors import GripError
from gripvlm.tasks import Sample, Task

__all__ = ["Chunk", "Shard", "asked_by", "make_chunks"]


@dataclass(frozen=True)
class Shard:
    """Part `number` of `of`, counted from 1."""

    number: int
    of: int

    @classmethod
    def parse(cls, text: str | Shard) -> Shard:
        """`"2/3"` is the second of three parts.

        Raises:
            GripError: anything else.
        """
        if isinstance(text, Shard):
            return text
        found = re.fullmatch(r"\s*(\d+)\s*/\s*(\d+)\s*", text)
        if found is None or not 1 <= int(found[1]) <= int(found[2]):
            raise GripError(f"shard {text!r}: type i/n with i from 1 to n, such as 2/3 for the second of three")
        return cls(int(found[1]), int(found[2]))

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"


@dataclass(frozen=True, eq=False)
class Chunk:
    """One batch of one task."""

    task: Task
    samples: list[Sample]

    @property
    def ids(self) -> list[str]:
        return [sample.id for sample in self.samples]


def make_chunks(
    tasks: Sequence[Task], drawn: dict[str, list[Sample]], batch_size: int, shard: Shard | None = None
) -> list[Chunk]:
    """The batches of all tasks, or every n-th of them.

    Whole batches are dealt out, so a question sits among the same neighbours, and gets the same
    padding, whether one machine asks them all or many.

    Raises:
        GripError: the shard's share is empty.
    """
    chunks = [
        Chunk(task, drawn[task.name][start : start + batch_size])
        for task in tasks
        for start in range(0, len(drawn[task.name]), batch_size)
    ]
    if shard is None:
        return chunks
    mine = chunks[shard.number - 1 :: shard.of]
    if not mine:
        there, advice = f"are only {len(chunks)} batches", f"Type at most {len(chunks)} shards"
        if len(chunks) == 1:
            there, advice = "is only 1 batch", "Leave --shard out"
        raise GripError(
            f"shard {shard} has nothing to do: there {there} of {batch_size}. {advice}, or type a smaller --batch"
        )
    return mine


def asked_by(chunks: Sequence[Chunk]) -> dict[str, list[Sample]]:
    """Task -> the samples in these batches, in order; tasks without any are left out."""
    found: dict[str, list[Sample]] = {}
    for chunk in chunks:
        found.setdefault(chunk.task.name, []).extend(chunk.samples)
    return found
