"""Finds the block that a call belongs to: replaces `model.generate` and `model.forward` while blocks are open."""

from __future__ import annotations

import copy
import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gripvlm.errors import GripError
from gripvlm.models.compat import cache_in

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from gripvlm.engine.block import PruneBlock

__all__ = ["Call", "Switch", "inside"]


_own_blocks: ContextVar[tuple[PruneBlock, ...]] = ContextVar("gripvlm_blocks", default=())
_call: ContextVar[Call | None] = ContextVar("gripvlm_call", default=None)
_lock = threading.RLock()


@dataclass(eq=False)
class Call:
    """A run of `model` that gripvlm has prepared: calls inside it are not pruned again.

    Attributes:
        length: of the prompts that it runs on.
        ahead: [B] or [axes, B], added to the positions of later tokens; see `drop.Shortened`.
        prefilled: whether a forward has ended, so that the cache holds the whole prompt.
    """

    model: PreTrainedModel
    length: int = 0
    ahead: Tensor | None = None
    prefilled: bool = False

    def forward(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One forward inside the run."""
        output = original(*args, **self._with_positions_ahead(kwargs))
        self.prefilled = True
        return output

    def _with_positions_ahead(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of one forward, with later tokens at their positions after the full prompt.

        `generate` counts on from the last position that it is given, which is too low where the prompt's last row
        was dropped.
        """
        positions = kwargs.get("position_ids")
        if self.ahead is None or positions is None:
            return kwargs
        cache = cache_in(kwargs)
        past = 0 if cache is None else int(cache.get_seq_length())
        later = torch.arange(past, past + positions.shape[-1], device=positions.device) >= self.length
        ahead = self.ahead.repeat_interleave(positions.shape[-2] // self.ahead.shape[-1], -1)
        return {**kwargs, "position_ids": positions + ahead[..., None].to(positions.device) * later}


@contextmanager
def inside(call: Call) -> Iterator[None]:
    token = _call.set(call)
    try:
        yield
    finally:
        _call.reset(token)


class Switch:
    """The blocks that are open for one model, in any thread, and the replacements of its methods."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.blocks: list[PruneBlock] = []
        self.before = {name: vars(model).get(name) for name in ("generate", "forward")}
        self.entries = {name: _Entry(self, name, getattr(model, name)) for name in self.before}

    @classmethod
    def opened(cls, model: PreTrainedModel, block: PruneBlock) -> Switch:
        """The model's own where a block is open already, else a new one; this block is open in it from now on."""
        with _lock:  # of two threads at once, the first makes it and the second finds it
            # A copy of the model carries entries too, whose switch is the original's.
            entries = (vars(model).get(name) for name in ("generate", "forward"))
            known = (entry.switch for entry in entries if isinstance(entry, _Entry) and entry.switch.model is model)
            switch = next(known, None) or cls(model)
            if any(own in switch.blocks for own in _own_blocks.get()):
                raise GripError(
                    "this model is already inside a gripvlm.prune block: leave that block first, or prune another model"
                )
            if not switch.blocks:
                # On the object, not on its class: other models of that class stay as they are.
                for name, entry in switch.entries.items():
                    setattr(model, name, entry)
            switch.blocks.append(block)
            _own_blocks.set((*_own_blocks.get(), block))
        return switch

    def close(self, block: PruneBlock) -> None:
        with _lock:
            _own_blocks.set(tuple(own for own in _own_blocks.get() if own is not block))
            self.blocks.remove(block)
            if self.blocks:
                return
            for name, entry in self.entries.items():
                if vars(self.model).get(name) is not entry:
                    continue  # the caller wrapped our replacement; the wrapper now leads to the original
                # Usually the method is the class's, and the object had no attribute of that name.
                if self.before[name] is None:
                    delattr(self.model, name)
                else:
                    setattr(self.model, name, self.before[name])

    def block_of_caller(self) -> PruneBlock | None:
        """The block of this thread, or the only one there is."""
        # The innermost first: blocks of several models may be nested.
        for block in reversed(_own_blocks.get()):
            if block in self.blocks:
                return block
        if len(self.blocks) > 1:
            raise GripError(
                f"{len(self.blocks)} gripvlm.prune blocks are open for this model in other threads, none in this one: "
                "use `with gripvlm.prune(...):` in this thread too"
            )
        return self.blocks[0] if self.blocks else None


class _Entry:
    """Stands for `model.generate` or `model.forward` while a block is open."""

    def __init__(self, switch: Switch, name: str, original: Callable[..., Any]) -> None:
        functools.update_wrapper(self, original)
        self.switch, self.name, self.original = switch, name, original
        parameters = inspect.signature(original).parameters.values()
        self.parameters = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]

    # What a block does reads context variables and sets hooks, which a traced graph would not do again.
    @torch.compiler.disable
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = _call.get()
        # `generate` calls `forward`, here on a prompt that is shortened already.
        if call is not None and call.model is self.switch.model:
            if self.name == "forward":
                return call.forward(self.original, args, kwargs)
            return self.original(*args, **kwargs)
        if (block := self.switch.block_of_caller()) is None:
            return self.original(*args, **kwargs)
        # By name from here on: `generate` and every `forward` have orders of their own.
        kwargs.update(zip(self.parameters, args, strict=False))
        if self.name == "forward":
            return block.run_forward(self.original, kwargs)
        return block.run_generate(self.original, kwargs.pop("inputs", None), kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy of the model gets its own method: it is in no block."""
        return copy.deepcopy(self.original, memo)

    def __reduce__(self) -> Any:
        return self.original.__reduce__()
