"""What a caller hands to `generate` and is shown token ids: it sees the caller's own prompt, not the shortened one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["FullPrompt"]

_COUNTS = frozenset(
    {"max_length", "min_length", "prompt_length_to_skip", "prompt_ignore_length", "begin_index", "regulation_start"}
)
"""Attributes of transformers' own processors and criteria that count the prompt's tokens."""


class FullPrompt:
    """Puts the caller's prompt in front of the tokens that were decoded.

    Args:
        ids: [B, L] the caller's prompts.
        short: [B, l] the prompts that `generate` runs on.
    """

    def __init__(self, ids: Tensor, short: Tensor) -> None:
        self.prompt, self.short = ids, short

    @property
    def length(self) -> int:
        return self.short.shape[1]

    def ids(self, shown: Tensor) -> Tensor:
        """[R, L + t] for what `generate` shows, [R, length + t]; the R / B rows of a prompt follow one another."""
        front = self.prompt.to(shown.device, shown.dtype).repeat_interleave(shown.shape[0] // self.prompt.shape[0], 0)
        return torch.cat((front, shown[:, self.length :]), dim=-1)

    def begins(self, shown: Tensor) -> bool:
        """Whether rows begin with the shortened prompts."""
        if shown.ndim != 2 or shown.shape[0] % len(self.short) or shown.shape[1] < self.length:
            return False
        short = self.short.to(shown.device, shown.dtype).repeat_interleave(shown.shape[0] // len(self.short), 0)
        return torch.equal(shown[:, : self.length], short)

    def shown_to(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """`generate`'s keyword arguments, with every callback among them shown the full prompt.

        A decoding loop of the caller's own (`custom_generate`) drives the model itself and so sees the shortened
        prompt; the processors and criteria that it is handed see the full one.
        """
        changed = dict(arguments)
        if changed.get("logits_processor"):
            changed["logits_processor"] = self._listed(changed["logits_processor"])
        if changed.get("stopping_criteria"):
            changed["stopping_criteria"] = self._listed(changed["stopping_criteria"])
        if changed.get("prefix_allowed_tokens_fn") is not None:
            changed["prefix_allowed_tokens_fn"] = self._prefix(changed["prefix_allowed_tokens_fn"])
        if changed.get("streamer") is not None:
            changed["streamer"] = _Streamer(changed["streamer"], self)
        return changed

    def _listed(self, given: Any) -> Any:
        return type(given)([self._callback(entry) for entry in given])

    def _callback(self, callback: Any) -> Any:
        """A processor or criterion that is called with the full prompt.

        transformers lets a caller's take the place of its own of the same class. So those keep their class, and what
        they count is less by the tokens that are gone; a prompt's words, which some of them read, are all there.
        """
        if not type(callback).__module__.startswith("transformers.generation."):
            return _Called(callback, self)
        shorter = copy.copy(callback)
        for name in _COUNTS & vars(shorter).keys():
            if isinstance(count := getattr(shorter, name), int):
                setattr(shorter, name, max(0, count - self.prompt.shape[1] + self.length))
        if (allowed := vars(shorter).get("_prefix_allowed_tokens_fn")) is not None:
            shorter._prefix_allowed_tokens_fn = self._prefix(allowed)
        return shorter

    def _prefix(self, allowed: Callable[[int, Tensor], Any]) -> Callable[[int, Tensor], Any]:
        def shown(row: int, ids: Tensor) -> Any:
            prompt = self.prompt[self._sample(row, ids)].to(ids.device, ids.dtype)
            return allowed(row, torch.cat((prompt, ids[self.length :])))

        return shown

    def _sample(self, row: int, ids: Tensor) -> int:
        """Whose tokens these are: `row` numbers prompts or, in older transformers, all sequences of all prompts."""
        rows = [row, *range(len(self.short))]
        same = (i for i in rows if i < len(self.short) and torch.equal(self.short[i], ids[: self.length]))
        return next(same)


class _Called:
    """A logits processor or stopping criterion that is called with the full prompt's ids."""

    def __init__(self, wrapped: Any, full: FullPrompt) -> None:
        self._wrapped, self._full = wrapped, full

    def __call__(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self._wrapped(self._full.ids(input_ids), *args, **kwargs)

    def __getattribute__(self, name: str) -> Any:
        if name == "__call__":  # transformers reads which further arguments it takes
            return object.__getattribute__(self, "_wrapped").__call__
        return object.__getattribute__(self, name)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._wrapped, name)


class _Streamer:
    """A streamer that is first put the full prompt."""

    def __init__(self, wrapped: Any, full: FullPrompt) -> None:
        self._wrapped, self._full, self._began = wrapped, full, False

    def put(self, value: Tensor) -> None:
        if not self._began:
            self._began = True
            value = self._full.ids(value)
        self._wrapped.put(value)

    def end(self) -> None:
        self._wrapped.end()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._wrapped, name)
