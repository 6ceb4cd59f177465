"""A key-value cache that holds a pruned prompt: the state that a further turn needs, and a guard against other uses.

transformers counts the tokens of a further turn against the length of the cache. A pruned cache is shorter than the
caller's ids, so without a translation the turn would silently run at the wrong tokens and positions.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gripvlm.errors import InputError
from gripvlm.models.adapter import PER_TOKEN, encoder_arguments, padding_of
from gripvlm.models.hooks.llm_drop import DropState
from gripvlm.models.hooks.proportional import LayerSizes
from gripvlm.models.text import full_mask, visual_places

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from gripvlm.engine.pipeline import PrunedBatch

__all__ = ["PrunedPrompt", "in_use", "mark", "prompt_in"]


@dataclass(frozen=True, eq=False)
class PrunedPrompt:
    """R prompts of L tokens of which a cache holds l, and the tokens that came after, all of which it holds.

    Attributes:
        ids: [R, T] the tokens that the cache covers, in the caller's unpruned ids, T >= L. The last decoded token is
            among them, though its keys are not in the cache yet.
        full: L.
        order: [R, l] the columns of the prompt that are left.
        short: the prompt's per-token inputs as they are left, each [..., R, l].
        following: [R] or [axes, R], the position of the first token after the prompt.
        selections: of each row's images, for the record.
        held: what layers that dropped tokens hold; None where all layers hold the same.
        sizes: layer -> the sizes of merged tokens, None where all count as one.
        refusal: why no further turn can use this cache; empty if it can.
    """

    ids: Tensor
    full: int
    order: Tensor
    short: Mapping[str, Tensor]
    following: Tensor
    selections: Sequence[Sequence[Any]]
    held: DropState | None = None
    sizes: Mapping[int, LayerSizes | None] | None = None
    refusal: str = ""

    @classmethod
    def of(cls, batch: PrunedBatch, ids: Tensor, refusal: str = "") -> PrunedPrompt:
        """What a cache holds once a batch has run and the caller's tokens [B * r, T] are `ids`."""
        prompts, shortened = batch.prompts.inputs["input_ids"], batch.shortened
        short = {name: batch.arguments[name] for name in PER_TOKEN if isinstance(batch.arguments.get(name), Tensor)}
        positions = short["position_ids"]  # may be one row for all prompts
        short["position_ids"] = positions.expand(*positions.shape[:-2], *short["input_ids"].shape)
        selections = [list(images) for images in batch.selections]
        prompt = cls(prompts, shortened.full, shortened.order, short, shortened.following, selections)
        if (repeat := len(ids) // len(prompts)) > 1:
            prompt = prompt.take(torch.arange(len(prompts)).repeat_interleave(repeat).to(prompts.device))
        held, sizes = (None, None) if batch.run is None else batch.run.held()
        return replace(prompt, ids=ids, held=held, sizes=sizes, refusal=refusal)

    def take(self, rows: Tensor) -> PrunedPrompt:
        """Of these rows [R'], in this order, as the cache's own `batch_select_indices` does."""
        # Positions of M-RoPE are [axes, R, l].
        short = {name: v[:, rows] if v.ndim == 3 else v[rows] for name, v in self.short.items()}
        held = None if self.held is None else self.held.take(rows)
        sizes = None
        if self.sizes is not None:
            sizes = {n: None if s is None else s._replace(sizes=s.sizes[rows]) for n, s in self.sizes.items()}
        return replace(
            self,
            ids=self.ids[rows],
            order=self.order[rows],
            short=short,
            following=self.following[..., rows],
            selections=[self.selections[row] for row in rows.tolist()],
            held=held,
            sizes=sizes,
        )

    def tokens_in(self, cache: Any) -> int:
        """How many of the caller's tokens the cache covers.

        Raises:
            InputError: it was cropped into the prompt, or its rows are not these.
        """
        length = cache.get_seq_length() - self.order.shape[1]
        if length < 0:
            raise InputError(
                f"the cache was cropped to {cache.get_seq_length()} tokens, but a pruned prompt of "
                f"{self.order.shape[1]} began it: pass the full prompt and no cache"
            )
        return self.full + length

    def further_arguments(
        self, model: PreTrainedModel, cache: Any, given: Mapping[str, Any], *, whole: bool
    ) -> dict[str, Any]:
        """The arguments of a further turn as `generate` or `forward` must get them.

        Args:
            cache: holds this prompt.
            given: the caller's arguments; `attention_mask`, where there is one, is of the whole conversation.
            whole: whether `input_ids` are the whole conversation [R, T'], or only its new tokens.

        Raises:
            InputError: the turn is not a continuation of this prompt.
        """
        if self.refusal:
            raise InputError(self.refusal)
        given = {name: value for name, value in given.items() if value is not None}
        ids, count = given["input_ids"], self.tokens_in(cache)
        if ids.shape[0] != self.ids.shape[0]:
            raise InputError(f"the cache holds {self.ids.shape[0]} prompts, but input_ids have {ids.shape[0]}")
        if whole:
            self._check_same(ids, count)
        new = ids[:, count:] if whole else ids
        if new.shape[1] > 1 and bool(visual_places(model, new).any()):  # a loop decodes one by one, and need not wait
            raise InputError(
                "a further picture on a pruned cache is not supported: pass the whole conversation with all its "
                "pictures and no cache, so that each is pruned for this turn"
            )
        mask = self._whole_mask(model, given, count, whole=whole)
        after = mask[:, self.full :].bool()
        short_mask = self.short["attention_mask"].to(mask)
        front = mask[:, : self.full].gather(1, self.order.to(mask.device)) * short_mask
        # Positions follow those of the full prompt, not the cache's length, which is shorter; padding does not count.
        counted = after.long().cumsum(-1) - 1
        later = (self.following[..., None] + counted).masked_fill(~after, 0)
        positions = torch.cat((self.short["position_ids"], later), -1)

        visual = {*encoder_arguments(model, given), "mm_encoder_outputs"}
        arguments = {name: value for name, value in given.items() if name not in visual}
        arguments["attention_mask"] = torch.cat((front, after.to(front)), -1)
        # Beside ids that are new, transformers expects the positions of just these, but the mask of the whole.
        if not whole:
            return {**arguments, "position_ids": positions[..., -new.shape[1] :]}
        arguments["position_ids"] = positions
        for name in PER_TOKEN.keys() & arguments.keys() - {"attention_mask", "position_ids"}:
            value = arguments[name]
            front = value[:, : self.full].gather(1, self.order.to(value.device))
            front = front.masked_fill(~short_mask.bool().to(value.device), padding_of(model, name))
            arguments[name] = torch.cat((front, value[:, self.full :]), -1)
        return arguments

    def _whole_mask(self, model: PreTrainedModel, given: Mapping[str, Any], count: int, *, whole: bool) -> Tensor:
        """[R, T'] the mask of the whole conversation, `count` tokens of which are in the cache."""
        ids, mask = given["input_ids"], given.get("attention_mask")
        if mask is None and whole:
            return full_mask(model, {"input_ids": ids})
        if mask is None:
            return torch.nn.functional.pad(torch.ones_like(ids), (count, 0), value=1)
        expected = (ids.shape[0], ids.shape[1] if whole else count + ids.shape[1])
        if not isinstance(mask, Tensor) or mask.shape != expected:
            raise InputError(
                f"attention_mask has shape {tuple(getattr(mask, 'shape', ()))}, expected {expected}: one entry for "
                "each token of the whole conversation, those in the cache too"
            )
        return mask

    def _check_same(self, ids: Tensor, count: int) -> None:
        if ids.shape[1] <= count:
            raise InputError(
                f"input_ids have {ids.shape[1]} tokens, but the cache already covers {count}: pass the whole "
                "conversation, with something new at its end"
            )
        known = self.ids[:, :count].to(ids.device)  # of a call that was interrupted, not all that it decoded
        differ = (ids[:, : known.shape[1]] != known).nonzero()
        if len(differ):
            row, column = differ[0].tolist()
            raise InputError(
                f"token {column} of sample {row} is {int(ids[row, column])}, but the cache was made with "
                f"{int(self.ids[row, column])} there: append the new turn to what generate returned, or pass the full "
                "prompt and no cache"
            )


# --- the guard -----------------------------------------------------------------------------------------

_cache_in_use: ContextVar[Any] = ContextVar("gripvlm_cache_in_use", default=None)


def mark(cache: Any, prompt: PrunedPrompt) -> None:
    """Stores the prompt in the cache; from now on the cache accepts new keys only inside `in_use`."""
    if not hasattr(cache, "gripvlm_prompt"):
        # A subclass, not a wrapper: transformers tests caches by isinstance, and callers hold on to this very object.
        kind: Any = type(cache)
        cache.__class__ = _guarded(kind)
    cache.gripvlm_prompt = prompt


def prompt_in(cache: Any) -> PrunedPrompt | None:
    """The pruned prompt that a cache holds; None for other caches, and for None."""
    return getattr(cache, "gripvlm_prompt", None)


@contextmanager
def in_use(cache: Any) -> Iterator[None]:
    """Inside the block, and in this thread, a marked cache takes keys: its turn was translated."""
    token = _cache_in_use.set(cache)
    try:
        yield
    finally:
        _cache_in_use.reset(token)


@functools.cache
def _guarded(base: Any) -> type:
    """A subclass of a cache's class that refuses uses with silently wrong results; it has the name of its base."""

    def update(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Every layer comes by here first, so nothing has been written yet.
        if _cache_in_use.get() is not self:
            images = [image for sample in self.gripvlm_prompt.selections for image in sample]
            kept, total = sum(image.k for image in images), sum(image.n for image in images)
            raise InputError(
                f"this cache holds {kept} of a prompt's {total} visual tokens, so a further turn must be translated: "
                "use it inside `with gripvlm.prune(...)` for this model, or pass the full prompt and no cache"
            )
        return base.update(self, *args, **kwargs)

    def reorder_cache(self: Any, beam_idx: Tensor) -> None:
        base.reorder_cache(self, beam_idx)
        self.gripvlm_prompt = self.gripvlm_prompt.take(beam_idx)

    def reset(self: Any) -> None:
        base.reset(self)
        # An empty cache may be used without gripvlm again.
        del self.gripvlm_prompt
        self.__class__ = base

    def batch_select_indices(self: Any, indices: Tensor) -> None:
        base.batch_select_indices(self, indices)
        self.gripvlm_prompt = self.gripvlm_prompt.take(indices)

    def batch_repeat_interleave(self: Any, repeats: int) -> None:
        base.batch_repeat_interleave(self, repeats)
        rows = torch.arange(len(self.gripvlm_prompt.ids)).repeat_interleave(repeats)
        self.gripvlm_prompt = self.gripvlm_prompt.take(rows.to(self.gripvlm_prompt.ids.device))

    # copy and pickle find a class by its name in its module, where this one is not.
    def reduce(self: Any) -> tuple[Any, ...]:
        return _restored, (base,), vars(self)

    methods = {
        "update": update,
        "reset": reset,
        "reorder_cache": reorder_cache,
        "batch_select_indices": batch_select_indices,
        "batch_repeat_interleave": batch_repeat_interleave,
        "__reduce__": reduce,
        "__module__": base.__module__,
        "__doc__": base.__doc__,
    }
    return type(base.__name__, (base,), methods)


def _restored(base: Any) -> Any:
    """An empty guarded cache, for copies and pickles."""
    return object.__new__(_guarded(base))
