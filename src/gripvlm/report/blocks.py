"""What a report is made of, before it is a page: headings, paragraphs, tables, figures, pictures, commands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Block", "Commands", "Facts", "Figures", "Heading", "Pictures", "Sheet", "Shown", "Text"]


@dataclass(frozen=True)
class Heading:
    """A heading; level 1 is the page's."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Text:
    """A paragraph; `code` between back ticks."""

    text: str


@dataclass(frozen=True)
class Sheet:
    """A table: the first `named` columns are words, the others numbers. `strong` rows stand out."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    named: int = 1
    strong: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Figures:
    """SVG drawings side by side, each with a name for its file, under one legend: an SVG and a word an entry."""

    drawings: Sequence[tuple[str, str]]
    legend: Sequence[tuple[str, str]]
    wide: bool = False


@dataclass(frozen=True)
class Shown:
    """One picture: JPEG bytes, what it is, and whether the answer below it is right."""

    name: str
    content: bytes
    caption: str
    right: bool


@dataclass(frozen=True)
class Pictures:
    """Pictures about one question, with the question above them."""

    title: str
    pictures: Sequence[Shown]


@dataclass(frozen=True)
class Commands:
    """What to type for each point."""

    rows: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Facts:
    """Words and what they stand for, one a line."""

    rows: Sequence[tuple[str, str]]


Block = Heading | Text | Facts | Sheet | Figures | Pictures | Commands
