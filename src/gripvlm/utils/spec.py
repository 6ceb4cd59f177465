"""The language in which things are named with options: `random:seed=3`, `mmr(norm):balance=0.5`, `hf:REPO,split=test`.

    list   = spec { "," spec }
    spec   = name [ "(" list ")" ] [ ":" ( argument | option ) { "," option } ]
    option = word "=" value

A comma begins an option where `word=` follows; any other comma belongs to the text before it. Marks inside brackets
separate nothing.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import numbers
import os
import re
import types
from collections.abc import Iterable
from functools import cache
from typing import Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")
_OPTION = re.compile(r"\s*(\w+)\s*=")


class Spec(NamedTuple):
    """A spec, cut into pieces: the text in parentheses after the name is `inner`."""

    name: str
    inner: str | None  # None without parentheses, "" where they do not close
    argument: str  # the text after the colon, ahead of the options
    options: list[tuple[str, str]]  # (word, text of the value), in order


def parse_spec(text: str, takes_argument: bool = False) -> Spec:
    """A spec's pieces.

    Args:
        text: such as "mmr(norm):balance=0.5".
        takes_argument: whether the text up to the first comma is an argument, also where it has a "=".
    """
    head, rest = _cut(text)
    name, opened, inner = head.strip().partition("(")
    inner = inner[:-1].strip() if inner.endswith(")") else ""
    argument: list[str] = []
    options: list[tuple[str, str]] = []
    for piece in _split(rest or "", ","):
        match = _OPTION.match(piece)
        if match and (argument or not takes_argument):
            options.append((match[1], piece[match.end() :].strip()))
        elif options:
            word, value = options[-1]
            options[-1] = (word, f"{value},{piece}")
        else:
            argument.append(piece)
    return Spec(name.strip(), inner if opened else None, ",".join(argument).strip(), options)


def split_specs(text: str) -> list[str]:
    """The specs of a list: `"grid,random:seed=3,x=1,mmr(norm)"` is grid, random:seed=3,x=1 and mmr(norm)."""
    return join_options(piece.strip() for piece in _split(text, ",") if piece.strip())


def join_options(pieces: Iterable[T]) -> list[T]:
    """Pieces of a list that was cut at commas, with each option back at its spec; what is no text stays as it is."""
    joined: list[Any] = []
    for piece in pieces:
        last = joined[-1] if joined else None
        if isinstance(piece, str) and isinstance(last, str) and _OPTION.match(piece) and _cut(last)[1] is not None:
            joined[-1] = f"{last},{piece.strip()}"
        else:
            joined.append(piece)
    return joined


def _split(text: str, mark: str) -> list[str]:
    """`text` split at the marks outside of brackets; at all of them where brackets do not pair."""
    pieces, depth = [""], 0
    for sign in text:
        depth += (sign in "([") - (sign in ")]")
        if sign == mark and depth == 0:
            pieces.append("")
        else:
            pieces[-1] += sign
    return pieces if depth == 0 else text.split(mark)


def _cut(text: str) -> tuple[str, str | None]:
    """The text before and after the first colon outside of brackets; None where there is no colon."""
    head, *rest = _split(text, ":")
    return head, ":".join(rest) if rest else None


def did_you_mean(name: str, known: Iterable[str], count: int = 3, cutoff: float = 0.6) -> str:
    """ "did you mean 'norm' or 'nor'? " for an error message; "" where no known name is near."""
    near = difflib.get_close_matches(name, list(known), n=count, cutoff=cutoff)
    return f"did you mean {' or '.join(map(repr, near))}? " if near else ""


class Option(NamedTuple):
    """One field of a dataclass, as an option of a spec; `kind` is its annotation."""

    name: str
    kind: Any
    default: Any  # `dataclasses.MISSING` if it must be given

    @property
    def required(self) -> bool:
        return self.default is dataclasses.MISSING

    @property
    def annotation(self) -> str:
        return inspect.formatannotation(self.kind)

    def read(self, text: str) -> Any:
        """The value of a spec's text: a Python literal where that fits, else the text."""
        value = read_value(text)
        # A name may look like a number.
        return text if not fits(value, self.kind) and fits(text, self.kind) else value

    @property
    def has_text_form(self) -> bool:
        """Whether a spec can hold a value of it: it cannot hold a tensor or a module."""
        members = get_args(self.kind) if get_origin(self.kind) in (Union, types.UnionType) else (self.kind,)
        return any(kind in (int, float, bool) or get_origin(kind) is Literal or fits("", kind) for kind in members)

    def __str__(self) -> str:
        if not self.has_text_form:
            return f"{self.name}: from Python"
        return f"{self.name} ({self.annotation})" if self.required else f"{self.name}={self.default}"


@cache
def options_of(kind: Any) -> tuple[Option, ...]:
    """The fields that a dataclass is made with; () of anything else."""
    if not dataclasses.is_dataclass(kind):
        return ()
    try:
        hints = get_type_hints(kind)
    except (NameError, TypeError, AttributeError, SyntaxError):  # a type imported for type checkers only
        hints = {}
    options = []
    for field in dataclasses.fields(kind):
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if field.init:
            options.append(Option(field.name, hints.get(field.name, Any), default))
    return tuple(options)


def read_value(text: str) -> Any:
    """A Python literal, or the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def fits(value: Any, kind: Any) -> bool:
    """Whether an annotation allows a value; annotations that say nothing simple allow everything."""
    origin = get_origin(kind) or kind
    if origin in (Union, types.UnionType):
        return any(fits(value, member) for member in get_args(kind))
    if origin is Literal:
        return value in get_args(kind)
    if origin is types.NoneType:
        return value is None
    # A TypeVar or an unresolved string says nothing that could be checked.
    if origin in (Any, object) or not isinstance(origin, type):
        return True
    # True is an int in Python, and no number to a reader.
    if origin in (int, float):
        return isinstance(value, numbers.Integral if origin is int else numbers.Real) and not isinstance(value, bool)
    # A text is a Sequence in Python; an option that takes a list does not mean its letters.
    if isinstance(value, str):
        return origin is str or issubclass(origin, os.PathLike)
    try:
        return isinstance(value, origin)
    except TypeError:  # a Protocol
        return True
