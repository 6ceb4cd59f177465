"""Pruners by name. No method is imported before it is used."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, NamedTuple

from gripvlm.errors import PrunerError
from gripvlm.pruners.base import Pruner
from gripvlm.utils.spec import Option, did_you_mean, fits, options_of, parse_spec, read_value, split_specs

__all__ = ["PrunerRow", "get_pruner", "list_pruners", "pruner_names", "register_pruner"]

ENTRY_POINTS = "gripvlm.pruners"

_BUILT_IN: dict[str, str] = {
    "apet": "gripvlm.pruners.llm.apet:ApET",
    "apet_input": "gripvlm.pruners.llm.apet:ApETInput",
    "cdpruner": "gripvlm.pruners.input.cdpruner:CDPruner",
    "clse": "gripvlm.pruners.llm.clse:CLSE",
    "dart": "gripvlm.pruners.llm.dart:DART",
    "dart_input": "gripvlm.pruners.llm.dart:DARTInput",
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
    "holov": "gripvlm.pruners.input.holov:HoloV",
    "keep_all": "gripvlm.pruners.baselines.keep_all:KeepAll",
    "gumbel": "gripvlm.pruners.wrappers.gumbel:Gumbel",
    "mmr": "gripvlm.pruners.wrappers.mmr:MMR",
    "mustdrop": "gripvlm.pruners.llm.mustdrop:MustDrop",
    "mustdrop_llm": "gripvlm.pruners.llm.mustdrop:MustDropLLM",
    "norm": "gripvlm.pruners.baselines.norm:Norm",
    "otprune": "gripvlm.pruners.input.otprune:OTPrune",
    "pool": "gripvlm.pruners.baselines.grid:Pool",
    "priortr": "gripvlm.pruners.llm.priortr:PriorTR",
    "prumerge": "gripvlm.pruners.input.prumerge:PruMerge",
    "prumerge_plus": "gripvlm.pruners.input.prumerge:PruMergePlus",
    "prunesid": "gripvlm.pruners.input.prunesid:PruneSID",
    "ptp": "gripvlm.pruners.llm.ptp:PTP",
    "ptp_vision": "gripvlm.pruners.llm.ptp:PTPVision",
    "pumer": "gripvlm.pruners.llm.pumer:PuMer",
    "pyramiddrop": "gripvlm.pruners.llm.pyramiddrop:PyramidDrop",
    "random": "gripvlm.pruners.baselines.random:Random",
    "repeats": "gripvlm.pruners.wrappers.repeats:Repeats",
    "restore": "gripvlm.pruners.wrappers.restore:Restore",
    "scope": "gripvlm.pruners.input.scope:SCOPE",
    "sparsevlm": "gripvlm.pruners.llm.sparsevlm:SparseVLM",
    "split": "gripvlm.pruners.wrappers.split:Split",
    "spread": "gripvlm.pruners.wrappers.spread:Spread",
    "svd_prune": "gripvlm.pruners.input.svd_prune:SVDPrune",
    "tome": "gripvlm.pruners.tower.tome:ToMe",
    "top_p": "gripvlm.pruners.wrappers.top_p:TopP",
    "tower": "gripvlm.pruners.wrappers.tower:Tower",
    "v2drop": "gripvlm.pruners.llm.v2drop:V2Drop",
    "visionzip": "gripvlm.pruners.input.visionzip:VisionZip",
    "vispruner": "gripvlm.pruners.input.vispruner:VisPruner",
    "vlm_pruner": "gripvlm.pruners.llm.vlm_pruner:VLMPruner",
    "vscan": "gripvlm.pruners.llm.vscan:VScan",
    "vscan_vision": "gripvlm.pruners.llm.vscan:VScanVision",
}
_registered: dict[str, str | Callable[..., Pruner]] = {}
_NO_PRUNERS = {
    "downsample": "'downsample' is no pruner: it makes pictures smaller before the model sees them. Type `gripvlm eval "
    "--pruners downsample` or `gripvlm bench --pruners downsample` to measure it; to use it, resize pictures yourself",
    "oracle": "'oracle' is no pruner: it keeps the evidence that a task marks for each question, and a picture of your "
    "own has none. Type `gripvlm eval --pruners oracle` to see it on the lab's tasks",
    "blind": "'blind' is no pruner, but the model without the picture: `gripvlm eval` measures it by itself",
}
"""Names that results show beside those of pruners, and what to do instead of asking for such a pruner."""


class PrunerRow(NamedTuple):
    """One line of `list_pruners`.

    Attributes:
        needs: fields of `VisualTokens`, with default options; empty for wrappers and trained pruners, which need what
            they hold.
        llm_needs: fields of `LLMTokens`, for pruners inside the language model.
        stage: where tokens are dropped: "input", "llm", "vision" or "pixels".
        trained: whether it has weights that were trained for pruning.
        fault: why another package's pruner cannot be loaded; empty for all others.
    """

    name: str
    needs: tuple[str, ...] = ()
    stage: str = ""
    source: str = ""
    options: tuple[Option, ...] = ()
    llm_needs: tuple[str, ...] = ()
    trained: bool = False
    fault: str = ""


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
    taken = _sources().get(name)
    if taken is not None and _qualified(taken) != _qualified(factory):
        raise PrunerError(f"pruner name {name!r} is taken by {taken}: choose another")
    # A string is imported when it is first used.
    _registered[name] = factory


def _qualified(factory: object) -> object:
    """The module and name of a class: a notebook cell that runs again makes a new class of the same name."""
    return (factory.__module__, factory.__qualname__) if isinstance(factory, type) else factory


def pruner_names() -> list[str]:
    """All known names, sorted; imports no pruner."""
    return sorted(_sources())


def list_pruners() -> list[PrunerRow]:
    """One row a pruner, by name. Imports them all; those of other packages that fail have a row that says so."""
    return [_row(name) for name in pruner_names()]


def _row(name: str) -> PrunerRow:
    try:
        factory = _load(name)
        options, trained = options_of(factory), bool(getattr(factory, "trained", False))
        needs = getattr(factory, "needs", ())
        if isinstance(needs, property):  # they depend on the options
            needs = () if trained or any(option.required for option in options) else factory().needs
        return PrunerRow(
            name,
            needs=tuple(sorted(needs)),
            stage=str(getattr(factory, "stage", "")),
            source=str(getattr(factory, "source", "")),
            options=options,
            llm_needs=tuple(sorted(getattr(factory, "llm_needs", ()))),
            trained=trained,
        )
    except (Exception, SystemExit) as error:
        # Other people's code may raise anything, and must not cost a user the rest of the list.
        if name in _BUILT_IN:
            raise
        return PrunerRow(name, fault=str(error) if isinstance(error, PrunerError) else _fault(name, error))


def _fault(name: str, error: BaseException) -> str:
    cause = " ".join(f"{type(error).__name__}: {error}".split())
    source = _sources()[name]
    return f"pruner {name!r} cannot be loaded, as {source} fails ({cause}): fix or uninstall the package that brings it"


def get_pruner(pruner: str | Pruner, **options: Any) -> Pruner:
    """The pruner for a name, a spec or an object.

    Args:
        pruner: a name (`"divprune"`), a spec with options (`"random:seed=3"`, several separated by
            commas; around another pruner `"mmr(norm):balance=0.5"`), or a pruner object, which is
            returned as it is.
        options: fields of the pruner, `get_pruner("random", seed=3)`; they win over the spec's.

    Raises:
        PrunerError: an unknown name (the nearest known ones are listed), an unknown option, a value
            that does not fit the option's annotation, or an object without `select`.
    """
    if isinstance(pruner, str):
        return _from_spec(pruner, options)
    if isinstance(pruner, type):
        raise PrunerError(f"got the class {pruner.__name__}: pass an object, {pruner.__name__}()")
    if not callable(getattr(pruner, "select", None)):
        raise PrunerError(
            f"got a {type(pruner).__name__}, which has no select(): pass a pruner's name "
            f"({', '.join(pruner_names())}) or an object of a subclass of gripvlm.Pruner"
        )
    if options:
        raise PrunerError(
            f"options {sorted(options)} were passed with a pruner object: set them on the object, or pass a name"
        )
    return pruner


def _from_spec(text: str, options: Mapping[str, Any]) -> Pruner:
    spec = parse_spec(text)
    if spec.argument:
        raise PrunerError(f"cannot read {spec.argument!r} in {text!r}: use name:option=value,option=value")
    if spec.inner == "":
        raise PrunerError(f"cannot read {text!r}: use wrapper(pruner):option=value, such as mmr(norm):balance=0.5")
    factory = _load(spec.name)
    known = {option.name: option for option in options_of(factory)}
    values: dict[str, Any] = {}
    if spec.inner is not None:
        values["inner"] = tuple(get_pruner(pruner) for pruner in split_specs(spec.inner))
    # Read by the annotation of the option, so that a folder called 7 stays a name.
    for word, value in spec.options:
        values[word] = known[word].read(value) if word in known else read_value(value)
    values |= options
    # What other classes and functions take they check themselves: a TypeError.
    if is_dataclass(factory):
        _check_options(spec.name, known, values, getattr(factory, "example", "norm"))
    try:
        pruner: Pruner = factory(**values)
    except TypeError as error:
        given = ", ".join(f"{key}={value!r}" for key, value in values.items()) or "no options"
        raise PrunerError(f"pruner {spec.name!r} cannot be made with {given}: {error}") from error
    return pruner


def _check_options(name: str, known: Mapping[str, Option], values: Mapping[str, Any], example: str) -> None:
    """Refuses an option that there is not, a value that does not fit, and a required option without a value.

    Args:
        example: a pruner that it takes, where it is a wrapper.
    """
    for word, value in values.items():
        if word not in known:
            options = ", ".join(map(str, known.values()))
            takes = f"its options are {options}" if known else f"it has none: use {name!r} alone"
            hint = did_you_mean(word, known, count=1, cutoff=0.5)
            raise PrunerError(f"pruner {name!r} has no option {word!r}: {hint}{takes}")
        if not fits(value, known[word].kind):
            raise PrunerError(
                f"pruner {name!r} takes {word} as {known[word].annotation}, got {value!r}: {_usage(name, known[word])}"
            )
    for option in known.values():
        if option.required and option.name not in values:
            if option.name == "inner":
                raise PrunerError(f"{name!r} wraps another pruner: write that one in brackets, as in {name}({example})")
            raise PrunerError(f"pruner {name!r} needs {option.name} ({option.annotation}): {_usage(name, option)}")


def _usage(name: str, option: Option) -> str:
    shown = "..." if option.required else option.default
    return f"use {name}:{option.name}={shown}, or get_pruner({name!r}, {option.name}=...) from Python"


def _sources() -> dict[str, Any]:
    """name -> class, factory, "module:Class" or entry point. Built-ins cannot be shadowed."""
    plugins = {point.name: point.value for point in entry_points(group=ENTRY_POINTS)}
    return {**plugins, **_registered, **_BUILT_IN}


def _load(name: str) -> Any:
    """The class or function behind a name."""
    source: Any = _BUILT_IN.get(name) or _registered.get(name)
    # Only now, because a search of all installed packages takes milliseconds.
    if source is None:
        sources = _sources()
        if name not in sources:
            if name in _NO_PRUNERS:
                raise PrunerError(f"{_NO_PRUNERS[name]}. `gripvlm list` shows the pruners")
            hint = did_you_mean(name, sources)
            raise PrunerError(f"unknown pruner {name!r}: {hint}known are {', '.join(sorted(sources))}")
        source = sources[name]
    # A class or a function that was registered as it is.
    if not isinstance(source, str):
        return source
    module, _, attribute = source.partition(":")
    try:
        return getattr(import_module(module), attribute)
    except (Exception, SystemExit) as error:
        # An error in gripvlm must show its whole trace; for another package one line that names it is enough.
        if name in _BUILT_IN:
            raise
        raise PrunerError(_fault(name, error)) from error
