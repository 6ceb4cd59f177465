"""`prune`: a block in which a model's own `generate` and `forward` prune."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gripvlm.engine import generate as decoding
from gripvlm.engine.callbacks import FullPrompt
from gripvlm.engine.outputs import DeferredChecks
from gripvlm.engine.pipeline import Pruned, Record, pruned
from gripvlm.engine.pruned_cache import PrunedPrompt, mark, prompt_in, used
from gripvlm.engine.request import (
    ENCODED,
    PIXELS,
    Keeps,
    checked_imageless,
    checked_inputs,
    checked_merging,
    checked_multiple,
    checked_positions,
    checked_pruner,
    one_budget,
)
from gripvlm.engine.switch import Call, Switch, inside
from gripvlm.errors import GripError, InputError
from gripvlm.models.adapter import PER_TOKEN
from gripvlm.models.compat import cache_in, cache_of
from gripvlm.models.families import family_of
from gripvlm.models.hooks.llm_drop import drop_in_layers
from gripvlm.models.hooks.proportional import checked_sizes, proportional_attention
from gripvlm.models.text import Question
from gripvlm.models.wrapped import device_of, unwrapped
from gripvlm.pruners import LLMPruner, Pruner, TowerPruner
from gripvlm.utils.timing import Stopwatch

__all__ = ["PruneBlock", "prune"]

logger = logging.getLogger(__name__)


def prune(
    model: Any,
    pruner: str | Pruner,
    keep: Keeps = None,
    *,
    positions: str = "original",
    question: Question = None,
    proportional_attention: bool = False,
    pad_to_multiple_of: int | None = None,
) -> PruneBlock:
    """Inside the block, `model.generate` and `model(...)` prune; the code that calls them stays as it is.

        with gripvlm.prune(model, "divprune", keep=64) as record:
            ids = model.generate(**inputs, max_new_tokens=32)

    Args: as for `prune_inputs`, and
        proportional_attention: every query of the language model attends to a token that a merge made of m tokens
            as if m were there, log m added to its scores (ToMe, arXiv 2210.09461, eq. 1), in the prompt and
            in decoding. m is how many tokens it absorbed (`gripvlm.pruners.sizes_after`), whatever their
            weights. Exact where the m tokens are equal and see one another; where images are causal, they
            would not, and it is as if they did. Without merges nothing changes.

    Returns:
        A block, which yields a `Record` of the latest call.

    `generate`: what it returns has the *original* prompt ids in front; whatever it is handed and is shown ids
    (stopping criteria, logits processors, streamers) sees them too; `max_length` and `min_length` count them. A call
    without any image passes through untouched, with empty selections.

    A further turn on the cache of a call (`return_dict_in_generate=True`, or a cache of the caller's own) goes on from
    the tokens that were kept: pass the whole conversation's ids, or the new ones with a mask of the whole. Outside of
    any block such a cache refuses to be used.

    `model(**inputs)`: logits are those of the tokens that are left, `labels` lose the entries of dropped placeholders,
    and gradients flow. `model(input_ids=new, past_key_values=cache)` goes on from a pruned cache.

    Only this object's `generate` and `forward` are replaced, and they are as before when the last block for the model
    ends, however it ends. Threads may each open a block of their own for one model; a thread without one uses the only
    block that is open, and is refused where there are several.

    Raises:
        GripError: a block for this model is already open in this thread, or what `prune_inputs` raises; with
            `proportional_attention`, an `UnsupportedModelError` where a bias for each key cannot be carried, and an
            `InputError` for a static cache.
    """
    model = unwrapped(model)
    return PruneBlock(
        model, checked_pruner(pruner, model), keep, positions, question, proportional_attention, pad_to_multiple_of
    )


def _positions_as_before(method: Callable[..., Any]) -> Callable[..., Any]:
    """M-RoPE models note of each prompt how far its positions run ahead. A pruned prompt's are passed by name, so that
    what the model noted of an earlier, unpruned one stays, for whoever goes on from that.
    """

    @functools.wraps(method)
    def kept(self: PruneBlock, *args: Any) -> Any:
        root = self._model.base_model
        before = getattr(root, "rope_deltas", None)
        try:
            return method(self, *args)
        finally:
            if hasattr(root, "rope_deltas"):
                root.rope_deltas = before

    return kept


class _NotABlock(GripError, AttributeError):
    """A `PruneBlock` was used as if it were the model or the record; `hasattr` must still work on it."""


class PruneBlock:
    """What `prune` returns; to be entered with `with`."""

    def __init__(
        self,
        model: Any,
        pruner: Pruner,
        keep: Keeps,
        positions: str,
        question: Question,
        proportional_attention: bool,
        pad_to_multiple_of: int | None,
    ) -> None:
        self._entered = True  # until all is checked, so that a failure here warns of nothing
        self._family = family_of(model)
        checked_positions(positions)
        checked_multiple(pad_to_multiple_of)
        if isinstance(pruner, TowerPruner):
            checked_merging(model, self._family, pruner, keep)
        if proportional_attention:
            checked_sizes(model)
        if not isinstance(keep, (list, tuple)):
            one_budget(pruner, keep)
        self._model, self._pruner, self._keep = model, pruner, keep
        self._options = (positions, question)
        self._sized, self._multiple = proportional_attention, pad_to_multiple_of
        self._record = Record()
        self._entered = False

    def __enter__(self) -> Record:
        self._entered = True
        self._switch = Switch.opened(self._model, self)
        return self._record

    def __exit__(self, *_: object) -> None:
        self._switch.close(self)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise _NotABlock(
            f"gripvlm.prune(...) is a block and has no {name!r}: type `with gripvlm.prune(model, ...) as record:` and "
            "call the model inside"
        )

    def __del__(self) -> None:
        if not vars(self).get("_entered", True):
            logger.warning(
                "gripvlm.prune(...) was called but not entered, so nothing was pruned: type `with gripvlm.prune(...):`"
            )

    # --- generate ---------------------------------------------------------------------------------

    def run_generate(self, original: Callable[..., Any], inputs: Any, kwargs: dict[str, Any]) -> Any:
        """One call of the model's `generate` by the caller."""
        if isinstance(inputs, Mapping):
            raise InputError("generate was given a dict as its first argument: type model.generate(**inputs)")
        if inputs is not None:
            if kwargs.get("input_ids") is not None:
                raise InputError("generate was given token ids twice, by place and as input_ids: pass one of them")
            kwargs["input_ids"] = inputs
        cache = cache_in(kwargs)
        if (prompt := prompt_in(cache)) is not None:
            return self._generate_on(prompt, cache, original, kwargs)
        if any(kwargs.get(name) is not None for name in PIXELS):
            return self._generate(cache, original, kwargs)
        self._imageless(kwargs)
        with inside(Call(self._model)):
            return original(None, **kwargs)

    @_positions_as_before
    def _generate(self, cache: Any, original: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
        """From a prompt with images."""
        options = decoding.Options(self._model, kwargs)
        options.refuse(self._family, isinstance(self._pruner, LLMPruner) or self._sized)
        with torch.no_grad():
            given, now = self._pruned(kwargs, options.uncached)
        options.check_beams(self._family, now.arguments, now.record.selections)
        if options.get("do_sample"):  # sampling from NaN takes an accelerator down before anyone can say why
            now.record.deferred.settle()
        full = FullPrompt(given["input_ids"], now.arguments["input_ids"])
        arguments = full.shown_to(options.shifted(now.arguments, full.prompt.shape[1]))
        with now.record.deferred.at_the_end(), self._running(now, cache, given):
            output = original(None, **arguments)
        refusal = ""
        if (options.get("num_beams") or 1) > 1:
            refusal = "a cache that beam search left cannot be gone on from: pass the full prompt and no cache"
        output, ids = decoding.with_prompt(output, full)
        self._mark(cache if cache is not None else cache_of(output), now, given, ids, refusal)
        return output

    @_positions_as_before
    def _generate_on(
        self, prompt: PrunedPrompt, cache: Any, original: Callable[..., Any], kwargs: dict[str, Any]
    ) -> Any:
        """From a cache that holds a pruned prompt."""
        options = decoding.Options(self._model, kwargs)
        options.refuse(self._family, prompt.held is not None or prompt.sizes is not None)
        given = {name: value for name, value in kwargs.items() if value is not None}
        ids, mask = given.get("input_ids"), given.get("attention_mask")
        if not isinstance(ids, Tensor) or ids.ndim != 2:
            raise InputError("a further turn needs input_ids [B, L], a tensor of token ids")
        whole = not isinstance(mask, Tensor) or mask.shape[1] == ids.shape[1]
        have = prompt.tokens_in(cache)
        arguments = prompt.further(self._model, cache, given, whole)
        full = FullPrompt(ids, arguments["input_ids"])
        arguments = full.shown_to(options.shifted(arguments, ids.shape[1]))
        with self._resumed(prompt, cache):
            output = original(None, **arguments)
        output, ids = decoding.with_prompt(output, full)
        if not whole:
            ids = torch.cat((prompt.ids[:, :have].to(ids.device), ids), -1)
        mark(cache, replace(prompt, ids=ids))
        return output

    # --- forward ----------------------------------------------------------------------------------

    def run_forward(self, original: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
        """One call of the model itself by the caller."""
        cache = cache_in(kwargs)
        if (prompt := prompt_in(cache)) is not None:
            return self._forward_on(prompt, cache, original, kwargs)
        if any(kwargs.get(name) is not None for name in PIXELS):
            return self._forward(cache, original, kwargs)
        if cache is None or cache.get_seq_length() == 0:  # else a further step of a prompt that was not pruned
            self._imageless(kwargs)
        return original(**kwargs)

    @_positions_as_before
    def _forward(self, cache: Any, original: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
        """Of a prompt with images."""
        given, now = self._pruned(kwargs, uncached=False)
        with now.record.deferred.at_the_end(), self._running(now, cache, given):
            output = original(**now.arguments)
        self._mark(cache if cache is not None else cache_of(output), now, given, given["input_ids"], "")
        return output

    @_positions_as_before
    def _forward_on(
        self, prompt: PrunedPrompt, cache: Any, original: Callable[..., Any], kwargs: dict[str, Any]
    ) -> Any:
        """Of further tokens on a cache that holds a pruned prompt."""
        have = prompt.tokens_in(cache)
        given = {name: value for name, value in kwargs.items() if value is not None}
        if not isinstance(given.get("input_ids"), Tensor):
            raise InputError("a further step on a pruned cache needs input_ids, a tensor of token ids")
        arguments = prompt.further(self._model, cache, given, whole=False)
        if given.get("position_ids") is not None:
            arguments["position_ids"] = given["position_ids"]
        with self._resumed(prompt, cache):
            output = original(**arguments)
        mark(cache, replace(prompt, ids=torch.cat((prompt.ids[:, :have], given["input_ids"].to(prompt.ids)), -1)))
        return output

    # --- both -------------------------------------------------------------------------------------

    def _pruned(self, kwargs: Mapping[str, Any], uncached: bool) -> tuple[dict[str, Any], Pruned]:
        given = checked_inputs(self._model, self._family, kwargs, None)
        now = pruned(
            self._model,
            self._family,
            given,
            self._pruner,
            self._keep,
            *self._options,
            None,
            uncached,
            self._sized,
            self._multiple,
        )
        self._noted(now.record.selections, now.record.watch, now.record.deferred)
        return given, now

    def _noted(self, selections: Any, watch: Stopwatch | None, deferred: DeferredChecks) -> None:
        record = self._record
        record.selections, record.watch, record.deferred = selections, watch, deferred
        record.calls += 1

    def _imageless(self, kwargs: Mapping[str, Any]) -> None:
        """Notes a call without any image; refuses what hides one."""
        for name in ENCODED:
            if kwargs.get(name) is not None:
                raise InputError(
                    f"{name} do not say where images are, so this call would run unpruned: pass input_ids and "
                    "pixel_values, or leave the gripvlm.prune block"
                )
        checked_imageless(self._model, kwargs)
        ids = kwargs.get("input_ids")
        rows = ids.shape[0] if isinstance(ids, Tensor) else 0
        self._noted([[] for _ in range(rows)], Stopwatch(device_of(self._model)), DeferredChecks())

    @contextmanager
    def _running(self, now: Pruned, cache: Any, given: Mapping[str, Any]) -> Iterator[None]:
        """Around the model's own run of a pruned prompt; a cache of the caller's is marked however that ends."""
        call = Call(self._model, now.arguments["input_ids"].shape[1], now.shortened.ahead)
        try:
            with inside(call), nullcontext() if now.run is None else now.run.block():
                yield
        except BaseException:
            refusal = "" if call.prefilled else "the call that began this cache ended before its prompt had run"
            self._mark(
                cache, now, given, given["input_ids"], refusal and f"{refusal}: pass the full prompt and no cache"
            )
            raise
        if now.run is not None:
            self._record.selections = now.record.selections = now.run.selections()

    @contextmanager
    def _resumed(self, prompt: PrunedPrompt, cache: Any) -> Iterator[None]:
        """Around a further run on a pruned cache: its layers are shown what they hold."""
        self._noted([list(sample) for sample in prompt.selections], Stopwatch(device_of(self._model)), DeferredChecks())
        with inside(Call(self._model)), used(cache), ExitStack() as stack:
            if prompt.held is not None:
                stack.enter_context(drop_in_layers(self._model, {}, contents=prompt.held))
            if prompt.sizes is not None:
                stack.enter_context(proportional_attention(self._model, None, prompt.sizes))
            yield

    def _mark(self, cache: Any, now: Pruned, given: Mapping[str, Any], ids: Tensor, refusal: str) -> None:
        """Notes in the cache what it holds of a pruned prompt, `ids` being all that it stands for."""
        if cache is None or cache.get_seq_length() == 0:
            return
        prompts, shortened = given["input_ids"], now.shortened
        if now.run is None and shortened.order.shape[1] == shortened.full == prompts.shape[1] and not now.dropped:
            return  # it is what the untouched model would have made
        short = {name: now.arguments[name] for name in PER_TOKEN if isinstance(now.arguments.get(name), Tensor)}
        positions = short["position_ids"]
        short["position_ids"] = positions.expand(*positions.shape[:-2], *short["input_ids"].shape)
        selections = [list(sample) for sample in now.record.selections]
        prompt = PrunedPrompt(prompts, shortened.full, shortened.order, short, shortened.following, selections)
        if (repeat := max(1, len(ids) // len(prompts))) > 1:
            prompt = prompt.take(torch.arange(len(prompts)).repeat_interleave(repeat).to(prompts.device))
        held, sizes = (None, None) if now.run is None else now.run.held()
        mark(cache, replace(prompt, ids=ids, held=held, sizes=sizes, refusal=refusal))
