"""How far long work is: a bar on a terminal, elsewhere a plain line now and then, so that a log shows life."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from typing import Any, TextIO

__all__ = ["EVERY", "Progress", "duration"]

EVERY = 30.0
"""Seconds between two plain lines."""


class Progress:
    """Context manager that reports progress.

    On a terminal a bar is drawn and removed at the end. Elsewhere `line()` is printed every `every` seconds, by a
    thread of its own, so that it comes even while one long step runs, and flushed. Both go to standard error.

    Args:
        unit: of what is counted, such as "answers".
        total: how many there are to be.
        done: how many are done already; they do not count as work of this run.
        show: False prints nothing at all.
        every: seconds between two lines; by default `EVERY`.
        stream: by default standard error.
        clock: seconds that only grow.
    """

    def __init__(
        self,
        unit: str,
        total: int,
        done: int = 0,
        *,
        show: bool = True,
        every: float | None = None,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.unit, self.total, self.done = unit, total, done
        self.what = ""
        self._before, self._show, self._every, self._clock = done, show, EVERY if every is None else every, clock
        self._stream = sys.stderr if stream is None else stream
        self._began = clock()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        self._began = self._clock()
        if self._show and self._stream.isatty():
            self._draw()
        elif self._show:
            self._thread = threading.Thread(target=self._print_now_and_then, name="gripvlm progress", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        if self._bar is not None:
            self._bar.stop()

    def about(self, what: str) -> None:
        """What is being worked on."""
        self.what = what
        if self._bar is not None:
            self._bar.update(self._task, description=what)

    def advance(self, count: int = 1, reused: bool = False) -> None:
        """So many more are done; `reused` ones were done before and are no work of this run."""
        self.done += count
        self._before += count if reused else 0
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done)

    def line(self) -> str:
        """`120 of 480 answers (25 %), 3.4 a second, 1 min 46 s left: lab/science`."""
        share = f" ({100 * self.done / self.total:.0f} %)" if self.total else ""
        new, spent = self.done - self._before, self._clock() - self._began
        text = f"{self.done} of {self.total} {self.unit}{share}, "
        if new > 0 and spent > 0:
            text += f"{_rate(new / spent)}, {duration((self.total - self.done) * spent / new)} left"
        else:
            text += f"none yet in {duration(spent)}"
        return f"{text}: {self.what}" if self.what else text

    def _print_now_and_then(self) -> None:
        while not self._ended.wait(self._every):
            print(self.line(), file=self._stream, flush=True)

    def _draw(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = (TextColumn("{task.description:<16}", markup=False), BarColumn(), MofNCompleteColumn())
        left = (TextColumn(f"{self.unit}, time left"), TimeRemainingColumn())
        self._bar = Bar(*columns, *left, console=Console(file=self._stream), transient=True)
        self._task = self._bar.add_task(self.what, total=self.total, completed=self.done)
        self._bar.start()


def _rate(value: float) -> str:
    """`3.4 a second`, `12 a minute`, `5.0 an hour`: whichever says more than one, if any does."""
    units = (("a second", 1), ("a minute", 60), ("an hour", 3600))
    name, seconds = next((unit for unit in units if value * unit[1] >= 1), units[-1])
    return f"{value * seconds:.{0 if value * seconds >= 10 else 1}f} {name}"


def duration(seconds: float) -> str:
    """`42 s`, `3 min 5 s`, `2 h 10 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
