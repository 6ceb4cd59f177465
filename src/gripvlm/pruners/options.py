"""A pruner's options: read off its signature, parsed from a spec, checked against their annotations."""

from __future__ import annotations

import ast
import difflib
import inspect
import numbers
import os
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import is_dataclass
from functools import cache
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from gripvlm.errors import PrunerError
from gripvlm.pruners.base import Pruner

__all__ = ["Option", "made", "options_of", "outside", "parsed"]

_MISSING: Any = inspect.Parameter.empty


class Option(NamedTuple):
    """One option of a pruner.

    Attributes:
        name: as typed.
        kind: its annotation; `Any` where there is none.
        default: what it is when left away; `inspect.Parameter.empty` if it must be given.
    """

    name: str
    kind: Any
    default: Any

    @property
    def required(self) -> bool:
        """True where there is no default."""
        return self.default is _MISSING

    @property
    def typeable(self) -> bool:
        """Whether a spec can hold a value of it; a tensor or a list cannot be typed."""
        return any(
            kind in (Any, int, float, bool) or get_origin(kind) is Literal or _fits("", kind)
            for kind in _members(self.kind)
        )

    def __str__(self) -> str:
        if not self.required:
            return f"{self.name}={self.default}"
        return f"{self.name} ({_said(self.kind)})"

    def fits(self, value: Any) -> bool:
        """Whether the annotation allows it; annotations that say nothing simple allow everything."""
        return any(_fits(value, kind) for kind in _members(self.kind))


@cache
def options_of(factory: Callable[..., Pruner]) -> tuple[Option, ...]:
    """The options that a pruner class or function takes; () where Python cannot tell."""
    plain = isinstance(factory, type) and not is_dataclass(factory)
    makes = vars(factory).get("__init__", factory) if plain else factory
    try:
        hints = get_type_hints(makes)
    except (NameError, TypeError, AttributeError, SyntaxError):  # imported for type checkers only
        hints = {}
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return tuple(
        Option(one.name, hints.get(one.name, Any), one.default) for one in _parameters(factory) if one.kind in named
    )


def outside(text: str, mark: str) -> list[str]:
    """`text` split at the marks outside of brackets, each piece stripped."""
    pieces, depth = [""], 0
    for sign in text:
        depth += (sign in "([") - (sign in ")]")
        if sign == mark and depth == 0:
            pieces.append("")
        else:
            pieces[-1] += sign
    return [piece.strip() for piece in pieces]


def parsed(whole: str, spec: str, known: Sequence[Option]) -> dict[str, Any]:
    """{"seed": 3} from "seed=3": Python literals where they parse and fit, else strings."""
    by_name = {option.name: option for option in known}
    values: dict[str, Any] = {}
    for part in filter(None, outside(spec, ",")):
        name, equals, text = (piece.strip() for piece in part.partition("="))
        if not equals or not name.isidentifier():
            raise PrunerError(f"cannot read {part!r} in {whole!r}: type name:option=value,option=value")
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text
        if name in by_name and not by_name[name].fits(value) and by_name[name].fits(text):
            value = text  # a name that happens to be a number
        values[name] = value
    return values


def made(name: str, factory: Callable[..., Pruner], values: Mapping[str, Any]) -> Pruner:
    """The pruner with these options, or a `PrunerError` that says which there are."""
    known = options_of(factory)
    by_name = {option.name: option for option in known}
    takes = f"its options are {', '.join(map(str, known))}" if known else f"it has none: type {name!r} alone"
    anything = any(one.kind is one.VAR_KEYWORD for one in _parameters(factory))
    for key, value in values.items():
        if key not in by_name:
            if anything:
                continue
            near = difflib.get_close_matches(key, by_name, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise PrunerError(f"pruner {name!r} has no option {key!r}: {hint}{takes}")
        option = by_name[key]
        if not option.fits(value):
            if not option.typeable:
                raise _only_python(name, [option])
            example = f": type {name}:{key}={option.default}" if not option.required else ""
            raise PrunerError(f"pruner {name!r} takes {key} as {_said(option.kind)}, got {value!r}{example}")
    missing = [option for option in known if option.required and option.name not in values]
    if any(not option.typeable for option in missing):
        raise _only_python(name, missing)
    if missing:
        example = ",".join(f"{option.name}=..." for option in missing)
        raise PrunerError(f"pruner {name!r} needs {', '.join(map(str, missing))}: type {name}:{example}")
    try:
        return factory(**values)
    except TypeError as error:
        given = ", ".join(f"{key}={value!r}" for key, value in values.items()) or "no options"
        raise PrunerError(f"pruner {name!r} cannot be made with {given}: {error}") from error


def _only_python(name: str, options: Sequence[Option]) -> PrunerError:
    example = ", ".join(f"{option.name}=..." for option in options)
    return PrunerError(
        f"pruner {name!r} needs {', '.join(map(str, options))}, which cannot be typed in a name: it is for use from "
        f"Python, get_pruner({name!r}, {example})"
    )


@cache
def _parameters(factory: Callable[..., Pruner]) -> tuple[inspect.Parameter, ...]:
    try:
        return tuple(inspect.signature(factory).parameters.values())
    except (TypeError, ValueError):
        return ()


def _members(kind: Any) -> tuple[Any, ...]:
    """The kinds of a union; of anything else, itself."""
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def _fits(value: Any, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    kind = get_origin(kind) or kind
    if kind in (None, types.NoneType):
        return value is None
    if kind in (Any, object) or not isinstance(kind, type):  # also a TypeVar, a string
        return True
    if kind in (int, float):
        number = numbers.Integral if kind is int else numbers.Real
        return isinstance(value, number) and not isinstance(value, bool)
    if isinstance(value, str):
        return kind is str or issubclass(kind, os.PathLike)
    try:
        return isinstance(value, kind)
    except TypeError:  # a Protocol
        return True


def _said(kind: Any) -> str:
    """An annotation as one would say it."""
    words = {int: "a whole number", float: "a number", str: "text", bool: "True or False", types.NoneType: "None"}
    if get_origin(kind) is Literal:
        return " or ".join(map(repr, get_args(kind)))
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join(map(_said, get_args(kind)))
    if kind in words:
        return words[kind]
    return str(kind).replace("collections.abc.", "").replace("torch.", "")
