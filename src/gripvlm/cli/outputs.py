"""Whether what a command is to write can be written, said before any work is done."""

from __future__ import annotations

import os
from pathlib import Path

from gripvlm.errors import GripError

__all__ = ["checked_folder", "checked_json", "checked_picture"]

PICTURES = (".png", ".jpg", ".jpeg", ".webp")


def checked_picture(path: Path, source: Path) -> None:
    """`--overlay`: a picture's name, in a folder that exists, and not the picture that is asked about."""
    if path.suffix.lower() not in PICTURES:
        raise GripError(f"--overlay {path}: type a name that ends in .png, .jpg or .webp")
    if path.is_dir():
        raise GripError(f"--overlay {path} is a folder: type a file in it, such as {path / 'kept.png'}")
    folder = path.parent
    if not folder.is_dir():
        raise GripError(
            f"--overlay {path}: there is no folder {folder}: make it first (mkdir -p {folder}), or type a name in one "
            "that exists"
        )
    if path.exists() and path.samefile(source):
        raise GripError(f"--overlay {path} is the picture itself, which would be lost: type another name")
    _writable(path if path.exists() else folder, f"--overlay {path}")


def checked_json(path: Path) -> None:
    """`eval --out`: a .json name where a file can be written; missing folders will be made."""
    if path.is_dir():
        raise GripError(f"--out {path} is a folder: type a file in it, such as {path / 'results.json'}")
    if path.suffix.lower() != ".json":
        raise GripError(f"--out {path}: type a name that ends in .json, such as {path.with_suffix('.json')}")
    checked_folder(path.parent, f"--out {path}")
    if path.exists():
        _writable(path, f"--out {path}")


def checked_folder(folder: Path, option: str) -> None:
    """A folder that exists or can be made."""
    there = next(one for one in (folder, *folder.absolute().parents) if one.exists())
    if not there.is_dir():
        raise GripError(f"{option}: {there} is a file, so nothing can be put in it: type a folder")
    _writable(there, option)


def _writable(path: Path, option: str) -> None:
    if not os.access(path, os.W_OK):
        raise GripError(f"{option}: you may not write to {path}: type another place")
