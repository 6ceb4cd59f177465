"""Pruners by name. Strings only: nothing is imported until it is asked for."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, NamedTuple

from gripvlm.errors import PrunerError
from gripvlm.pruners.base import Pruner
from gripvlm.pruners.options import Option, made, options_of, outside, parsed

__all__ = ["PrunerRow", "get_pruner", "list_pruners", "pruner_names", "register_pruner", "split_specs"]

ENTRY_POINTS = "gripvlm.pruners"

_BUILT_IN: dict[str, str] = {
    "cdpruner": "gripvlm.pruners.input.cdpruner:CDPruner",
    "dart": "gripvlm.pruners.llm.dart:DART",
    "dart_input": "gripvlm.pruners.input.dart_input:DARTInput",
    "divprune": "gripvlm.pruners.input.divprune:DivPrune",
    "ensemble": "gripvlm.pruners.wrappers.ensemble:Ensemble",
    "fastervlm": "gripvlm.pruners.input.fastervlm:FasterVLM",
    "fastv": "gripvlm.pruners.llm.fastv:FastV",
    "fopru": "gripvlm.pruners.input.fopru:FoPru",
    "full": "gripvlm.pruners.baselines.keep_all:Full",
    "given": "gripvlm.pruners.baselines.given:Given",
    "grid": "gripvlm.pruners.baselines.grid:Grid",
    "grip": "gripvlm.grip.pruner:Grip",
    "hiprune": "gripvlm.pruners.input.hiprune:HiPrune",
    "hired": "gripvlm.pruners.input.hired:HiRED",
    "keep_all": "gripvlm.pruners.baselines.keep_all:KeepAll",
    "mmr": "gripvlm.pruners.wrappers.mmr:MMR",
    "mustdrop": "gripvlm.pruners.input.mustdrop:MustDrop",
    "mustdrop_llm": "gripvlm.pruners.llm.mustdrop_llm:MustDropLLM",
    "norm": "gripvlm.pruners.baselines.norm:Norm",
    "pool": "gripvlm.pruners.baselines.pool:Pool",
    "prumerge": "gripvlm.pruners.input.prumerge:PruMerge",
    "prumerge_plus": "gripvlm.pruners.input.prumerge_plus:PruMergePlus",
    "ptp": "gripvlm.pruners.llm.ptp:PTP",
    "ptp_vision": "gripvlm.pruners.input.ptp_vision:PTPVision",
    "pumer": "gripvlm.pruners.llm.pumer:PuMer",
    "pyramiddrop": "gripvlm.pruners.llm.pyramiddrop:PyramidDrop",
    "random": "gripvlm.pruners.baselines.random:Random",
    "sparsevlm": "gripvlm.pruners.llm.sparsevlm:SparseVLM",
    "split": "gripvlm.pruners.wrappers.split:Split",
    "spread": "gripvlm.pruners.wrappers.spread:Spread",
    "svd_prune": "gripvlm.pruners.input.svd_prune:SVDPrune",
    "tome": "gripvlm.pruners.tower.tome:ToMe",
    "visionzip": "gripvlm.pruners.input.visionzip:VisionZip",
    "vispruner": "gripvlm.pruners.input.vispruner:VisPruner",
    "vscan": "gripvlm.pruners.llm.vscan:VScan",
    "vscan_vision": "gripvlm.pruners.input.vscan_vision:VScanVision",
}
_registered: dict[str, str | Callable[..., Pruner]] = {}


class PrunerRow(NamedTuple):
    """One line of `list_pruners`.

    Attributes:
        needs: fields of `VisualTokens`, without options.
        llm_needs: fields of `LLMTokens`, for pruners inside the language model.
        stage: where rows are dropped: "input", "llm" or "vision".
        trained: whether it has weights that were trained for pruning.
        fault: why another package's pruner cannot be had; empty for all others.
    """

    name: str
    needs: tuple[str, ...]
    stage: str
    source: str
    options: tuple[Option, ...] = ()
    llm_needs: tuple[str, ...] = ()
    trained: bool = False
    fault: str = ""


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
    """One row a pruner, by name. Imports them all; those of other packages that fail have a row that says so."""
    return [_row(name) if name in _BUILT_IN else _foreign_row(name) for name in pruner_names()]


def _row(name: str) -> PrunerRow:
    made_by = _load(name)
    needs = getattr(made_by, "needs", ())
    if isinstance(needs, property):  # it depends on the object's options
        needs = _needs_by_default(made_by)
    needs = tuple(sorted(needs)) if isinstance(needs, frozenset) else ()
    stage, source = getattr(made_by, "stage", ""), getattr(made_by, "source", "")
    inside = tuple(sorted(getattr(made_by, "llm_needs", ())))
    trained = bool(getattr(made_by, "trained", False))
    return PrunerRow(name, needs, stage, source, options_of(made_by), inside, trained)


def _foreign_row(name: str) -> PrunerRow:
    """That of a pruner that is not ours, whatever its package does."""
    try:
        row = _row(name)
        return row._replace(stage=str(row.stage), source=str(row.source))
    except (Exception, SystemExit) as error:  # noqa: BLE001  it runs other people's code, which may raise anything
        fault = str(error) if isinstance(error, PrunerError) else _fault(name, _sources()[name], error)
        return PrunerRow(name, (), "", "", fault=fault)


def _fault(name: str, source: object, error: BaseException) -> str:
    said = " ".join(f"{type(error).__name__}: {error}".split())
    return f"pruner {name!r} cannot be had, as {source} fails ({said}): mend or uninstall the package that brings it"


def get_pruner(pruner: str | Pruner, **options: Any) -> Pruner:
    """The pruner that a name, a spec or an object stands for.

    Args:
        pruner: a name (`"divprune"`), a spec with options (`"random:seed=3"`, several separated by
            commas; around another pruner `"mmr(norm):balance=0.5"`), or a pruner object, which is
            returned as it is.
        options: fields of the pruner, `get_pruner("random", seed=3)`; they win over the spec's.

    Raises:
        PrunerError: an unknown name (the nearest known ones are listed), an unknown option, a value
            that does not fit the option's annotation, or an object without `select`.
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
    name, inner, spec = _parts(pruner)
    factory = _load(name)
    return made(name, factory, inner | parsed(pruner, spec, options_of(factory)) | options)


