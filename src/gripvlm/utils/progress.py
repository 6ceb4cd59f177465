"""Progress of long runs: a bar on a terminal, elsewhere a plain line now and then, so that a log shows life."""

from __future__ import annotations

import sys
import threading
import time
from typing import Any

__all__ = ["EVERY", "Progress", "duration"]

EVERY = 30.0
"""Seconds between two plain lines."""


class Progress:
    """Context manager that reports progress on standard error.

    On a terminal a bar is drawn and removed at the end. Elsewhere `line()` is printed every `EVERY` seconds.

    Args:
        unit: the things that are counted, such as "answers".
        total: how many there will be.
        done: how many are done already; they do not count as work of this run.
        show: False prints nothing at all.
    """

    def __init__(self, unit: str, total: int, done: int = 0, *, show: bool = True) -> None:
        self.unit, self.total, self.done, self.description = unit, total, done, ""
        self._reused, self._show, self._start = done, show, time.monotonic()
        self._end = threading.Event()
        self._thread: threading.Thread | None = None
        self._bar: Any = None

    def __enter__(self) -> Progress:
        self._start = time.monotonic()
        if self._show and sys.stderr.isatty():
            self._bar = self._new_bar()
            self._bar.start()
        elif self._show:
            # A thread of its own, so that a line comes even while one step takes long.
            self._thread = threading.Thread(target=self._print_lines, name="gripvlm progress", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._end.set()
        if self._thread is not None:
            self._thread.join()
        if self._bar is not None:
            self._bar.stop()

    def about(self, description: str) -> None:
        """What is being worked on."""
        self.description = description
        self._update()

    def advance(self, count: int = 1, reused: bool = False) -> None:
        """`count` more are done; `reused` ones come from an earlier run and say nothing about this one's speed."""
        self.done += count
        self._reused += count if reused else 0
        self._update()

    def line(self) -> str:
        """`120 of 480 answers (25 %), 3.4 a second, 1 min 46 s left: lab/science`."""
        share = f" ({100 * self.done / self.total:.0f} %)" if self.total else ""
        # Reused work took no time of this run, so neither rate nor remaining time may count it.
        new, seconds = self.done - self._reused, time.monotonic() - self._start
        text = f"{self.done} of {self.total} {self.unit}{share}, "
        if new > 0 and seconds > 0:
            text += f"{_rate(new / seconds)}, {duration((self.total - self.done) * seconds / new)} left"
        else:
            text += f"none yet in {duration(seconds)}"
        return f"{text}: {self.description}" if self.description else text

    def _print_lines(self) -> None:
        while not self._end.wait(EVERY):
            print(self.line(), file=sys.stderr, flush=True)

    def _update(self) -> None:
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], description=self.description, completed=self.done)

    def _new_bar(self) -> Any:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = (TextColumn("{task.description:<16}", markup=False), BarColumn(), MofNCompleteColumn())
        left = (TextColumn(f"{self.unit}, time left"), TimeRemainingColumn())
        bar = Bar(*columns, *left, console=Console(stderr=True), transient=True)
        bar.add_task(self.description, total=self.total, completed=self.done)
        return bar


def _rate(value: float) -> str:
    """`3.4 a second`, `12 a minute`, `5.0 an hour`: the first that is at least one."""
    units = (("a second", 1), ("a minute", 60), ("an hour", 3600))
    name, seconds = next((unit for unit in units if value * unit[1] >= 1), units[-1])
    return f"{value * seconds:.{0 if value * seconds >= 10 else 1}f} {name}"


def duration(seconds: float) -> str:
    """`42 s`, `3 min 5 s`, `2 h 10 min`."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
