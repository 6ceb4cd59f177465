"""`gripvlm report`: results files as a page."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from gripvlm.errors import GripError
from gripvlm.utils.terminal import filled

__all__ = ["report_command"]


def report_command(
    results: Annotated[list[Path], typer.Argument(help="Files that `gripvlm eval --out` wrote.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for index.html, report.md and their figures.")],
    baseline: Annotated[str, typer.Option(help="The method that the others are compared with.")] = "random",
    title: Annotated[str, typer.Option(help="The page's heading.")] = "Visual-token pruning: results",
    pictures: Annotated[bool, typer.Option(help="Draw the kept tokens for some questions.")] = True,
) -> None:
    """Write results as an HTML page and as Markdown: plots, tables, pictures, commands."""
    from gripvlm.cli.commands import console
    from gripvlm.cli.outputs import checked_folder
    from gripvlm.eval.results import evaluation_files

    checked_folder(out, "--out")
    evaluations, others = evaluation_files(results)
    for path in others:
        print(filled(f"{path} is not a result of `gripvlm eval`: ignored."), file=sys.stderr)
    if not evaluations:
        raise GripError("none of these files is a result of `gripvlm eval --out`: type one or more that are")

    from gripvlm.models.loading import quiet
    from gripvlm.report import report

    quiet()
    page = report(evaluations, out, title=title, baseline=baseline, pictures=pictures)
    console().print(f"page: {escape(str(page))}, Markdown: {escape(str(page.with_name('report.md')))}", soft_wrap=True)
