"""Pruners by name. Strings only: nothing is imported until it is asked for."""

from __future__ import annotations

import ast
import dataclasses
import difflib
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, NamedTuple

from gripvlm.errors import PrunerError
from gripvlm.pruners.base import Pruner

__all__ = ["PrunerRow", "get_pruner", "list_pruners", "pruner_names", "register_pruner"]

ENTRY_POINTS = "gripvlm.pruners"

_BUILT_IN: dict[str, str] = {
    "divprune": "gripvlm.pruners.divprune:DivPrune",
    "fastv": "gripvlm.pruners.fastv:FastV",
    "given": "gripvlm.pruners.given:Given",
    "grid": "gripvlm.pruners.grid:Grid",
    "keep_all": "gripvlm.pruners.keep_all:KeepAll",
    "norm": "gripvlm.pruners.norm:Norm",
    "pool": "gripvlm.pruners.pool:Pool",
    "random": "gripvlm.pruners.random:Random",
}
_registered: dict[str, str | Callable[..., Pruner]] = {}


class PrunerRow(NamedTuple):
    """One line of `list_pruners`."""

    name: str
    needs: tuple[str, ...]
    stage: str
    source: str


def _same(old: object, new: object) -> bool:
    """Equal, or one class defined anew under its own name, as a notebook cell does when it runs again."""
    return old == new or all(
        isinstance(one, type) and (one.__module__, one.__qualname__) == (old.__module__, old.__qualname__)  # type: ignore[attr-defined]
        for one in (old, new)
    )


def register_pruner(name: str, factory: str | Callable[..., Pruner]) -> None:
    """Makes `factory` known as `name` in this process.

    Args:
        name: a new snake_case name.
        factory: a `Pruner` class, or `"package.module:Class"`, imported when first used.

    Raises:
        PrunerError: the name is taken by something else.

    A package offers its pruners to everyone with an entry point in the group `gripvlm.pruners`.
    """
    if not name.isidentifier():
        raise PrunerError(f"pruner name {name!r} must be snake_case, such as 'my_pruner'")
    if (taken := _sources().get(name)) is not None and not _same(taken, factory):
        raise PrunerError(f"pruner name {name!r} is taken by {taken}: choose another")
    _registered[name] = factory


def pruner_names() -> list[str]:
    """All known names, sorted; imports no pruner."""
    return sorted(_sources())


def list_pruners() -> list[PrunerRow]:
    """One row a pruner: name, what it needs, where it drops rows, its source. Imports them all."""
    rows = []
    for name in pruner_names():
        made_by = _load(name)
        needs = getattr(made_by, "needs", ())  # a property, where it depends on the object's options
        needs = tuple(sorted(needs)) if isinstance(needs, frozenset) else ()
        stage, source = getattr(made_by, "stage", ""), getattr(made_by, "source", "")
        rows.append(PrunerRow(name, needs, stage, source))
    return rows


def get_pruner(pruner: str | Pruner, **options: Any) -> Pruner:
    """The pruner that a name, a spec or an object stands for.

    Args:
        pruner: a name (`"divprune"`), a spec with options (`"random:seed=3"`, several separated by
            commas), or a pruner object, which is returned as it is.
        options: fields of the pruner, `get_pruner("random", seed=3)`; they win over the spec's.

    Raises:
        PrunerError: an unknown name (the nearest known ones are listed), an unknown option, or an
            object without `select`.
    """
    if not isinstance(pruner, str):
        if isinstance(pruner, type):
            raise PrunerError(f"got the class {pruner.__name__}: pass an object, {pruner.__name__}()")
        if not callable(getattr(pruner, "select", None)):
            raise PrunerError(
                f"got a {type(pruner).__name__}, which has no select(): pass a pruner's name "
                f"({', '.join(pruner_names())}) or an object with select(tokens) -> Selection"
            )
        if options:
            raise PrunerError(f"options {sorted(options)} go with a name, not with a pruner object")
        return pruner
    name, _, spec = pruner.partition(":")
    options = _parse_options(pruner, spec) | options
    factory = _load(name.strip())
    try:
        return factory(**options)
    except TypeError as error:
        given = ", ".join(f"{key}={value!r}" for key, value in options.items()) or "no options"
        raise PrunerError(f"pruner {name!r} cannot be made with {given} ({error}): {_takes(factory)}") from error


def _takes(factory: Any) -> str:
    """The options there are, with their defaults."""
    if not dataclasses.is_dataclass(factory):
        return "see its documentation"
    options = [
        option.name if option.default is dataclasses.MISSING else f"{option.name}={option.default!r}"
        for option in dataclasses.fields(factory)
    ]
    return f"it takes {', '.join(options)}" if options else "it takes no options"


def _sources() -> dict[str, Any]:
    """name -> class, factory, "module:Class" or entry point. Built-ins cannot be shadowed."""
    plugins = {point.name: point.value for point in entry_points(group=ENTRY_POINTS)}
    return {**plugins, **_registered, **_BUILT_IN}


def _load(name: str) -> Any:
    sources = _sources()
    if name not in sources:
        near = difflib.get_close_matches(name, sources, n=3, cutoff=0.6)
        hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
        raise PrunerError(f"unknown pruner {name!r}: {hint}known are {', '.join(sorted(sources))}")
    source = sources[name]
    if not isinstance(source, str):
        return source
    module, _, attribute = source.partition(":")
    return getattr(import_module(module), attribute)


def _parse_options(whole: str, spec: str) -> dict[str, Any]:
    """{"seed": 3} from "seed=3": Python literals where they parse, else strings."""
    options: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in spec.split(","))):
        key, equals, text = part.partition("=")
        if not equals or not key.strip().isidentifier():
            raise PrunerError(f"cannot read {part!r} in {whole!r}: type name:option=value,option=value")
        try:
            options[key.strip()] = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError):
            options[key.strip()] = text.strip()
    return options
