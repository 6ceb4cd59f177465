"""Hooks on a shared model that act only in the calls of the block that set them.

A block is open in the context (a thread, an asyncio task) that entered it; several may be open for one model at once.
torch calls one hook a module, `_before` or `_after`, whatever the number of blocks; it looks up which block is calling.
A thread without a block of its own is served in two cases:

1. It runs the model on the arguments that a `one_run` was opened with (a streamer's thread, a pool's worker). Such a
   run is recognised by its encoded images, and from then on by its cache.
2. Backward runs layers again (gradient checkpointing) in threads of autograd's own. The one run that is open on the
   module is then served; while several are, backward is refused.

In any other thread, and in a copy of the model, the hooks do nothing.

Attention has no hook of its own in transformers. While any block needs one, `AttentionInterface.get_interface` is
replaced on transformers' class, for the whole process: every model gets its attention function from it in each layer.
It is put back when the last such block ends.
"""

from __future__ import annotations

import functools
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from gripvlm.errors import GripError, InputError, UnsupportedModelError
from gripvlm.models.compat import is_cache

Before: TypeAlias = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any]
"""(module, args, kwargs) -> None, or the (args, kwargs) to use instead."""
After: TypeAlias = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], Any]
"""(module, args, kwargs, output) -> None, or the output to use instead."""


@dataclass
class AttentionCall:
    """One call of an attention function.

    Attributes:
        module: the attention module that makes it.
        query: [B, H, q, d_h].
        key: [B, key heads, L, d_h], after rotary positions; of the cached tokens too.
        value: [B, key heads, L, d_v], likewise.
        mask: as the function gets it: None, [B, 1, q, L] (bool or added), or of another back end. May be replaced.
        options: the function's other arguments.
        key_bias: [B, L] to add to the scores of each key, with a gradient, or None. May be set.
    """

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Any
    options: dict[str, Any]
    key_bias: Tensor | None = None

    @property
    def causal(self) -> bool:
        """Whether, for lack of a mask, the function itself hides what comes after each query."""
        flag = self.options.get("is_causal")
        flag = getattr(self.module, "is_causal", True) if flag is None else flag
        return bool(flag) and self.mask is None and self.query.shape[2] > 1


BeforeAttention: TypeAlias = Callable[[AttentionCall], None]
"""May read an attention call, replace its mask, and set its bias."""


class _Run:
    """One prompt's run, recognised by the encoded images in its arguments, then by its cache."""

    def __init__(self, root: nn.Module, arguments: Mapping[str, Any]) -> None:
        self.root = root
        self.outputs = [*(arguments.get("mm_encoder_outputs") or {}).values()]
        self.cache: Callable[[], Any] = lambda: None

    def owns(self, kwargs: Mapping[str, Any]) -> bool:
        """Whether a forward with these arguments is this run's."""
        # By identity: `generate` hands the very same objects on, and two prompts may have equal images.
        given = [*(kwargs.get("mm_encoder_outputs") or {}).values(), *filter(is_cache, kwargs.values())]
        return any(value is own for value in given for own in (*self.outputs, self.cache()))

    def remember_cache(self, values: Any) -> None:
        """The cache among a forward's arguments or outputs; weakly, so that it ends when its user drops it."""
        for cache in filter(is_cache, values.values() if isinstance(values, Mapping) else ()):
            self.cache = weakref.ref(cache)


@dataclass(eq=False)
class _Block:
    """What one open block does at which modules; see `call_hooks`."""

    before: Mapping[nn.Module, Before]
    after: Mapping[nn.Module, After]
    attention: Mapping[nn.Module, BeforeAttention]
    key: Any
    run: _Run | None
    open: bool = True

    def concerns(self, module: nn.Module) -> bool:
        return module in self.attention or module in self.before or module in self.after

    @functools.cached_property
    def hooks(self) -> set[tuple[str, nn.Module | None]]:
        """(kind, module) of all that must be set for this block; see `_set`."""
        needed: set[tuple[str, nn.Module | None]] = {("before", module) for module in self.before}
        needed |= {("after", module) for module in self.after}
        if self.attention:
            needed.add(("attention", None))
        if "torch._dynamo" in sys.modules:
            # Compiled code does not notice hooks that come after it: it would run on as if there were none.
            needed.add(("eager", None))
        return needed


_lock = threading.RLock()
_blocks: tuple[_Block, ...] = ()  # of all contexts; replaced, never changed, so that readers need no lock
_hooks: dict[
    tuple[str, nn.Module | None], Callable[[], None]
] = {}  # each hook that is set -> the function that removes it
_own: ContextVar[tuple[_Block, ...]] = ContextVar("gripvlm_blocks", default=())
_run: ContextVar[_Run | None] = ContextVar("gripvlm_run", default=None)  # that blocks opened now belong to
_served: ContextVar[_Run | None] = ContextVar("gripvlm_served", default=None)  # another context's, for one forward


