"""What a run says of itself: lines in metrics.jsonl, numbers for a tracker, calls to a user's callbacks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gripvlm.errors import TrainError
from gripvlm.grip.train.processes import Processes
from gripvlm.grip.train.stage import Stats
from gripvlm.utils import disk
from gripvlm.utils.strict_json import BadJSON, parse

__all__ = ["Callback", "Journal"]


class Callback:
    """What a user of `train` is told of it, in the first process; an error in a method ends the training."""

    def on_step_end(self, stage: str, step: int, metrics: Stats) -> None:
        """After a step, with what is logged about it."""

    def on_evaluate(self, stage: str, step: int, metrics: Stats) -> None:
        """After a validation, with its means."""

    def on_save(self, stage: str, step: int, checkpoint: Path) -> None:
        """After a checkpoint was written."""


class Journal:
    """The journal of a stage; the processes other than the first write nothing.

    Args:
        stage: the stage's name.
        file: metrics.jsonl.
        callbacks: told of steps, validations and checkpoints.
        first_step: steps of this run before the stage, which trackers count on from.
    """

    def __init__(
        self, stage: str, file: Path, processes: Processes, callbacks: Sequence[Callback], first_step: int
    ) -> None:
        self.stage, self.file, self.processes = stage, file, processes
        self.callbacks, self.first_step = callbacks, first_step

    def log(self, line: dict[str, Any]) -> None:
        """Writes a line, which has a `step`; its numbers, and those in `eval`, go to the tracker."""
        if self.processes.first:
            disk.append(self.file, json.dumps({"stage": self.stage, **_rounded(line)}) + "\n", new=True)
            scores = {f"eval/{name}": value for name, value in line.get("eval", {}).items()}
            numbers = {f"{self.stage}/{k}": v for k, v in (line | scores).items() if isinstance(v, int | float)}
            self.processes.accelerator.log(numbers, step=self.first_step + line["step"])

    def call(self, event: str, step: int, about: Any) -> None:
        """Calls the method `event` of every callback."""
        if self.processes.first:
            for callback in self.callbacks:
                getattr(callback, event)(self.stage, step, about)

    def forget_after(self, step: int) -> None:
        """Drops the stage's lines after a step, so that none is logged twice.

        Raises:
            TrainError: the file is damaged.
        """
        if not self.processes.first or not self.file.exists():
            return
        text = disk.read_bytes(self.file)
        lines = []
        for number, line in enumerate(text[: text.rfind(b"\n") + 1].splitlines(), 1):  # a kill may leave half a line
            try:
                entry = parse(line)
                if entry["stage"] != self.stage or entry["step"] <= step:
                    lines.append(json.dumps(entry) + "\n")
            except (BadJSON, KeyError, TypeError) as error:
                raise TrainError(
                    f"line {number} of {self.file} is damaged ({error}): mend that line, or move the file away"
                ) from None
        disk.write(self.file, "".join(lines))


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    return {key: _rounded(part) for key, part in value.items()} if isinstance(value, dict) else value
