"""Rows of results as tables: for a terminal (rich) and for a page (Markdown)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from rich import box
from rich.console import Group
from rich.table import Table

from gripvlm.budget import Budget
from gripvlm.errors import GripError

__all__ = ["by_setting", "markdown", "markdown_row", "short", "tables", "task_order", "unreached", "with_means"]

Row = Mapping[str, Any]
TIMES = ("vision", "pruner", "overhead", "prefill", "decode", "total")
MEAN = "mean"
REFERENCES = {"blind": "no image", "majority": "majority"}
"""Columns of the rows that hold for every pruner, and what the tables call them."""


def with_means(rows: Sequence[Row]) -> list[Row]:
    """The rows and, where they have none, one `mean` row for each pruner and keep over several tasks.

    A mean made here has no interval; `evaluate(...)["means"]` has them with one.
    """
    if not rows:
        raise GripError("no rows: pass result['rows'] + result['means'] of an evaluation that has finished")
    tasks = set(task_order(rows))
    if MEAN in tasks or len(tasks) < 2:
        return list(rows)
    names = ["score", "tokens", "keep_fraction", *REFERENCES, *(f"seconds_{name}" for name in TIMES)]
    means = []
    for by_task in by_setting(rows).values():
        if by_task.keys() != tasks:  # a mean over fewer tasks would not compare
            continue
        members = list(by_task.values())
        mean = {**members[0], "task": MEAN, "ci_low": None, "ci_high": None, "n": sum(row["n"] for row in members)}
        for name in names:
            values = [row[name] for row in members if row.get(name) is not None]
            mean[name] = float(np.mean(values)) if len(values) == len(members) else None
        means.append(mean)
    return [*rows, *means]


def task_order(rows: Iterable[Row]) -> list[str]:
    """Tasks as they come, the mean last."""
    return sorted(dict.fromkeys(row["task"] for row in rows), key=lambda name: name == MEAN)


def by_setting(rows: Iterable[Row]) -> dict[tuple[str, str], dict[str, Row]]:
    """(pruner, keep) -> task -> row, in the order in which they come."""
    settings: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        settings.setdefault((row["pruner"], str(row["keep"])), {})[row["task"]] = row
    return settings


def tables(rows: Sequence[Row]) -> Group:
    """Two tables to print: scores in percent (task x pruner x keep, interval below), and milliseconds a sample."""
    rows = with_means(rows)
    tasks = task_order(rows)
    scores = _sheet("Score, % right (below: 95 % interval)")
    times = _sheet("Milliseconds a question")
    for task in tasks:
        scores.add_column(short(task), justify="right", style="bold" if task == MEAN else "")
    for name in TIMES:
        times.add_column(name, justify="right")
    for (pruner, _), by_task in by_setting(rows).items():
        row = _summary(by_task)
        head = [pruner, f"{_count(row['tokens'])} ({Budget.of(row['keep']).short})"]
        scores.add_row(*head, *(_score(by_task.get(task), "\n") for task in tasks), end_section=pruner == "full")
        times.add_row(*head, *_milliseconds(row), end_section=pruner == "full")
    scores.add_section()
    for name, values in _references(rows, tasks).items():
        scores.add_row(REFERENCES[name], "0" if name == "blind" else "", *values, style="dim")
    return Group(scores, times)


def _sheet(title: str) -> Table:
    """An empty table that stays narrow: six families and their mean fit into 80 columns."""
    sheet = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", padding=0)
    sheet.add_column("pruner")
    sheet.add_column("tokens", justify="right", no_wrap=True)
    return sheet


def markdown(rows: Sequence[Row]) -> str:
    """The same two tables in Markdown, with intervals in brackets and the number of questions."""
    rows = with_means(rows)
    tasks = task_order(rows)
    settings = by_setting(rows)
    first = next(iter(settings.values()))
    titles = [f"{short(task)} (n={first[task]['n']})" if task in first else short(task) for task in tasks]
    scores = [markdown_row(["pruner", "keep", "tokens", *titles]), markdown_row(["---", *["---:"] * (2 + len(tasks))])]
    times = [markdown_row(["pruner", "keep", *(f"{name} ms" for name in TIMES)]), markdown_row(["---", *["---:"] * 7])]
    for (pruner, _), by_task in settings.items():
        row = _summary(by_task)
        head = [f"`{pruner}`", Budget.of(row["keep"]).short]
        scores.append(markdown_row([*head, _count(row["tokens"]), *(_score(by_task.get(task)) for task in tasks)]))
        times.append(markdown_row([*head, *_milliseconds(row)]))
    for name, values in _references(rows, tasks).items():
        scores.append(markdown_row([f"*{REFERENCES[name]}*", "", "", *values]))
    return "\n".join([*scores, "", *times]) + "\n"


def markdown_row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def unreached(result: Mapping[str, Any]) -> list[str]:
    """`fastv at 5%: why`, for each pruner and budget that has no row, since it cannot be reached."""
    entries = result.get("unreached", ())
    return [f"{entry['pruner']} at {Budget.of(entry['keep']).short}: {entry['why']}" for entry in entries]


def short(task: str) -> str:
    """`lab/reading` -> `reading`; a file's task -> its name."""
    return task.rpartition("/")[2].removesuffix(".jsonl")


def _summary(by_task: Mapping[str, Row]) -> Row:
    """The row that speaks for all tasks: the mean, or of a single task its own."""
    return by_task.get(MEAN, next(iter(by_task.values())))


def _references(rows: Sequence[Row], tasks: Sequence[str]) -> dict[str, list[str]]:
    """What the model scores without the image, and the commonest answer, by task; only what was measured."""
    first = next(iter(by_setting(rows).values()))
    columns = {name: [first.get(task, {}).get(name) for task in tasks] for name in REFERENCES}
    return {
        name: ["" if value is None else f"{100 * value:.1f}" for value in values]
        for name, values in columns.items()
        if any(value is not None for value in values)
    }


def _count(value: float) -> str:
    return f"{value:.0f}" if float(value).is_integer() else f"{value:.1f}"


def _score(row: Row | None, between: str = "") -> str:
    """Score in percent and its interval: in brackets, or on a line of its own."""
    if row is None:
        return ""
    score = f"{100 * row['score']:.1f}"
    if row.get("ci_low") is None:
        return score
    ends = f"{100 * row['ci_low']:.0f}-{100 * row['ci_high']:.0f}"
    return f"{score}{between}[dim not bold]{ends}[/]" if between else f"{score} [{ends}]"


def _milliseconds(row: Row) -> list[str]:
    seconds = [row.get(f"seconds_{name}") for name in TIMES]
    return ["" if s is None else f"{1000 * s:.1f}" if s < 0.0995 else f"{1000 * s:.0f}" for s in seconds]