@contextmanager
def one_run(root: nn.Module, arguments: Mapping[str, Any]) -> Iterator[None]:
    """Blocks that are entered inside belong to one run, and serve whoever runs the model on these arguments.

    Args:
        root: the module whose forward begins and ends a run; the blocks must have hooks before and after it.
        arguments: what the model will be run on; inside another `one_run`, blocks belong to that one.
    """
    outer = _run.get()
    _run.set(_Run(root, arguments) if outer is None else outer)
    try:
        yield
    finally:
        _run.set(outer)


@contextmanager
def call_hooks(
    before: Mapping[nn.Module, Before] | None = None,
    after: Mapping[nn.Module, After] | None = None,
    attention: Mapping[nn.Module, BeforeAttention] | None = None,
    *,
    first: bool = False,
    key: Any = None,
) -> Iterator[None]:
    """Inside the block, functions run at some modules, in this block's calls only.

    Args:
        before: module -> what runs before its forward.
        after: module -> what runs after its forward.
        attention: module -> what runs before each call of an attention function that the module makes.
        first: run ahead of blocks that are open already.
        key: names what the block does, for `is_open`.
    """
    block = _Block(before or {}, after or {}, attention or {}, key, _run.get())

    def joined(others: tuple[_Block, ...]) -> tuple[_Block, ...]:
        return (block, *others) if first else (*others, block)

    with _lock:
        _set_blocks(joined(_blocks))
    _own.set(joined(_own.get()))
    try:
        yield
    finally:
        # Blocks may end in any order, and in another context than they began in: closed blocks are filtered out.
        block.open = False
        _own.set(tuple(other for other in _own.get() if other.open))
        with _lock:
            _set_blocks(tuple(other for other in _blocks if other is not block))


def is_open(key: Any) -> bool:
    """Whether this context has a block open that does `key`."""
    return any(block.open and block.key == key for block in _own.get())


# --- which block is calling -------------------------------------------------------------------------------------------


def _acting(module: nn.Module) -> list[_Block]:
    """The blocks that serve whoever runs this module now, in order."""
    # Own blocks come first: a thread that has one never acts for another's run.
    blocks = [block for block in _own.get() if block.open and block.concerns(module)]
    run = _served.get()
    if run is not None and not blocks:
        blocks = [block for block in _blocks if block.run is run and block.concerns(module)]
    # -1: this thread runs no backward. torch has no public way to know.
    if blocks or torch._C._current_graph_task_id() == -1:
        return blocks
    # Autograd's own threads have no block: the one run that is open on this module is served.
    blocks = [block for block in _blocks if block.run is not None and block.concerns(module)]
    if len({id(block.run) for block in blocks}) > 1:
        raise GripError(
            "backward runs layers again (gradient checkpointing) in a thread of autograd's own while several gripvlm "
            "blocks are open on this model, so their block is unknown: train in one thread at a time"
        )
    return blocks


def _own_run(root: nn.Module) -> _Run | None:
    """The run on this root whose blocks this context has open."""
    runs = (block.run for block in _own.get() if block.open and block.run is not None)
    return next((run for run in runs if run.root is root), None)


def _begin_forward(root: nn.Module, kwargs: Mapping[str, Any]) -> None:
    """Before a root of runs: decides whose forward begins, and remembers its cache."""
    runs = {block.run for block in _blocks if block.run is not None and block.run.root is root}
    if not runs:
        return
    own = _own_run(root)
    # Set for every forward: the one before may have ended with an error and left its run here.
    _served.set(None if own is not None else next((run for run in runs if run.owns(kwargs)), None))
    if (run := own or _served.get()) is not None:
        run.remember_cache(kwargs)


def _end_forward(root: nn.Module, output: Any) -> None:
    """After a root of runs: its output may have the cache."""
    run = _own_run(root) or _served.get()
    if run is not None and run.root is root:
        run.remember_cache(output)
        _served.set(None)


# --- what torch and transformers call: set once a module, while any block needs it ------------------------------------


def _before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
    """The one hook before a module's forward. A plain function, as modules are copied and pickled with their hooks."""
    if ("before", module) not in _hooks:
        return _remove_copied_hooks(module)
    if kwargs is None:  # torch notes `with_kwargs` after the hook: another thread is just setting it
        return None
    _begin_forward(module, kwargs)
    changed = False
    for block in _acting(module):
        act = block.before.get(module)
        result = None if act is None else act(module, args, kwargs)
        if result is not None:
            (args, kwargs), changed = result, True
    return (args, kwargs) if changed else None


