"""What belongs to a call: hooks on a shared model that act only for the block that asked for them.

A block is open in the context (a thread, an asyncio task) that entered it, in as many of them at once as there are.
What blocks want of a module is done by one hook, put on with the first block that names the module and taken off
with the last; it asks who is calling. A thread without such a block of its own is served in two cases:

1. A run of the arguments that a `one_run` was opened with belongs to that run, whoever runs the model on them (a
   streamer's thread, a pool's worker): it is known by its encoded images, and from then on by its cache.
2. Backward may run layers again (gradient checkpointing) in threads of autograd's own. There the one run that is
   open on the module is served; while several are, backward is refused.

Every other thread's forward passes as if there were no hook, and so does that of a copy of the model.
"""

from __future__ import annotations

import functools
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from gripvlm.errors import GripError, InputError

__all__ = ["After", "AttentionHook", "Before", "before_attention", "hooked", "is_open", "one_run"]

Before: TypeAlias = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]
"""(module, args, kwargs) -> None, or (args, kwargs) to go on with."""
After: TypeAlias = Callable[[Any, tuple[Any, ...], dict[str, Any], Any], Any]
"""(module, args, kwargs, output) -> None, or the output to go on with."""


class AttentionHook(Protocol):
    """What stands before the attention calls of some `modules` (id -> layer): it sees what goes in, and returns the
    mask to go on with.
    """

    modules: dict[int, int]

    def look(self, module: Any, query: Tensor, key: Tensor, mask: Any, options: dict[str, Any]) -> Any: ...


class _Run:
    """One prompt's run, told from others by what was handed out for it: its encoded images, then its cache."""

    def __init__(self, root: Any, arguments: Mapping[str, Any]) -> None:
        self.root = root
        self.outputs = [*(arguments.get("mm_encoder_outputs") or {}).values()]
        self.cache: Callable[[], Any] = lambda: None

    def owns(self, kwargs: Mapping[str, Any]) -> bool:
        """Whether a forward with these arguments is this run's."""
        given = [*(kwargs.get("mm_encoder_outputs") or {}).values(), *_caches(kwargs)]
        return any(value is own for value in given for own in (*self.outputs, self.cache()))

    def note(self, values: Any) -> None:
        """Remembers the cache among a forward's arguments or outputs."""
        for cache in _caches(values) if isinstance(values, Mapping) else ():
            self.cache = weakref.ref(cache)


def _caches(values: Mapping[str, Any]) -> list[Any]:
    """By what they do: their names differ between versions of transformers."""
    return [value for value in values.values() if callable(getattr(value, "get_seq_length", None))]


class _Part:
    """What one open block wants of modules.

    Attributes:
        before, after: id of a module -> what is to be done there.
        looker: what stands before attention calls.
        key: what the block does, for `is_open`.
        run: the run that it is part of, if any.
    """

    def __init__(
        self, before: Mapping[Any, Before], after: Mapping[Any, After], looker: AttentionHook | None, key: Any
    ) -> None:
        self.before = {id(module): act for module, act in before.items()}
        self.after = {id(module): act for module, act in after.items()}
        self.modules = list({id(module): module for module in (*before, *after)}.values())  # held: ids stay theirs
        self.looker, self.key, self.run, self.open = looker, key, _run.get(), True

    def concerns(self, module: Any) -> bool:
        key = id(module)
        return key in self.before or key in self.after or (self.looker is not None and key in self.looker.modules)


_lock = threading.RLock()
_parts: tuple[_Part, ...] = ()  # of all contexts; replaced, never changed
_mine: ContextVar[tuple[_Part, ...]] = ContextVar("gripvlm_parts", default=())
_run: ContextVar[_Run | None] = ContextVar("gripvlm_run", default=None)  # that blocks opened now are part of
_lent: ContextVar[_Run | None] = ContextVar("gripvlm_lent", default=None)  # another context's, for one forward


