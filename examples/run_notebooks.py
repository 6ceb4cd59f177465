"""Runs the notebooks of this folder and stores what they show: `make notebooks`.

Cells run as in Jupyter (one namespace; the value of a cell's last line is shown), but in one process and without
Jupyter's packages, so that the tests can afford it: tests/test_notebooks.py runs them again and compares.
"""

from __future__ import annotations

import ast
import base64
import io
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from PIL import Image

HERE = Path(__file__).resolve().parent
NOTEBOOKS = sorted(HERE.glob("*.ipynb"))


def read(path: Path) -> dict[str, Any]:
    """A notebook: JSON in the format nbformat 4."""
    notebook: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return notebook


def code_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def shown(cell: dict[str, Any]) -> str:
    """The text of a cell's outputs."""
    texts = (output.get("text") or output["data"].get("text/plain", "") for output in cell["outputs"])
    return "".join("".join(text) for text in texts)


def run(notebook: dict[str, Any], name: str) -> None:
    """Runs the code cells in a folder of their own and replaces their outputs."""
    names: dict[str, Any] = {"__name__": "__main__"}
    with _empty_folder() as folder:
        for number, cell in enumerate(code_cells(notebook), start=1):
            cell["execution_count"], cell["outputs"] = number, _run_cell(cell, names, f"{name}, cell {number}", number)
            for path in (folder, str(HERE.parent), sys.prefix):
                assert path not in shown(cell), f"{name}, cell {number} shows {path}, which other machines do not have"


def _run_cell(cell: dict[str, Any], names: dict[str, Any], where: str, number: int) -> list[dict[str, Any]]:
    tree, printed, value = ast.parse("".join(cell["source"]), where), io.StringIO(), None
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    with redirect_stdout(printed):
        exec(compile(tree, where, "exec"), names)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), where, "eval"), names)
    outputs: list[dict[str, Any]] = []
    if lines := printed.getvalue().splitlines(keepends=True):
        outputs.append({"name": "stdout", "output_type": "stream", "text": lines})
    if value is not None:
        data = {"image/png": _png(value)} if isinstance(value, Image.Image) else {}
        text = "<picture>" if data else repr(value)
        data |= {"text/plain": text.splitlines(keepends=True)}
        outputs.append({"data": data, "execution_count": number, "metadata": {}, "output_type": "execute_result"})
    return outputs


def _png(picture: Image.Image) -> str:
    """In 128 colours, which takes a quarter of the bytes."""
    file = io.BytesIO()
    picture.convert("RGB").quantize(128).save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


@contextmanager
def _empty_folder() -> Iterator[str]:
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            yield folder
        finally:
            os.chdir(before)


if __name__ == "__main__":
    for path in NOTEBOOKS:
        made = read(path)
        run(made, path.name)
        path.write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(path.relative_to(HERE.parent))
