"""The plan of a run: which questions and variants, in which batches, and which of these are one shard's."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from gripvlm.errors import GripError
from gripvlm.eval.environment import versions
from gripvlm.eval.variants import Variant, digest
from gripvlm.tasks import Sample, Task

__all__ = ["Batch", "Plan", "parse_shard"]


@dataclass(frozen=True, eq=False)
class Batch:
    """Questions of one task that go through the model together."""

    task: Task
    samples: list[Sample]

    @property
    def ids(self) -> list[str]:
        return [sample.id for sample in self.samples]


@dataclass(frozen=True)
class Plan:
    """The questions and variants of a run: what must be the same for a run to resume.

    Attributes:
        tasks: by name.
        variants: `full`, every pruner at every budget, `blind`; None before the model is known (`--pruners all`).
        limit: at most so many questions a task, drawn with `seed`.
        positions: "original" or "renumbered".
        shard: (2, 3) for the second third of the batches; None for all of them.
    """

    tasks: Sequence[Task]
    variants: Sequence[Variant] | None
    limit: int | None = None
    seed: int = 0
    batch_size: int = 8
    positions: str = "original"
    shard: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise GripError(f"batch_size={self.batch_size}: use 1 or more")

    @cached_property
    def samples(self) -> dict[str, list[Sample]]:
        """Task -> its questions."""
        return {task.name: task.take(self.limit, self.seed) for task in self.tasks}

    @cached_property
    def batches(self) -> list[Batch]:
        """The batches of all tasks, or every n-th of them for a shard.

        Raises:
            GripError: the shard has no batch.
        """
        batches = []
        for task in self.tasks:
            samples = self.samples[task.name]
            for start in range(0, len(samples), self.batch_size):
                batches.append(Batch(task, samples[start : start + self.batch_size]))
        if self.shard is None:
            return batches
        number, count = self.shard
        if number > len(batches):
            raise GripError(
                f"shard {number}/{count} has nothing to do, as there are {len(batches)} batches of {self.batch_size}: "
                f"use at most {len(batches)} shards, or a smaller batch size"
            )
        # Whole batches, so that a question has the same neighbours and the same padding as in one process.
        return batches[number - 1 :: count]

    def config(self, model_name: str) -> dict[str, Any]:
        """The configuration that is known before the model; the same for all shards of a run."""
        # Another version may answer differently: such answers must not be mixed in one file.
        used = {name: text for name, text in versions().items() if name in ("torch", "transformers", "gripvlm")}
        config: dict[str, Any] = {
            "model": model_name,
            "tasks": [f"{name} ({len(samples)}, {digest(samples)})" for name, samples in self.samples.items()],
            "limit": self.limit,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "positions": self.positions,
            "versions": used,
        }
        if self.variants is not None:
            config["arms"] = [f"{v.label} {v.keep_text} {json.dumps(v.config, sort_keys=True)}" for v in self.variants]
        return config


def parse_shard(text: str) -> tuple[int, int]:
    """(2, 3) from "2/3", the second of three parts.

    Raises:
        GripError: anything else.
    """
    match = re.fullmatch(r"\s*(\d+)\s*/\s*(\d+)\s*", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise GripError(f"shard {text!r}: use i/n with i from 1 to n, such as 2/3 for the second of three")
    return int(match[1]), int(match[2])
