"""One process or several: `accelerate launch` starts them, and gradients are added over all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from gripvlm.errors import TrainError

__all__ = ["Processes"]

T = TypeVar("T")


class Processes:
    """This process among `count`; rank 0 writes files.

    Every process holds the frozen model and a copy of the scorer; only the scorer's gradients travel.

    Args:
        log_with: tensorboard, trackio or "", for accelerate's trackers.
        folder: where trackers write.
        cpu: stay on the CPU.
    """

    def __init__(self, log_with: str = "", folder: Path | None = None, cpu: bool = False) -> None:
        self.count, self.rank, self._accelerator = 1, 0, None
        if not (log_with or _launched()):
            return
        try:
            from accelerate import Accelerator
        except ImportError:
            raise TrainError(
                "several processes and trackers need accelerate: type pip install 'gripvlm[train]'"
            ) from None
        self._accelerator = Accelerator(cpu=cpu, log_with=log_with or None, project_dir=folder)
        self.count, self.rank = self._accelerator.num_processes, self._accelerator.process_index
        if log_with:
            self._accelerator.init_trackers("gripvlm")
            if not self.rank and not self._accelerator.trackers:
                raise TrainError(f"log_with = {log_with!r} is not installed: type pip install {log_with}")

    def add_gradients(self, weights: Sequence[torch.nn.Parameter]) -> None:
        """Sums gradients over all processes, in place."""
        if self.count == 1:
            return
        assert self._accelerator is not None
        flat = torch.cat([(torch.zeros_like(w) if w.grad is None else w.grad).flatten() for w in weights])
        total = self._accelerator.reduce(flat, "sum")
        start = 0
        for weight in weights:
            weight.grad = total[start : start + weight.numel()].view_as(weight).clone()
            start += weight.numel()

    def average(self, stats: dict[str, float]) -> dict[str, float]:
        """Means over processes of the numbers that all of them have."""
        if self.count == 1:
            return stats
        everyone = self.everyones(stats)
        return {key: sum(s[key] for s in everyone) / len(everyone) for key in stats if all(key in s for s in everyone)}

    def any(self, flag: bool) -> bool:
        """Whether any process says so."""
        return any(self.everyones(flag))

    def largest(self, value: float) -> float:
        """The largest of all processes' values."""
        return max(self.everyones(value))

    def everyones(self, value: T) -> list[T]:
        """The value of each process, in the order of their ranks."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(found, value)
        return found

    def log(self, values: dict[str, float], step: int) -> None:
        """To the trackers, where there are any."""
        if self._accelerator is not None and self._accelerator.trackers:
            self._accelerator.log(values, step=step)

    def wait(self) -> None:
        """Until all processes are here."""
        if self._accelerator is not None:
            self._accelerator.wait_for_everyone()

    def end(self) -> None:
        """Closes the trackers."""
        if self._accelerator is not None:
            self._accelerator.end_training()


def _launched() -> bool:
    """Whether torchrun or `accelerate launch` started several processes."""
    import os

    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def launched_device(name: str) -> str:
    """The device of this process: `name`, or the one of its rank where several processes share a machine's GPUs."""
    import os

    if name or not _launched() or not torch.accelerator.is_available():
        return name
    return f"{torch.accelerator.current_accelerator().type}:{os.environ.get('LOCAL_RANK', '0')}"  # type: ignore[union-attr]
