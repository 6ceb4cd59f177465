"""Every file that is written, and every one that is read whole: old or new, never half; one writer; regular files only.

A process may die between any two of these calls (a kill, a full disk, no power): what was there before then stands, or
what was to be written does. Only what `append` adds may end in the middle of a line.
"""

from __future__ import annotations

import errno
import os
import platform
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType

from gripvlm.errors import GripError

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None

__all__ = ["BusyError", "append", "cut", "one_writer", "read_bytes", "read_text", "regular", "write"]

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
_BINARY = getattr(os, "O_BINARY", 0)
_FLAGS = _BINARY | getattr(os, "O_NOFOLLOW", 0)  # a stranger's link in a shared folder leads nowhere
_held: set[int] = set()  # descriptors of this process's locks
_forks = False  # whether forks are watched


class BusyError(GripError):
    """Another process is writing there."""


def write(path: str | Path, content: str | bytes) -> None:
    """The file holds the content when this returns, also after a loss of power; until then it is what it was.

    Folders that are missing are made. A link is followed. What a killed process left half-written beside it goes.

    Raises:
        OSError: with the path and what to do.
        BusyError: somebody is writing this very file.
        GripError: a text that UTF-8 has no form for.
    """
    target, data = Path(os.path.realpath(path)), _encoded(path, content)
    part = target.with_name(f"{target.name}.part")
    with _named(path):
        _make(target.parent)
        file, _ = _taken(part, path)
        try:
            try:
                os.ftruncate(file, 0)
                _all(file, data)
                os.fsync(file)
                if target.exists():
                    os.chmod(part, stat.S_IMODE(target.stat().st_mode))
            finally:
                if fcntl is None:  # such systems move no open file
                    os.close(file)
            os.replace(part, target)
        except BaseException:
            with suppress(OSError):
                os.unlink(part)
            raise
        finally:
            if fcntl is not None:
                os.close(file)
        _keep_names(target.parent)


def append(path: str | Path, text: str, new: bool = False) -> None:
    """Adds whole lines to a file; of the last one a kill or a full disk may leave the beginning only.

    Args:
        new: whether to make the file where it is missing.
    """
    data = _encoded(path, text)
    with _named(path):
        file = os.open(path, os.O_WRONLY | os.O_APPEND | _BINARY | (os.O_CREAT if new else 0), 0o666)
        try:
            _all(file, data)
        finally:
            os.close(file)


def cut(path: str | Path, size: int) -> None:
    """Leaves the first `size` bytes of a file."""
    with _named(path):
        os.truncate(path, size)


def regular(path: str | Path) -> None:
    """Passes for a file that can be read to its end; opening a named pipe would wait for ever.

    Raises:
        OSError: there is none, or it is a folder, a pipe, a socket or a device.
    """
    kind = os.stat(path).st_mode
    if stat.S_ISDIR(kind):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(kind):
        raise OSError(errno.EINVAL, "a pipe, a socket or a device, not a file: save it as a file first", str(path))


def read_bytes(path: str | Path) -> bytes:
    """What a regular file holds.

    Raises:
        OSError: as `regular`, or it may not be read.
    """
    regular(path)
    return Path(path).read_bytes()


def read_text(path: str | Path, encoding: str = "utf-8") -> str:
    """What a regular file holds, as text.

    Raises:
        OSError: as `read_bytes`.
        UnicodeDecodeError: it is no such text.
    """
    return read_bytes(path).decode(encoding)


@contextmanager
def one_writer(path: str | Path, folder: bool = False) -> Iterator[None]:
    """No other process, nor a second block in this one, gets into such a block with the same path.

    The lock is a file beside `path` (inside it, of a `folder`) that the kernel holds for this process: however it
    ends, the next one gets in.

    Raises:
        BusyError: somebody is in.

    Warns:
        Where this system or this disk has no such locks.
    """
    path = Path(path)
    home = path if folder else path.parent
    name = home / ".lock" if folder else path.with_name(f"{path.name}.lock")
    missing = [parent for parent in (home, *home.parents) if not parent.exists()]
    with _named(path):
        _make(home)
        file, unlocked = _taken(name, path)
    if unlocked:
        warnings.warn(f"{path} is not locked ({unlocked}): start no second run that writes there", stacklevel=3)
    _hold(file)
    try:
        with _named(path):
            os.ftruncate(file, 0)
            _all(file, f"process {os.getpid()} on {platform.node()}".encode())
        yield
    finally:
        _held.discard(file)
        if fcntl is None:  # such systems remove no open file
            os.close(file)
        try:
            with suppress(FileNotFoundError):
                os.unlink(name)  # while it is held, so that nobody's new one is removed
        finally:
            if fcntl is not None:
                os.close(file)
        for empty in missing:  # nothing was written: no trace is left
            with suppress(OSError):
                os.rmdir(empty)


def _taken(name: Path, path: str | Path) -> tuple[int, str]:
    """(a descriptor that holds the lock on the file `name`, why there is no lock or "")."""
    while True:
        file = os.open(name, os.O_RDWR | os.O_CREAT | _FLAGS, 0o666)
        unlocked = "" if fcntl is not None else "this system has no locks"
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file), os.stat(name)):  # else its last owner has just moved or removed it
                    return file, unlocked
        except BlockingIOError:
            owner = os.read(file, 100).decode("utf-8", "replace") if name.name.endswith(".lock") else ""
            os.close(file)
            raise BusyError(
                f"{path} is being written by another run{f' ({owner})' if owner else ''}: wait for its end, or type "
                "another --out"
            ) from None
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return file, f"this disk has no locks: {error.strerror}"
            os.close(file)
            raise
        os.close(file)


def _hold(file: int) -> None:
    """A child that this process forks must not hold the lock on after it."""
    global _forks
    if not _forks and hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_let_go)
    _forks = True
    _held.add(file)


def _let_go() -> None:
    for file in _held:
        os.close(file)
    _held.clear()


def _make(folder: Path) -> None:
    if not folder.is_dir():
        os.makedirs(folder, exist_ok=True)


def _all(file: int, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(file, left) :]


def _keep_names(folder: Path) -> None:
    """Flushes the folder so that the rename survives a power loss; not every system allows it."""
    if os.name != "posix":
        return
    file = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(file)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(file)


def _encoded(path: str | Path, content: str | bytes) -> bytes:
    try:
        return content if isinstance(content, bytes) else content.encode("utf-8")
    except UnicodeEncodeError as error:
        raise GripError(
            f"{str(path)!r} cannot hold {error.object[error.start : error.end]!r}, half of a character: mend the name "
            "or the text that it comes from"
        ) from None


@contextmanager
def _named(path: str | Path) -> Iterator[None]:
    """An error of the system says which file it is about, and of a full disk what to do."""
    try:
        yield
    except OSError as error:
        text = error.strerror or str(error)
        if error.errno in _FULL:
            text += " (what was there before stands): make room, and type the same command again"
        raise OSError(error.errno, text, str(path)) from error
