"""The one clock that times are read from."""

from __future__ import annotations

import time
from typing import Any

import torch

__all__ = ["Stopwatch", "device_time"]


def device_time(device: torch.device) -> float:
    """Seconds on a steady clock, after the device has finished all queued operations."""
    if device.type not in ("cpu", "meta"):
        getattr(torch, device.type).synchronize(device)
    return time.perf_counter()


class Stopwatch:
    """Laps on a device that are taken without waiting for it, and read later.

    On an accelerator a lap is an event in its stream, so a lap's time is from when the device had done what was
    asked before it to when it had done what was asked within it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[tuple[str, Any]] = []
        self.lap("")

    def lap(self, name: str) -> None:
        """Ends a lap; laps of one name add up."""
        if self._device.type in ("cpu", "meta"):
            self._marks.append((name, time.perf_counter()))
            return
        # Reading the host's clock here would time how fast kernels are queued, not how long they run.
        event = torch.Event(device=self._device, enable_timing=True)
        event.record()
        self._marks.append((name, event))

    def seconds(self) -> dict[str, float]:
        """Name -> seconds; waits for the last lap to end."""
        found: dict[str, float] = {}
        for (_, before), (name, after) in zip(self._marks, self._marks[1:], strict=False):
            found[name] = found.get(name, 0.0) + _between(before, after)
        return found


def _between(before: Any, after: Any) -> float:
    if isinstance(before, float):
        return float(after - before)
    after.synchronize()
    return float(before.elapsed_time(after)) / 1000
