"""Text for a terminal."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap

from rich.cells import cell_len
from rich.console import Group
from rich.table import Column, Table
from rich.text import Text


def columns() -> int:
    """Columns of a line that is printed: COLUMNS, else the terminal's, and 80 where output is piped."""
    # not shutil alone, which looks at the terminal behind a redirected sys.stdout
    wanted = os.environ.get("COLUMNS", "")
    if wanted.isdecimal() and int(wanted) > 0:
        return int(wanted)
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else 80


def filled(text: str, indent: str = "", start: str = "") -> str:
    """A paragraph as wide as `columns`. Filled here, because rich would break long words, such as file names."""
    return textwrap.fill(
        " ".join(text.split()),
        max(40, columns()),
        initial_indent=indent + start,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def fitted(sheet: Table, first: int, widest: int = 20) -> Group:
    """A table as it is where it fits into `columns`; else several tables with some of its columns each.

    Args:
        sheet: without padding, its headings and cells as text. Headings may be cut, unless their column is `no_wrap`.
        first: how many columns, from the left, every part has; longer cells of theirs than `widest` continue below.
    """
    widths = [_width(column) for column in sheet.columns]
    room = columns() - 1 - sum(min(width, widest) + 1 for width in widths[:first])
    parts: list[list[int]] = [[]]
    for number in range(first, len(widths)):
        if parts[-1] and sum(widths[i] + 1 for i in (*parts[-1], number)) > room:
            parts.append([])
        parts[-1].append(number)
    if len(parts) == 1:
        return Group(sheet)
    return Group(*(_part(sheet, [*range(first), *part], part is parts[0]) for part in parts))


def _width(column: Column) -> int:
    texts = [*column.cells, *([column.header] if column.no_wrap else [])]
    lines = [line for text in texts for line in Text.from_markup(str(text)).plain.splitlines()]
    return max(column.min_width or 0, *map(cell_len, lines), 0)


def _part(sheet: Table, chosen: list[int], titled: bool) -> Table:
    part = Table(box=sheet.box, title=sheet.title if titled else None, title_justify="left", padding=0)
    taken = [sheet.columns[i] for i in chosen]
    for column in taken:
        part.add_column(
            column.header,
            justify=column.justify,
            style=column.style,
            no_wrap=column.no_wrap,
            overflow=column.overflow,
            min_width=column.min_width,
            max_width=column.max_width,
        )
    for row, cells in zip(sheet.rows, zip(*(column.cells for column in taken), strict=True), strict=True):
        part.add_row(*cells, style=row.style, end_section=row.end_section)
    return part