def _needs_by_default(made_by: Any) -> frozenset[str]:
    """What a pruner needs without any options; nothing for a wrapper or a trained one, which need what they hold."""
    try:
        return frozenset() if getattr(made_by, "trained", False) else made_by().needs
    except TypeError:
        return frozenset()


def _sources() -> dict[str, Any]:
    """name -> class, factory, "module:Class" or entry point. Built-ins cannot be shadowed."""
    plugins = {point.name: point.value for point in entry_points(group=ENTRY_POINTS)}
    return {**plugins, **_registered, **_BUILT_IN}


def _load(name: str) -> Any:
    source: Any = _BUILT_IN.get(name) or _registered.get(name)
    if source is None:  # looking through all that is installed takes milliseconds
        sources = _sources()
        if name not in sources:
            near = difflib.get_close_matches(name, sources, n=3, cutoff=0.6)
            hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
            raise PrunerError(f"unknown pruner {name!r}: {hint}known are {', '.join(sorted(sources))}")
        source = sources[name]
    if not isinstance(source, str):
        return source
    module, _, attribute = source.partition(":")
    if name in _BUILT_IN:
        return getattr(import_module(module), attribute)
    try:
        return getattr(import_module(module), attribute)
    except (Exception, SystemExit) as error:
        raise PrunerError(_fault(name, source, error)) from error


def split_specs(text: str) -> list[str]:
    """Names and specs at commas; a comma in parentheses or between one spec's options separates nothing.

    `"grid,random:seed=3,x=1,mmr(norm)"` gives grid, random:seed=3,x=1 and mmr(norm).
    """
    specs: list[str] = []
    for piece in filter(None, outside(text, ",")):
        if specs and len(outside(specs[-1], ":")) > 1 and re.match(r"\w+\s*=", piece):
            specs[-1] += f",{piece}"
        else:
            specs.append(piece)
    return specs


def _parts(pruner: str) -> tuple[str, dict[str, Any], str]:
    """("mmr", {"inner": a pruner}, "balance=1") from "mmr(norm):balance=1"."""
    head, *spec = outside(pruner, ":")
    name, opened, inside = head.partition("(")
    if opened and not (inside.endswith(")") and inside[:-1].strip()):
        raise PrunerError(f"cannot read {pruner!r}: type wrapper(pruner):option=value, such as mmr(norm):balance=0.5")
    inner = tuple(get_pruner(one) for one in split_specs(inside[:-1]))
    return name.strip(), {"inner": inner[0] if len(inner) == 1 else inner} if inner else {}, ":".join(spec)
