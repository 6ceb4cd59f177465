"""Ctrl-C, and SIGTERM as a scheduler sends it: the step in hand is finished first."""

from __future__ import annotations

import signal
import sys
from types import FrameType

__all__ = ["Stopping"]


class Stopping:
    """A context in which the first signal only sets `asked`; the second stops at once.

    Outside the main thread, which alone may handle signals, it does nothing.
    """

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> Stopping:
        self._before = {}
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)
        except ValueError:  # not the main thread: signals are its business
            pass
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print("\nStopping after this step; Ctrl-C again stops at once and loses it.", file=sys.stderr, flush=True)
