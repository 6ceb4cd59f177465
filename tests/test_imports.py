"""The rooms of the package: imports point left only, and importing does nothing."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import gripvlm

PACKAGE = Path(gripvlm.__file__).parent
LAYERS = [
    {"errors", "utils"},
    {"budget", "types"},
    {"pruners"},
    {"grip"},
    {"models"},
    {"engine"},
    {"api"},
    {"tasks"},
    {"eval"},
    {"bench"},
    {"grip.train"},
    {"report"},
    {"integrations"},
    {"cli", "__main__"},
]
RANK = {room: rank for rank, rooms in enumerate(LAYERS) for room in rooms}
LAB_READERS = {room for room, rank in RANK.items() if rank >= RANK["tasks"]} | {"lab"}


def room_of(path: Path) -> str:
    """The first folder or file name inside the package; "" for gripvlm/__init__.py."""
    return room_named([part.removesuffix(".py") for part in path.relative_to(PACKAGE).parts])


def room_named(parts: list[str]) -> str:
    """The room of a module by the parts of its name inside the package: grip/train is one of its own."""
    if parts[:2] == ["grip", "train"]:
        return "grip.train"
    return "" if parts[0] == "__init__" else parts[0]


def imported(path: Path) -> set[str]:
    """Full names of all modules that a file imports, at any depth of its syntax tree."""
    names = set()
    package = ("gripvlm", *path.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *filter(None, [node.module])])
            names.update(f"{module}.{alias.name}" for alias in node.names)
    return names


FILES = sorted(path for path in PACKAGE.rglob("*.py") if room_of(path))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_left(path):
    mine = room_of(path)
    for name in sorted(imported(path)):
        parts = name.split(".")
        if parts[0] != "gripvlm" or len(parts) == 1:
            continue
        theirs = room_named(parts[1:])
        if theirs in gripvlm._HOME and theirs not in RANK:
            theirs = room_named(gripvlm._HOME[theirs].split(".")[1:])  # a public name, taken from the front door
        if theirs == mine or theirs not in {*RANK, "lab"}:
            continue
        if theirs == "lab":
            # `load_model` knows the lab by its name, as it knows folders and hub ids.
            by_name = path == PACKAGE / "models" / "loading.py"
            assert mine in LAB_READERS or by_name, f"{path.name} imports the lab"
        elif mine != "lab":
            assert RANK[theirs] <= RANK[mine], f"{path.name} imports {name}, which is to its right"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_file_has_a_room(path):
    assert room_of(path) in {*RANK, "lab"}, "add the new room to LAYERS, in its place"


@pytest.mark.parametrize("path", [p for p in FILES if room_of(p) == "pruners"], ids=lambda path: path.name)
def test_pruners_know_tensors_only(path):
    outside = {name.split(".")[0] for name in imported(path)} - set(sys.stdlib_module_names)
    assert outside <= {"gripvlm", "torch", "safetensors", "huggingface_hub", "numpy"}
    assert not any(name.startswith("gripvlm.models") for name in imported(path))


def test_models_know_no_method():
    """models/ may not name a pruner, nor import any."""
    plain = {"grid", "random", "given", "pool", "norm", "full", "split", "spread"}  # also words of their own
    names = set(gripvlm.pruner_names()) - plain
    for path in (p for p in FILES if room_of(p) == "models"):
        assert not any(name.startswith("gripvlm.pruners") for name in imported(path)), path.name
        text = path.read_text(encoding="utf-8")
        assert not {name for name in names if re.search(rf"\b{name}\b", text)}, path.name


def test_only_the_seam_calls_private_helpers_of_transformers():
    for path in FILES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        called = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        helpers = {name for name in called if name.startswith("_prepare_")}
        assert not helpers or path.name == "adapter.py", f"{path.name} calls {helpers}"


def run(code: str) -> str:
    """What a fresh Python prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_importing_the_package_loads_nothing_heavy():
    heavy = run(
        f"import sys; sys.path.insert(0, {str(PACKAGE.parent)!r}); import gripvlm\n"
        "print([m for m in ('torch', 'transformers', 'numpy', 'PIL') if m in sys.modules])"
    )
    assert heavy == "[]"


@pytest.mark.parametrize("first", ["gripvlm.api", "gripvlm.engine.request"])
def test_prune_is_the_function_whatever_is_imported_first(first):
    printed = run(
        f"import sys; sys.path.insert(0, {str(PACKAGE.parent)!r}); import gripvlm, {first}\n"
        "from gripvlm.engine.block import prune\n"
        "print(gripvlm.prune is prune, callable(gripvlm.prune), 'transformers' in sys.modules)"
    )
    assert printed == "True True False"


def test_every_public_name_is_there_and_documented():
    for name in gripvlm.__all__:
        assert getattr(gripvlm, name) is not None
        assert name in dir(gripvlm)
        assert name == "__version__" or getattr(gripvlm, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'prun'"):
        gripvlm.prun  # noqa: B018