def _after(module: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any = None) -> Any:
    """The one hook after a module's forward."""
    if ("after", module) not in _hooks:
        return _remove_copied_hooks(module)
    if not isinstance(kwargs, dict):  # as above
        return None
    changed = None
    for block in _acting(module):
        # Each block sees the output as blocks before it left it.
        act = block.after.get(module)
        result = None if act is None else act(module, args, kwargs, output if changed is None else changed)
        changed = changed if result is None else result
    _end_forward(module, output)
    return changed


# Code compiled inside a block calls these two uncompiled; after the block they do nothing. An attribute and not
# torch.compiler.disable, which would import torch._dynamo.
_before._torchdynamo_disable = _after._torchdynamo_disable = True  # type: ignore[attr-defined]


def _set_blocks(blocks: tuple[_Block, ...]) -> None:
    """These are the open blocks from now on: sets the hooks that they need and removes all others; under the lock."""
    global _blocks
    needed = {hook for block in blocks for hook in block.hooks}
    for hook in needed - _hooks.keys():
        _hooks[hook] = _set(*hook)
    # Between the two: a thread that sees a block may rely on its hooks.
    _blocks = blocks
    for hook in _hooks.keys() - needed:
        _hooks.pop(hook)()


def _set(kind: str, module: Any) -> Callable[[], None]:
    """Sets a hook, and returns what removes it."""
    if kind == "before":
        return module.register_forward_pre_hook(_before, with_kwargs=True).remove
    if kind == "after":
        # Ahead of other hooks: transformers' own record what comes out of a layer.
        return module.register_forward_hook(_after, with_kwargs=True, prepend=True).remove
    stack = ExitStack()
    stack.enter_context(_attention_replaced() if kind == "attention" else torch.compiler.set_stance("force_eager"))
    return stack.close


def _remove_copied_hooks(module: nn.Module) -> None:
    """A copy of a module, made while a block was open, has brought the hooks with it.

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
                if (kind, module) not in _hooks:
                    hooks.pop(number)
                    with_kwargs.pop(number, None)


@contextmanager
def _attention_replaced() -> Iterator[None]:
    from transformers.modeling_utils import AttentionInterface  # here, as `import gripvlm` must not wait for it

    original = AttentionInterface.get_interface
    AttentionInterface.get_interface = replacement = _with_hooks(original)
    yield
    # If other code has wrapped the replacement, it stays inside that wrapper and passes every call on.
    if AttentionInterface.get_interface is replacement:
        AttentionInterface.get_interface = original


def _with_hooks(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def get_interface(self: Any, implementation: str, default: Callable[..., Any]) -> Callable[..., Any]:
        attend = original(self, implementation, default)

        @functools.wraps(attend)
        def attend_with_hooks(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **options: Any
        ) -> Any:
            # Query, key and value do not change: blocks change attention only through the mask and the bias.
            call = AttentionCall(module, query, key, value, attention_mask, options)
            for block in _acting(module):
                if module in block.attention:
                    block.attention[module](call)
            if call.key_bias is None:
                return attend(module, query, key, value, call.mask, **options)
            return _attend_with_bias(attend, call, value)

        return attend_with_hooks

    return get_interface


HEAD_STEP = 8
"""GPU kernels take heads whose width is a multiple of this."""


def _attend_with_bias(attend: Callable[..., Any], call: AttentionCall, value: Tensor) -> Any:
    """Attention with `call.key_bias` added to its scores.

    As a further feature: 1 in every query, and in each key its bias over the scale of the scores. It costs no mask of
    [B, 1, q, L], and kernels that give masks no gradient give it one.

    Raises:
        UnsupportedModelError: the scores have a soft cap, which would cap the bias too.
    """
    if call.options.get("softcap") is not None:
        raise UnsupportedModelError(
            f"{type(call.module).__name__} caps its scores, so a bias on its keys would be capped as well"
        )
    assert call.key_bias is not None
    query, key, width = call.query, call.key, value.shape[-1]
    scaling = call.options.get("scaling")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    extra = 2 + -(query.shape[-1] + 2) % HEAD_STEP
    bias = call.key_bias.float() / scale
    # In two features: one would be rounded to bfloat16's eight bits.
    coarse = bias.detach().bfloat16().float()
    features = pad(torch.stack((coarse, bias - coarse), -1), (0, extra - 2))[:, None].to(key.dtype)
    ones = pad(query.new_ones(2), (0, extra - 2))
    output, *rest = attend(
        call.module,
        torch.cat((query, ones.expand(*query.shape[:-1], -1)), -1),
        torch.cat((key, features.expand(-1, key.shape[1], -1, -1)), -1),
        pad(value, (0, extra)),  # kernels want one width for all three
        call.mask,
        **call.options | {"scaling": scale},
    )
    return output[..., :width], *rest
