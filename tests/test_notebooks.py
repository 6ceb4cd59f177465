"""The notebooks of examples/ run, and what they show is what they say; `make notebooks` stores it anew."""

from __future__ import annotations

import copy
import re

import pytest

from places import ROOT
from run_notebooks import NOTEBOOKS, code_cells, read, run, shown

TIME = re.compile(r"[\d.]+ m?s\b")
NUMBER = re.compile(r"\d+(?:\.\d+)?")
SHARE = {"3_train_a_scorer": 0.25}
"""Notebook -> by which share its numbers may differ; else 5 %. A training on another processor ends elsewhere."""


def words_and_numbers(text):
    """A text without its numbers and spaces, and its numbers; times are neither."""
    text = TIME.sub("TIME", text)
    return " ".join(NUMBER.sub("N", text).split()), [float(number) for number in NUMBER.findall(text)]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_shows_what_it_showed(path, monkeypatch):
    """Words exactly; numbers nearly, because scores may move by an answer from processor to processor."""
    monkeypatch.setattr("gripvlm.pruners.registry._registered", {})
    stored = read(path)
    again = copy.deepcopy(stored)
    run(again, path.name)
    for before, after in zip(code_cells(stored), code_cells(again), strict=True):
        assert [output["output_type"] for output in before["outputs"]] == [
            output["output_type"] for output in after["outputs"]
        ]
        words, numbers = words_and_numbers(shown(after))
        near = pytest.approx(numbers, rel=SHARE.get(path.stem, 0.05), abs=2)
        assert words_and_numbers(shown(before)) == (words, near)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_can_be_read(path):
    """Short cells, links that lead somewhere, no path of the machine that ran it; the site and README lead to it."""
    notebook, site = read(path), (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert f"tutorials/{path.stem}.md" in site
    assert f"examples/{path.name}" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        assert len(text.splitlines()) <= 30
        for target in re.findall(r"\]\(([^)\s#]+)", text) if cell["cell_type"] == "markdown" else ():
            assert target.startswith("https://") or (path.parent / target).exists(), target
    for cell in code_cells(notebook):
        assert cell["outputs"] or cell["execution_count"], f"{path.name} was stored before it ran: make notebooks"
        assert not re.search(r"/(home|root|tmp|usr|Users)/", shown(cell))


def test_numbers_are_compared():
    assert words_and_numbers("26 of 256 kept, vision 41 ms") == ("N of N kept, vision TIME", [26, 256])
    assert words_and_numbers("is  there\na cat?") == words_and_numbers("is there a cat?")


def test_there_are_four():
    assert [path.stem for path in NOTEBOOKS] == ["1_prune", "2_write_a_pruner", "3_train_a_scorer", "4_serve"]
