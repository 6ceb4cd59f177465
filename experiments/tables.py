"""Fills the tables of hand-written pages from results.

    python -m experiments.tables            writes the tables of all pages (make tables)
    python -m experiments.tables --check    writes nothing; exit code 1 where a table is out of date

A page has `<!-- table: NAME -->` and `<!-- /table -->`, each on a line of its own; what stands between them is replaced.
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
    """The page with these tables. Every table must have its place, and every place its table."""
    places = [name for _, name, _ in MARKED.findall(text)]
    if sorted(places) != sorted(tables):
        raise ValueError(f"the page has places for {sorted(places)}, but the tables are {sorted(tables)}")
    return MARKED.sub(lambda match: f"{match[1]}\n{tables[match[2]].strip()}\n\n{match[3]}", text)


def fill(path: Path, tables: Mapping[str, str]) -> None:
    path.write_text(filled(path.read_text(encoding="utf-8"), tables), encoding="utf-8")


def all_tables() -> dict[Path, dict[str, str]]:
    """Page -> its tables, of all studies."""
    pages: dict[Path, dict[str, str]] = defaultdict(dict)
    for file in sorted((ROOT / "experiments").glob("*/analyze.py")):
        study = importlib.import_module(f"experiments.{file.parent.name}.analyze")
        for page, tables in study.tables().items():
            pages[ROOT / page] |= tables
    return pages


def out_of_date() -> list[Path]:
    pages = all_tables()
    return [page for page, tables in pages.items() if filled(text := page.read_text("utf-8"), tables) != text]


def main() -> None:
    if "--check" in sys.argv[1:]:
        old = out_of_date()
        sys.exit(f"out of date: {', '.join(map(str, old))}: python -m experiments.tables" if old else 0)
    for page, tables in all_tables().items():
        fill(page, tables)
        print(page.relative_to(ROOT))


if __name__ == "__main__":
    main()
