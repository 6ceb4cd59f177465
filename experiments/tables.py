"""Fills the tables of hand-written pages from results.

    python -m experiments.tables            writes the tables of all pages (make tables)
    python -m experiments.tables --check    writes nothing; exit code 1 where a table is out of date

A page has `<!-- table: NAME -->` and `<!-- /table -->`, each on a line of its own; what is between them is replaced.
A study's `analyze.py` has `tables() -> {page: {NAME: Markdown}}`. Sentences are written by people and never touched.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MARKED = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- /table -->)", re.DOTALL)


def filled(text: str, tables: Mapping[str, str]) -> str:
    """The page with these tables; other tables of the page stay as they are."""
    places = {name for _, name, _ in MARKED.findall(text)}
    if missing := tables.keys() - places:
        raise ValueError(f"the page has no <!-- table: --> for {', '.join(sorted(missing))}, only {sorted(places)}")

    def one(match: re.Match[str]) -> str:
        head, name, tail = match.groups()
        return f"{head}\n{tables[name].strip()}\n\n{tail}" if name in tables else match[0]

    return MARKED.sub(one, text)


def fill(page: str | Path, tables: Mapping[str, str]) -> None:
    """Writes tables into a page, named from the repository's root."""
    path = ROOT / page
    path.write_text(filled(path.read_text(encoding="utf-8"), tables), encoding="utf-8")


def all_tables() -> dict[str, dict[str, str]]:
    """Page -> its tables, of all studies."""
    pages: dict[str, dict[str, str]] = defaultdict(dict)
    for file in sorted((ROOT / "experiments").glob("*/analyze.py")):
        study = importlib.import_module(f"experiments.{file.parent.name}.analyze")
        for page, tables in study.tables().items():
            pages[page] |= tables
    return pages


def out_of_date() -> list[str]:
    """Pages that results would fill otherwise."""
    found = []
    for page, tables in all_tables().items():
        text = (ROOT / page).read_text(encoding="utf-8")
        if filled(text, tables) != text:
            found.append(page)
    return found


def main() -> None:
    if "--check" in sys.argv[1:]:
        old = out_of_date()
        sys.exit(f"out of date: {', '.join(old)}: run python -m experiments.tables" if old else 0)
    for page, tables in all_tables().items():
        fill(page, tables)
        print(page)


if __name__ == "__main__":
    main()
