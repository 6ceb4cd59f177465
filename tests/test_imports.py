"""The rooms of the package: imports point left only, and importing does nothing."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import gripvlm
from gripvlm.pruners.registry import _BUILT_IN

PACKAGE = Path(gripvlm.__file__).parent
ROOMS = (
    *("errors", "utils", "budget", "types", "pruners", "grip", "lab", "models", "engine", "api", "tasks", "eval"),
    *("bench", "grip.train", "report", "serve", "demo", "integrations", "cli", "__main__"),
)
"""From left to right: a room may import what stands to its left, and itself."""
MAY_BE_HEAVY = (
    "torch",
    "transformers",
    "numpy",
    "PIL",
    "matplotlib",
    "datasets",
    "accelerate",
    "fastapi",
    "uvicorn",
    "gradio",
)
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def room_of(parts: tuple[str, ...]) -> str:
    """The room of a module by the parts of its name inside the package; grip/train is one of its own."""
    return "grip.train" if parts[:2] == ("grip", "train") else parts[0]


def imports(path: Path) -> set[str]:
    """Full names of all modules and names that a file imports, at its top or inside its functions."""
    names = set()
    package = ("gripvlm", *path.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *filter(None, [node.module])])
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def imported_rooms(path: Path) -> set[str]:
    rooms = set()
    for name in imports(path):
        package, *parts = name.split(".")
        if package != "gripvlm" or not parts or parts == ["__version__"]:
            continue
        if parts[0] not in ROOMS:  # a public name, taken from the front door
            parts = getattr(gripvlm, parts[0]).__module__.split(".")[1:]
        rooms.add(room_of(tuple(parts)))
    return rooms


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_file_has_a_room_and_imports_from_its_left(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    assert room_of(parts) in ROOMS, "add the new room to ROOMS, in its place"
    allowed = ROOMS[: ROOMS.index(room_of(parts)) + 1]
    assert imported_rooms(path) <= set(allowed)


def files_of(room: str) -> list[Path]:
    return [path for path in FILES if path.is_relative_to(PACKAGE / room)]


@pytest.mark.parametrize("path", files_of("pruners"), ids=lambda path: path.stem)
def test_pruners_know_tensors_only(path):
    libraries = {name.split(".")[0] for name in imports(path)} - set(sys.stdlib_module_names)
    assert libraries <= {"gripvlm", "torch", "numpy"}


def test_models_know_no_method():
    # Words of their own, too.
    plain = {"grid", "random", "given", "pool", "norm", "full", "split", "spread", "repeats", "tower"}
    methods = re.compile(rf"\b({'|'.join(_BUILT_IN.keys() - plain)})\b")
    for path in files_of("models"):
        assert "pruners" not in imported_rooms(path), path.name
        assert not methods.findall(path.read_text(encoding="utf-8")), path.name


def test_only_two_files_call_private_helpers_of_transformers():
    for path in FILES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        helpers = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr.startswith("_prepare_")}
        assert not helpers or path.name in ("adapter.py", "positions.py"), f"{path.name} calls {helpers}"


def printed(code: str) -> str:
    """What a fresh Python prints."""
    code = f"import sys; sys.path.insert(0, {str(PACKAGE.parent)!r})\n{code}"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize("module", ["gripvlm", "gripvlm.cli"])
def test_importing_loads_nothing_heavy(module):
    assert printed(f"import {module}; print(*[m for m in {MAY_BE_HEAVY} if m in sys.modules])") == ""


@pytest.mark.parametrize("first", ["gripvlm.api", "gripvlm.engine.request"])
def test_prune_is_the_function_whatever_is_imported_first(first):
    code = f"import gripvlm, {first}; print(gripvlm.prune.__name__, 'transformers' in sys.modules)"
    assert printed(code) == "prune False"


def test_every_public_name_is_there_and_documented():
    for name in gripvlm.__all__:
        assert name in dir(gripvlm)
        assert name == "__version__" or getattr(gripvlm, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'prun'"):
        gripvlm.prun  # noqa: B018
