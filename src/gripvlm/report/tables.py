"""Rows of results as tables: for a terminal (rich) and for a page (Markdown)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from gripvlm.budget import Budget
from gripvlm.errors import GripError

__all__ = ["by_arm", "markdown", "tables", "task_order", "unreached", "with_means"]

Row = Mapping[str, Any]
TIMES = ("vision", "pruner", "overhead", "prefill", "decode", "total")
MEAN = "mean"


def with_means(rows: Sequence[Row]) -> list[Row]:
    """The rows and, where they have none, one `mean` row for each pruner and keep over several tasks.

    A mean made here has no interval; `evaluate(...)["means"]` has them with one.
    """
    if not rows:
        raise GripError("no rows: pass result['rows'] + result['means'] of an evaluation that has finished")
    if any(row["task"] == MEAN for row in rows) or len({row["task"] for row in rows}) < 2:
        return list(rows)
    tasks = {row["task"] for row in rows}
    means = []
    for members in by_arm(rows).values():
        if members.keys() != tasks:
            continue
        mine = list(members.values())
        numbers = ["score", "tokens", "keep_fraction", "majority", "blind", *(f"seconds_{name}" for name in TIMES)]
        mean: dict[str, Any] = {**mine[0], "task": MEAN, "ci_low": None, "ci_high": None}
        mean["n"] = sum(row["n"] for row in mine)
        for name in numbers:
            values = [row[name] for row in mine if row.get(name) is not None]
            mean[name] = float(np.mean(values)) if len(values) == len(mine) else None
        means.append(mean)
    return [*rows, *means]


def task_order(rows: Iterable[Row]) -> list[str]:
    """Tasks as they come, the mean last."""
    names = list(dict.fromkeys(row["task"] for row in rows))
    return [name for name in names if name != MEAN] + [name for name in names if name == MEAN]


def by_arm(rows: Iterable[Row]) -> dict[tuple[str, str], dict[str, Row]]:
    """(pruner, keep) -> task -> row, in the order in which they come."""
    arms: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        arms.setdefault((row["pruner"], str(row["keep"])), {})[row["task"]] = row
    return arms


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
    for (pruner, _), cells in by_arm(rows).items():
        first = next(iter(cells.values()))
        head = [pruner, f"{_number(cells.get(MEAN, first)['tokens'])} ({_keep(first)})"]
        scores.add_row(*head, *(_cell(cells.get(task)) for task in tasks), end_section=pruner == "full")
        timed = cells.get(MEAN, first)
        times.add_row(*head, *(_ms(timed.get(f"seconds_{name}")) for name in TIMES), end_section=pruner == "full")
    first_rows = next(iter(by_arm(rows).values()))
    scores.add_section()
    for name, text in (("blind", "no image"), ("majority", "majority")):
        values = [first_rows[task].get(name) if task in first_rows else None for task in tasks]
        if any(value is not None for value in values):
            shown = ("" if value is None else f"{100 * value:.1f}" for value in values)
            scores.add_row(text, "0" if name == "blind" else "", *shown, style="dim")
    return Group(scores, times)


def unreached(result: Mapping[str, Any]) -> list[str]:
    """`fastv at 5%: why`, for each pruner and budget that has no row, since it cannot be reached."""
    left = result.get("unreached", ())
    return [f"{one['pruner']} at {Budget.of(one['keep']).short}: {one['why']}" for one in left]


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
    arms = by_arm(rows)
    first_rows = next(iter(arms.values()))
    counts = (f"{short(task)} (n={first_rows[task]['n']})" if task in first_rows else short(task) for task in tasks)
    lines = [_line(["pruner", "keep", "tokens", *counts]), _line(["---", *["---:"] * (2 + len(tasks))])]
    for (pruner, _), cells in arms.items():
        first = next(iter(cells.values()))
        shown = (_cell(cells.get(task)).plain.replace("\n", " [") for task in tasks)
        closed = (f"{text}]" if "[" in text else text for text in shown)
        lines.append(_line([f"`{pruner}`", _keep(first), _number(cells.get(MEAN, first)["tokens"]), *closed]))
    for name, text in (("blind", "no image"), ("majority", "majority")):
        values = [first_rows[task].get(name) if task in first_rows else None for task in tasks]
        if any(value is not None for value in values):
            shown = ("" if value is None else f"{100 * value:.1f}" for value in values)
            lines.append(_line([f"*{text}*", "", "", *shown]))
    lines += ["", _line(["pruner", "keep", *(f"{name} ms" for name in TIMES)]), _line(["---", *["---:"] * 7])]
    for (pruner, _), cells in arms.items():
        timed = cells.get(MEAN, next(iter(cells.values())))
        lines.append(_line([f"`{pruner}`", _keep(timed), *(_ms(timed.get(f"seconds_{name}")) for name in TIMES)]))
    return "\n".join(lines) + "\n"


def short(task: str) -> str:
    """`lab/reading` -> `reading`; a file's task -> its name."""
    return task.rpartition("/")[2].removesuffix(".jsonl")


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _keep(row: Row) -> str:
    return Budget.of(row["keep"]).short


def _number(value: float) -> str:
    return f"{value:.0f}" if float(value).is_integer() else f"{value:.1f}"


def _cell(row: Row | None) -> Text:
    """Score in percent, and below it the interval."""
    if row is None:
        return Text("")
    text = Text(f"{100 * row['score']:.1f}")
    if row.get("ci_low") is not None:
        text.append(f"\n{100 * row['ci_low']:.0f}-{100 * row['ci_high']:.0f}", style="dim not bold")
    return text


def _ms(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{1000 * seconds:.1f}" if seconds < 0.0995 else f"{1000 * seconds:.0f}"
