"""A disk on which a process dies, or that is full, at a chosen one of the operations of `gripvlm.utils.disk`."""

from __future__ import annotations

import errno
import os
from typing import Any

COUNTED = ("open", "write", "fsync", "replace", "unlink", "truncate", "ftruncate", "makedirs", "rmdir", "chmod")


class Died(BaseException):
    """As a kill: nothing catches it, and nothing is written after it."""


class FaultyDisk:
    """Stands for `os` in `gripvlm.utils.disk`.

    Args:
        at: the operation, counted from 0, before which (of a write, in the middle of which) it happens; None for none.
        full: the disk is full from then on; else the process dies.

    Attributes:
        done: the operations so far, (name, the file's name).
    """

    def __init__(self, at: int | None = None, full: bool = False) -> None:
        self.at, self.full, self.done = at, full, list[tuple[str, str]]()
        self.path = os.path
        self.opened: dict[int, str] = {}

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        return real if name not in COUNTED else lambda *args, **options: self._operation(name, real, args, options)

    def _operation(self, name: str, real: Any, args: tuple, options: dict) -> Any:
        number = len(self.done)
        file = self.opened.get(args[0], "") if isinstance(args[0], int) else os.path.basename(args[0])
        self.done.append((name, file))
        hit = self.at is not None and number >= self.at
        if not hit or (self.full and name not in ("write", "makedirs", "fsync")):
            result = real(*args, **options)
            if name == "open":
                self.opened[result] = file
            return result
        if name == "write" and number == self.at:
            real(args[0], bytes(args[1])[: len(args[1]) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) if self.full else Died(f"{number}: {name}")


def installed(monkeypatch: Any, at: int | None = None, full: bool = False) -> FaultyDisk:
    """A faulty disk under `gripvlm.utils.disk` for as long as the patch lasts."""
    disk = FaultyDisk(at, full)
    monkeypatch.setattr("gripvlm.utils.disk.os", disk)
    return disk
