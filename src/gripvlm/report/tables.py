"""Rows of results, grouped and averaged, and as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from rich import box
from rich.console import Group
from rich.table import Table

from gripvlm.budget import Budget
from gripvlm.errors import GripError
from gripvlm.utils.terminal import fitted

Row = Mapping[str, Any]
TIMES = ("vision", "pruner", "overhead", "prefill", "decode", "total")
MEAN = "mean"
REFERENCES = {"blind": "no image", "majority": "majority"}
"""Columns of the rows that hold for every pruner, and what the tables call them."""
NUMBERS = ("score", "tokens", "keep_fraction", *REFERENCES, *(f"seconds_{name}" for name in TIMES))


def tables(rows: Sequence[Row]) -> Group:
    """Two tables to print: scores in percent (task x pruner x keep, interval below), and milliseconds a sample.

    Args:
        rows: `result["rows"] + result["means"]` of an evaluation.
    """
    if not rows:
        raise GripError("no rows: pass result['rows'] + result['means'] of an evaluation that has finished")
    # tasks as they come, the mean last
    tasks = sorted(dict.fromkeys(row["task"] for row in rows), key=lambda name: name == MEAN)
    scores = _sheet("Score, % right (below: 95 % interval)")
    times = _sheet("Milliseconds a question")
    for task in tasks:
        scores.add_column(short(task), justify="right", style="bold" if task == MEAN else "")
    for name in TIMES:
        times.add_column(name, justify="right")
    for pruner, keep, tokens, by_task, milliseconds in _settings(rows):
        head = [pruner, f"{tokens} ({keep})"]
        scores.add_row(*head, *(_score(by_task.get(task)) for task in tasks), end_section=pruner == "full")
        times.add_row(*head, *milliseconds, end_section=pruner == "full")
    scores.add_section()
    for name, values in _references(rows, tasks).items():
        scores.add_row(REFERENCES[name], "0" if name == "blind" else "", *values, style="dim")
    return Group(fitted(scores, 2), fitted(times, 2))


def averaged(rows: Sequence[Row]) -> dict[str, Any]:
    """The first row with the mean of every number (None where a row lacks it), without an interval."""
    mean = {**rows[0], "ci_low": None, "ci_high": None}
    for name in NUMBERS:
        values = [row[name] for row in rows if row.get(name) is not None]
        mean[name] = float(np.mean(values)) if len(values) == len(rows) else None
    return mean


def by_setting(rows: Iterable[Row]) -> dict[tuple[str, str], dict[str, Row]]:
    """(pruner, keep) -> task -> row, in the order in which they come."""
    settings: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        settings.setdefault((row["pruner"], str(row["keep"])), {})[row["task"]] = row
    return settings


def unreached(result: Mapping[str, Any]) -> list[str]:
    """`fastv at 5%: why`, for each pruner and budget that has no row, since it cannot be reached."""
    entries = result.get("unreached", ())
    return [f"{entry['pruner']} at {Budget.of(entry['keep']).short}: {entry['why']}" for entry in entries]


def short(task: str) -> str:
    """`lab/reading` -> `reading`; a file's task -> its name."""
    return task.rpartition("/")[2].removesuffix(".jsonl")


def _settings(rows: Sequence[Row]) -> Iterable[tuple[str, str, str, dict[str, Row], list[str]]]:
    """Pruner, keep and tokens as text, task -> row, and milliseconds: of the mean, or of a single task its own."""
    for (pruner, _), by_task in by_setting(rows).items():
        row = by_task.get(MEAN, next(iter(by_task.values())))
        tokens = f"{row['tokens']:.{0 if float(row['tokens']).is_integer() else 1}f}"
        seconds = [row.get(f"seconds_{name}") for name in TIMES]
        # three digits are enough: from 99.5 ms on there is no decimal
        times = ["" if s is None else f"{1000 * s:.{1 if s < 0.0995 else 0}f}" for s in seconds]
        yield pruner, Budget.of(row["keep"]).short, tokens, by_task, times


def _references(rows: Sequence[Row], tasks: Sequence[str]) -> dict[str, list[str]]:
    """The scores without the image, and of the commonest answer, by task; only those that were measured."""
    first = next(iter(by_setting(rows).values()))
    columns = {name: [first.get(task, {}).get(name) for task in tasks] for name in REFERENCES}
    return {
        name: ["" if value is None else f"{100 * value:.1f}" for value in values]
        for name, values in columns.items()
        if any(value is not None for value in values)
    }


def _score(row: Row | None) -> str:
    """Score in percent, and its interval on a line below."""
    if row is None:
        return ""
    score = f"{100 * row['score']:.1f}"
    if row.get("ci_low") is None:
        return score
    return f"{score}\n[dim not bold]{100 * row['ci_low']:.0f}-{100 * row['ci_high']:.0f}[/]"


def _sheet(title: str) -> Table:
    """An empty table that stays narrow: six families and their mean fit into 80 columns."""
    sheet = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", padding=0)
    sheet.add_column("pruner", overflow="fold")
    sheet.add_column("tokens", justify="right", no_wrap=True)
    return sheet
