"""Whether a command can write its output, checked before any work is done."""

from __future__ import annotations

import os
from pathlib import Path

from gripvlm.errors import GripError

__all__ = ["checked_folder", "checked_json", "checked_picture"]


def checked_json(path: Path) -> None:
    """`--out` of `eval` and `bench`: a .json file; missing folders will be made."""
    _check_file(path, "--out", (".json",))
    checked_folder(path.parent, f"--out {path}")


def checked_picture(path: Path, source: Path) -> None:
    """`--overlay`: a picture in a folder that exists, and not the picture that the question is about."""
    _check_file(path, "--overlay", (".png", ".jpg", ".jpeg", ".webp"))
    if not path.parent.is_dir():
        make = f"make it first (mkdir -p {path.parent}), or type a name in one that exists"
        raise GripError(f"--overlay {path}: there is no folder {path.parent}: {make}")
    if path.exists() and path.samefile(source):
        raise GripError(f"--overlay {path} is the picture itself, which would be lost: type another name")
    checked_folder(path.parent, f"--overlay {path}")


def checked_folder(folder: Path, option: str) -> None:
    """A folder that exists, or that can be made."""
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not existing.is_dir():
        raise GripError(f"{option}: {existing} is a file, so nothing can be put in it: type a folder")
    _check_writable(existing, option)


def _check_file(path: Path, option: str, suffixes: tuple[str, ...]) -> None:
    if path.is_dir():
        raise GripError(f"{option} {path} is a folder: type a file in it, such as {path / ('results' + suffixes[0])}")
    if path.suffix.lower() not in suffixes:
        example = path.with_suffix(suffixes[0])
        raise GripError(f"{option} {path}: type a name that ends in {' or '.join(suffixes)}, such as {example}")
    if path.exists():
        _check_writable(path, f"{option} {path}")


def _check_writable(path: Path, option: str) -> None:
    if not os.access(path, os.W_OK):
        raise GripError(f"{option}: you may not write to {path}: type another place")