@contextmanager
def one_run(root: Any, arguments: Mapping[str, Any]) -> Iterator[None]:
    """Blocks that are entered inside are parts of one run, and serve whoever runs the model on these arguments.

    Args:
        root: the module whose forward begins and ends a run, where these blocks have hooks before and after it.
        arguments: what the model will be run on; inside another `one_run`, blocks are parts of that one.
    """
    outer = _run.get()
    _run.set(_Run(root, arguments) if outer is None else outer)
    try:
        yield
    finally:
        _run.set(outer)


@contextmanager
def hooked(
    before: Mapping[Any, Before] | None = None, after: Mapping[Any, After] | None = None, key: Any = None
) -> Iterator[None]:
    """Inside the block, these act before and after the forward of their modules, in this block's calls.

    They change outputs before other hooks see them: transformers' own note what comes out of a layer.
    `key` says what the block does, for `is_open`.
    """
    with _opened(_Part(before or {}, after or {}, None, key), first=False):
        yield


@contextmanager
def before_attention(looker: AttentionHook, first: bool = False) -> Iterator[None]:
    """Inside the block, `looker` stands before the attention calls of its modules, in this block's calls; `first`
    puts it before others.
    """
    with _opened(_Part({}, {}, looker, None), first):
        yield


def is_open(key: Any) -> bool:
    """Whether this context has a block open that does `key`."""
    return any(part.open and part.key == key for part in _mine.get())


@contextmanager
def _opened(part: _Part, first: bool) -> Iterator[None]:
    global _parts
    with _lock:
        _hold(part)
        _parts = (part, *_parts) if first else (*_parts, part)
    _mine.set((part, *_mine.get()) if first else (*_mine.get(), part))
    try:
        yield
    finally:
        part.open = False
        _mine.set(tuple(other for other in _mine.get() if other.open))
        with _lock:
            _parts = tuple(other for other in _parts if other is not part)
            _release(part)


# --- who is calling ---------------------------------------------------------------------------------------------------


def _acting(module: Any) -> list[_Part]:
    """The parts that serve whoever runs this module now, in order."""
    parts = [part for part in _mine.get() if part.open and part.concerns(module)]
    run = _lent.get()
    if run is not None and not parts:
        parts = [part for part in _parts if part.run is run and part.concerns(module)]
    if parts or torch._C._current_graph_task_id() == -1:  # the latter: no backward runs in this thread
        return parts
    parts = [part for part in _parts if part.run is not None and part.concerns(module)]
    if len({id(part.run) for part in parts}) > 1:
        raise GripError(
            "backward runs layers again (gradient checkpointing) in a thread of autograd's own while several gripvlm "
            "blocks are open on this model, so it cannot be told whose they are: train in one thread at a time"
        )
    return parts


def _enter(module: Any, kwargs: Mapping[str, Any]) -> None:
    """At the root of runs: notes whose forward begins, and its cache."""
    runs = {part.run for part in _parts if part.run is not None and part.run.root is module}
    if not runs:
        return
    run = next((part.run for part in _mine.get() if part.open and part.run in runs), None)
    other = None if run is not None else next((each for each in runs if each.owns(kwargs)), None)
    _lent.set(other)
    if (served := run or other) is not None:
        served.note(kwargs)


def _leave(module: Any, output: Any) -> None:
    """At the root of runs: a forward ends, and its output may have the cache."""
    run = next((part.run for part in _mine.get() if part.open and part.run and part.run.root is module), None)
    run = run or _lent.get()
    if run is not None and run.root is module:
        run.note(output)
        _lent.set(None)


def _before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
    """The one hook before a module's forward."""
    if ("before", id(module)) not in _held:
        return _left_over(module)
    if kwargs is None:  # another thread puts it on or takes it off at this moment
        return None
    _enter(module, kwargs)
    changed = False
    for part in _acting(module):
        act = part.before.get(id(module))
        result = None if act is None else act(module, args, kwargs)
        if result is not None:
            (args, kwargs), changed = result, True
    return (args, kwargs) if changed else None


def _after(module: Any, args: tuple[Any, ...], kwargs: Any, output: Any = None) -> Any:
    """The one hook after a module's forward."""
    if ("after", id(module)) not in _held:
        return _left_over(module)
    if not isinstance(kwargs, dict):  # as above
        return None
    changed = None
    for part in _acting(module):
        act = part.after.get(id(module))
        result = None if act is None else act(module, args, kwargs, output if changed is None else changed)
        changed = changed if result is None else result
    _leave(module, output)
    return changed


