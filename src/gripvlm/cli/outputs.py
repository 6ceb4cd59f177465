"""Checks that a command can write its output, before any work is done; typer checks the rest from the options."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from gripvlm.errors import GripError


def checked_json(path: Path) -> None:
    """`--out` of `eval` and `bench`: a .json file; missing folders will be made."""
    _check_suffix(path, "--out", (".json",))
    checked_folder(path.parent, f"--out {path}")


def checked_picture(path: Path, sources: Iterable[Path]) -> None:
    """`--overlay`: a picture in a folder that exists, and none of those that the question is about."""
    _check_suffix(path, "--overlay", (".png", ".jpg", ".jpeg", ".webp"))
    if not path.parent.is_dir():
        make = f"make it first (mkdir -p {path.parent}), or type a name in one that exists"
        raise GripError(f"--overlay {path}: there is no folder {path.parent}: {make}")
    if path.exists() and any(path.samefile(source) for source in sources):
        raise GripError(f"--overlay {path} is the picture itself, which would be lost: type another name")
    checked_folder(path.parent, f"--overlay {path}")


def checked_folder(folder: Path, option: str) -> None:
    """A folder that exists, or that can be made."""
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not existing.is_dir():
        raise GripError(f"{option}: {existing} is a file and not a folder: type a folder")
    if not os.access(existing, os.W_OK):
        raise GripError(f"{option}: you may not write to {existing}: type another place")


def _check_suffix(path: Path, option: str, suffixes: tuple[str, ...]) -> None:
    if path.suffix.lower() not in suffixes:
        example = path.with_suffix(suffixes[0]) if path.name else f"results{suffixes[0]}"
        raise GripError(f"{option} {path}: type a name that ends in {' or '.join(suffixes)}, such as {example}")
