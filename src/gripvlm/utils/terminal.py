"""Text for a terminal."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap


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