_before._torchdynamo_disable = _after._torchdynamo_disable = True  # type: ignore[attr-defined]
# Code compiled inside a block calls these hooks uncompiled; after the block they do nothing.


def _left_over(module: Any) -> None:
    """A copy of a module, made while a block was open, has brought the hook with it.

    Raises:
        InputError: it is a replica, one of those that `nn.DataParallel` makes for each device.
    """
    if getattr(module, "_is_replica", False):
        raise InputError(
            "nn.DataParallel copies the model to several devices, where a gripvlm block does not reach it: run "
            "model.module, one process a device"
        )
    with _lock:
        for kind, hooks, with_kwargs in (
            ("before", module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
            ("after", module._forward_hooks, module._forward_hooks_with_kwargs),
        ):
            for number in [number for number, hook in hooks.items() if hook in (_before, _after)]:
                if (kind, id(module)) not in _held:
                    hooks.pop(number)
                    with_kwargs.pop(number, None)


# --- what is on the modules, once each, for as long as anyone needs it ------------------------------------------------

_held: dict[tuple[str, int], tuple[int, Any]] = {}  # (kind, id of a module) -> how many parts hold it, its handle
_lookers = 0
_original: Callable[..., Any] | None = None
_patched: Callable[..., Any] | None = None
_stance: Any = None


def _hooks_of(part: _Part) -> Iterator[tuple[str, Any]]:
    """("before" or "after", module) of each hook that this part needs."""
    for kind, wanted in (("before", part.before), ("after", part.after)):
        yield from ((kind, module) for module in part.modules if id(module) in wanted)


def _hold(part: _Part) -> None:
    """Puts on what this part needs and is not on yet; under the lock."""
    global _lookers, _original, _patched, _stance
    if _stance is None and "torch._dynamo" in sys.modules:
        # Compiled code does not notice hooks that come after it: it would run on as if there were none.
        _stance = torch.compiler.set_stance("force_eager")
    for kind, module in _hooks_of(part):
        count, handle = _held.get((kind, id(module)), (0, None))
        if not count and kind == "before":
            handle = module.register_forward_pre_hook(_before, with_kwargs=True)
        elif not count:
            handle = module.register_forward_hook(_after, with_kwargs=True, prepend=True)
        _held[kind, id(module)] = count + 1, handle
    if part.looker is not None:
        # Imported here so that `import gripvlm` does not import transformers.
        from transformers.modeling_utils import AttentionInterface

        if not _lookers:
            _original = AttentionInterface.get_interface
            AttentionInterface.get_interface = _patched = _watched(_original)
        _lookers += 1


def _release(part: _Part) -> None:
    """Takes off what no part needs any more; under the lock."""
    global _lookers, _stance
    for kind, module in _hooks_of(part):
        count, handle = _held.pop((kind, id(module)))
        if count > 1:
            _held[kind, id(module)] = count - 1, handle
        else:
            handle.remove()
    if part.looker is not None:
        from transformers.modeling_utils import AttentionInterface

        _lookers -= 1
        if not _lookers and AttentionInterface.get_interface is _patched:  # else somebody wrapped it: it lets all pass
            AttentionInterface.get_interface = _original
    if not _parts and _stance is not None:
        _stance.__exit__(None, None, None)
        _stance = None


def _watched(original: Callable[..., Any]) -> Callable[..., Any]:
    """`AttentionInterface.get_interface` that returns functions which let a call's own blocks look first."""

    @functools.wraps(original)
    def get_interface(self: Any, implementation: str, default: Callable[..., Any]) -> Callable[..., Any]:
        attend = original(self, implementation, default)

        @functools.wraps(attend)
        def look_and_attend(
            module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **options: Any
        ) -> Any:
            for part in _acting(module):
                if part.looker is not None:
                    attention_mask = part.looker.look(module, query, key, attention_mask, options)
            return attend(module, query, key, value, attention_mask, **options)

        return look_and_attend

    return get_interface
