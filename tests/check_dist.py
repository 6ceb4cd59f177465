"""Checks what a release consists of: `make dist` calls it on the folder with the source archive and the wheel.

Each has valid metadata, the licence, the lab's data and `py.typed`, nothing that belongs to the checkout alone, and
less than 25 MB. The wheel's code is unpacked and imported, to see that it needs nothing beside itself.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from packaging.metadata import Metadata

LARGEST = 25_000_000  # bytes
DATA = ("lab/data/model/model.safetensors", "lab/data/sample/questions.jsonl", "lab/data/LICENSES.md")
NEEDED = ("py.typed", "__init__.pyi", "cli/measured.json", "eval/results.schema.json", *DATA)
ONLY_HERE = ("lab/data/dense/", "experiments/", "docs/", "tests/", "build/", ".venv/", "__pycache__", ".samples.jsonl")


def check(file: Path, names: list[str], metadata: bytes, root: str) -> None:
    """Raises SystemExit with what is wrong. `root`: the folder of the package in the archive."""
    Metadata.from_email(metadata, validate=True)
    faults = [f"{name} is missing" for name in NEEDED if f"{root}gripvlm/{name}" not in names]
    if not any(name.endswith("LICENSE") for name in names):
        faults.append("LICENSE is missing")
    faults += [f"{name} does not belong in it" for name in names if any(part in name for part in ONLY_HERE)]
    if file.stat().st_size > LARGEST:
        faults.append(f"it has {file.stat().st_size} bytes, allowed are {LARGEST}")
    if faults:
        sys.exit(f"{file}: {'; '.join(faults[:10])}")
    print(f"{file.name}: {file.stat().st_size / 1e6:.1f} MB, {len(names)} files")


def main(folder: Path) -> None:
    (wheel,), (source,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as unpacked:
        (about,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        check(wheel, archive.namelist(), archive.read(about), "")
        archive.extractall(unpacked)
        # Not isolated, because the wheel's dependencies are in this environment.
        code = "import gripvlm; from gripvlm.cli import main; print(gripvlm.__file__); raise SystemExit(main(['list']))"
        run = subprocess.run([sys.executable, "-c", code], cwd=unpacked, capture_output=True, text=True)
        if run.returncode or not run.stdout.startswith(str(Path(unpacked).resolve())):
            sys.exit(f"{wheel}: `gripvlm list` from it fails:\n{run.stdout[:500]}{run.stderr}")
    with tarfile.open(source) as archive:
        top = source.name.removesuffix(".tar.gz")
        about = archive.extractfile(f"{top}/PKG-INFO")
        assert about is not None
        check(source, archive.getnames(), about.read(), f"{top}/src/")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
