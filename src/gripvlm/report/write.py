"""`gripvlm report`: results files into one HTML page and the same in Markdown."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from gripvlm.errors import GripError
from gripvlm.eval.results import read_results
from gripvlm.report.blocks import Block, Figures, Heading, Pictures, Text
from gripvlm.report.figures import ALWAYS
from gripvlm.report.gallery import gallery
from gripvlm.report.points import Comparison, comparisons
from gripvlm.report.render import to_html, to_markdown
from gripvlm.report.sections import commands, sections
from gripvlm.utils import disk

__all__ = ["report"]

FOLDER = "figures"


def report(
    paths: Sequence[str | Path],
    out: str | Path,
    *,
    title: str = "Visual-token pruning: results",
    baseline: str = "random",
    pictures: bool = True,
) -> Path:
    """Writes `out/index.html` (self-contained), `out/report.md` and its `out/figures/`.

    Files of one model on the same questions are shown together; the others one after another.

    Args:
        paths: results files; where their samples files are missing, what needs every answer is left
            out, and the page says so.
        baseline: the method that differences are taken from.
        pictures: whether to draw what was kept for some questions.

    Returns:
        The HTML page.

    Raises:
        ResultsError: a file that cannot be read or is not what it should be; nothing is written.
        GripError: no file, the full model is not in one of them, or the baseline is in none.
    """
    if not paths:
        raise GripError("no results to report: type one or more files that `gripvlm eval --out` wrote")
    found = comparisons([read_results(path) for path in paths])
    methods = {p.method for one in found for p in one.points}
    if baseline not in methods and baseline not in ALWAYS:
        raise GripError(f"no method {baseline!r} to compare with: type one of {', '.join(sorted(methods))}")
    blocks: list[Block] = [Heading(title, 1), Text(_about(found))]
    for one in found:
        anchor = re.sub(r"[^a-z0-9]+", "-", one.name.lower()).strip("-")
        blocks += sections(one, baseline, anchor)
        blocks += gallery(one, anchor) if pictures else []
        blocks += commands(one)
    page, words = to_html(title, blocks), to_markdown(blocks, FOLDER)
    target = Path(out)
    with disk.one_writer(target, folder=True):
        for block in blocks:
            if isinstance(block, Figures):
                for name, svg in block.drawings:
                    disk.write(target / FOLDER / f"{name}.svg", svg + "\n")
            elif isinstance(block, Pictures):
                for shown in block.pictures:
                    disk.write(target / FOLDER / f"{shown.name}.jpg", shown.content)
        disk.write(target / "report.md", words)
        disk.write(target / "index.html", page)
    return target / "index.html"


def _about(found: Sequence[Comparison]) -> str:
    lab = any(one.results[0].header["model"] == "lab" for one in found)
    note = " The lab's small model gives lab evidence, never a statement about a larger model." if lab else ""
    files = ", ".join(f"`{result.path.name}`" for one in found for result in one.results)
    return f"Written by `gripvlm report` from {files}; no number here was typed by hand.{note}"
