"""Which test files touch transformers: those run on its oldest and its newest version too (`make test-transformers`).

A file does if it, or one of the modules of tests/ that it imports, imports transformers or a part of gripvlm that runs
models. So a new file is among them without a list to keep. One that starts its own process marks itself.
"""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

HERE = Path(__file__).parent

RUNS_MODELS = (
    "transformers",
    *(f"gripvlm.{room}" for room in ("models", "api", "engine", "bench", "grip.train", "lab", "serve", "demo")),
)
"""Modules that hand something to transformers or take something from it."""


@cache
def touches(file: Path) -> bool:
    """Whether a file of tests/ touches transformers."""
    return any(
        any(name == one or name.startswith(f"{one}.") for one in RUNS_MODELS)
        or ((helper := helper_of(name)) is not None and helper != file and touches(helper))
        for name in imported(file)
    )


def imported(file: Path) -> set[str]:
    """The modules that a file imports, at its top or inside its functions, and the names it takes from packages."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def helper_of(name: str) -> Path | None:
    """The module or package of tests/ that goes by a name."""
    for path in (HERE / f"{name}.py", HERE / name / "__init__.py"):
        if path.is_file():
            return path
    return None
