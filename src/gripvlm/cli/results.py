"""`gripvlm report | compare | merge`: what is done with results files."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from gripvlm.errors import GripError

__all__ = ["compare_command", "merge_command", "report_command"]


def report_command(
    results: Annotated[list[Path], typer.Argument(help="Files that `gripvlm eval --out` wrote.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for index.html, report.md and their figures.")],
    baseline: Annotated[str, typer.Option(help="The method that differences are taken from.")] = "random",
    title: Annotated[str, typer.Option(help="The page's heading.")] = "Visual-token pruning: results",
    pictures: Annotated[bool, typer.Option(help="Draw what was kept for some questions.")] = True,
) -> None:
    """Write results as an HTML page and as Markdown: plots, tables, pictures, commands."""
    from gripvlm.cli.commands import console
    from gripvlm.cli.outputs import checked_folder
    from gripvlm.eval.results import evaluation_files

    checked_folder(out, "--out")
    mine, others = evaluation_files(results)
    for path in others:
        print(f"{path} is no result of `gripvlm eval`: left out.", file=sys.stderr)
    if not mine:
        raise GripError("none of these files is a result of `gripvlm eval --out`: type one or more that are")

    from gripvlm.models.loading import quiet
    from gripvlm.report import report

    quiet()
    page = report(mine, out, title=title, baseline=baseline, pictures=pictures)
    console().print(f"page: {escape(str(page))}, Markdown: {escape(str(page.with_name('report.md')))}", soft_wrap=True)


def compare_command(
    old: Annotated[Path, typer.Argument(help="The results that are right.")],
    new: Annotated[Path, typer.Argument(help="The results of the same questions now.")],
    tolerance: Annotated[
        float, typer.Option(min=0, help="Points that a setting's mean score may lose before it is a regression.")
    ] = 0.0,
    slower: Annotated[
        float,
        typer.Option(min=1, help="How many times a setting's time, relative to the full model's, may grow."),
    ] = 1.5,
) -> None:
    """Check that nothing got less accurate or slower: exit code 0, or 1 for a regression."""
    from gripvlm.cli.commands import console
    from gripvlm.eval.regression import compare
    from gripvlm.eval.results import read_results

    verdict = compare(read_results(old), read_results(new), tolerance / 100, slower)
    screen = console()
    for line in verdict.lines:
        screen.print(line, markup=False, soft_wrap=True)
    if verdict.regressions:
        raise typer.Exit(1)


def merge_command(
    shards: Annotated[list[Path], typer.Argument(help="What each `gripvlm eval --shard i/n --out` wrote.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="JSON file for the whole.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace it where it exists.")] = False,
) -> None:
    """Put the shards of one grid together, as if one machine had run it."""
    from gripvlm.cli.commands import console, show_scores
    from gripvlm.cli.outputs import checked_json

    if len(shards) < 2:
        raise GripError(f"got {len(shards)} file: type two or more shards of one run")
    checked_json(out)

    from gripvlm.eval import merge

    result = merge(shards, out, overwrite=overwrite)
    screen = console()
    show_scores(screen, result)
    screen.print(f"results: {escape(str(out))}, every answer: {escape(result['samples'])} beside it", soft_wrap=True)
