"""Every file that is written, and every file that is read whole: old or new, never half; one writer at a time.

Only regular files are read. A process may die between any two of these calls (a kill, a full disk, no power): then the
old content stands, or the new one. Only what `append` adds may end in the middle of a line.
"""

from __future__ import annotations

import errno
import os
import platform
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
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
_NO_LINKS = getattr(os, "O_NOFOLLOW", 0)  # a stranger's link in a shared folder leads nowhere
_locks: set[int] = set()
"""Descriptors of the locks that this process holds."""


class BusyError(GripError):
    """Another process is writing there."""


def write(path: str | Path, content: str | bytes) -> None:
    """The file holds the content when this returns, also after a loss of power; until then it is unchanged.

    Missing folders are made. A link is followed. What a killed process left half-written beside it is replaced.

    Raises:
        OSError: with the path and what to do.
        BusyError: another process is writing this very file.
        GripError: a text that UTF-8 has no form for.
    """
    target, data = Path(os.path.realpath(path)), _encoded(path, content)
    part = target.with_name(f"{target.name}.part")
    with _named(path):
        _make(target.parent)
        # Its name is fixed, so that the next writer takes over what a killed one left; hence the lock.
        file, _ = _locked(part, path)
        try:
            try:
                os.ftruncate(file, 0)
                _write_all(file, data)
                # Before the rename: else a loss of power may leave the new name with no content.
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
        _sync_folder(target.parent)


def append(path: str | Path, text: str, new: bool = False) -> None:
    """Adds whole lines to a file; a kill or a full disk may leave only the beginning of the last one.

    Args:
        new: whether to make the file where it is missing.
    """
    data = _encoded(path, text)
    with _named(path):
        file = os.open(path, os.O_WRONLY | os.O_APPEND | _BINARY | (os.O_CREAT if new else 0), 0o666)
        try:
            _write_all(file, data)
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
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "a pipe, a socket or a device, not a file: save it as a file first", str(path))


def read_bytes(path: str | Path) -> bytes:
    """The content of a regular file; errors as of `regular`."""
    regular(path)
    return Path(path).read_bytes()


def read_text(path: str | Path, encoding: str = "utf-8") -> str:
    """The same as text; UnicodeDecodeError where it is none."""
    return read_bytes(path).decode(encoding)


@contextmanager
def one_writer(path: str | Path, folder: bool = False) -> Iterator[None]:
    """No other process, nor a second block in this one, enters such a block with the same path.

    The lock is a file beside `path` (inside it, of a `folder`) that the kernel holds for this process: however the
    process ends, the next one can enter. A folder that was made for a run that wrote nothing is removed.

    Raises:
        BusyError: another writer is inside.

    Warns:
        Where this system or this disk has no such locks.
    """
    path = Path(path)
    home = path if folder else path.parent
    name = home / ".lock" if folder else path.with_name(f"{path.name}.lock")
    missing = [parent for parent in (home, *home.parents) if not parent.exists()]
    with _named(path):
        _make(home)
        file, no_lock = _locked(name, path)
    # Some network disks have none; results there are worth more than a refusal.
    if no_lock:
        warnings.warn(f"{path} is not locked ({no_lock}): start no second run that writes there", stacklevel=3)
    _release_in_children()
    _locks.add(file)
    try:
        with _named(path):
            os.ftruncate(file, 0)
            _write_all(file, f"process {os.getpid()} on {platform.node()}".encode())
        yield
    finally:
        _locks.discard(file)
        if fcntl is None:  # such systems remove no open file
            os.close(file)
        try:
            with suppress(FileNotFoundError):
                os.unlink(name)  # while it is held, so that the new lock of another process is not removed
        finally:
            if fcntl is not None:
                os.close(file)
        # Innermost first; one that now holds a file stays.
        for empty in missing:
            with suppress(OSError):
                os.rmdir(empty)


def _locked(name: Path, path: str | Path) -> tuple[int, str]:
    """(a descriptor that holds the lock on the file `name`, why there is no lock or "")."""
    while True:
        file = os.open(name, os.O_RDWR | os.O_CREAT | _BINARY | _NO_LINKS, 0o666)
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Its last owner may have moved or removed the file between opening and locking: then try again.
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file), os.stat(name)):
                    return file, "" if fcntl is not None else "this system has no locks"
        except BlockingIOError:
            owner = os.read(file, 100).decode("utf-8", "replace") if name.name.endswith(".lock") else ""
            os.close(file)
            by = f" ({owner})" if owner else ""
            raise BusyError(
                f"{path} is being written by another run{by}: wait for its end, or type another --out"
            ) from None
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return file, f"this disk has no locks: {error.strerror}"
            os.close(file)
            raise
        os.close(file)


@cache
def _release_in_children() -> None:
    """A child that this process forks must not keep a lock alive after it."""

    def release() -> None:
        for file in _locks:
            os.close(file)
        _locks.clear()

    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=release)


def _make(folder: Path) -> None:
    if not folder.is_dir():
        os.makedirs(folder, exist_ok=True)


def _write_all(file: int, data: bytes) -> None:
    # os.write may take only a part, for example when the disk fills up.
    left = memoryview(data)
    while left:
        left = left[os.write(file, left) :]


def _sync_folder(folder: Path) -> None:
    """Flushes the folder so that a rename survives a loss of power; not every system allows it."""
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
    """An error of the system names the file it is about, and for a full disk what to do."""
    try:
        yield
    except OSError as error:
        text = error.strerror or str(error)
        if error.errno in _FULL:
            text += " (what was there before stands): make room, and type the same command again"
        raise OSError(error.errno, text, str(path)) from error
