"""Ctrl-C, or a scheduler's SIGTERM, that lets the step in hand finish."""

from __future__ import annotations

import logging
import signal
from types import FrameType

__all__ = ["StopSignal"]

logger = logging.getLogger(__name__)


class StopSignal:
    """A context in which the first Ctrl-C, or SIGTERM as a scheduler sends it, only sets `received`.

    The step in hand is finished then; the second signal stops at once. Outside the main thread, which alone may handle
    signals, it does nothing.
    """

    def __init__(self) -> None:
        self.received = False

    def __enter__(self) -> StopSignal:
        self._before = {}
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._receive)
        except ValueError:  # not the main thread: signals are its business
            pass
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            # None stands for a handler that was not set from Python, which cannot be set again.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            raise KeyboardInterrupt
        self.received = True
        logger.warning("Stopping after this step; Ctrl-C again stops at once and loses it.")
