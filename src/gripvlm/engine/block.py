"""`PruneBlock`: a block in which a model's own `generate` and `forward` prune."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gripvlm.engine.generate import FullPrompt, Options
from gripvlm.engine.input_checks import checked_imageless, has_pixels
from gripvlm.engine.pipeline import PrunedBatch, prune_batch
from gripvlm.engine.pruned_cache import PrunedPrompt, in_use, mark, prompt_in
from gripvlm.engine.record import Record
from gripvlm.engine.request import PruneRequest
from gripvlm.engine.switch import Call, Switch, inside
from gripvlm.errors import InputError
from gripvlm.models.compat import cache_in, cache_of
from gripvlm.models.hooks.llm_drop import drop_in_layers
from gripvlm.models.hooks.proportional import proportional_attention
from gripvlm.models.wrapped import device_of
from gripvlm.pruners import LLMPruner
from gripvlm.utils.timing import Stopwatch

__all__ = ["PruneBlock"]

logger = logging.getLogger(__name__)


class PruneBlock:
    """What `gripvlm.prune` returns, to be entered with `with`."""

    def __init__(self, request: PruneRequest) -> None:
        self._request, self._model, self._record = request, request.model, Record()
        self._entered = False

    def __enter__(self) -> Record:
        self._entered = True
        self._switch = Switch.opened(self._model, self)
        return self._record

    def __exit__(self, *_: object) -> None:
        self._switch.close(self)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"gripvlm.prune(...) is a block and has no {name!r}: use `with gripvlm.prune(model, ...) as record:` and "
            "call the model inside"
        )

    def __del__(self) -> None:
        # By vars(): where __init__ was not reached, there is no such attribute, and __getattr__ would raise.
        if not vars(self).get("_entered", True):
            logger.warning(
                "gripvlm.prune(...) was called but not entered, so nothing was pruned: use `with gripvlm.prune(...):`"
            )

    # --- generate ---------------------------------------------------------------------------------

    def run_generate(self, original: Callable[..., Any], inputs: Any, kwargs: dict[str, Any]) -> Any:
        """One call of the model's `generate` by the caller."""
        if isinstance(inputs, Mapping):
            raise InputError("generate was given a dict as its first argument: use model.generate(**inputs)")
        if inputs is not None:
            if kwargs.get("input_ids") is not None:
                raise InputError("generate was given token ids twice, by place and as input_ids: pass one of them")
            kwargs["input_ids"] = inputs
        with _rope_deltas_restored(self._model):
            if (prompt := prompt_in(cache_in(kwargs))) is not None:
                return self._generate_further(prompt, original, kwargs)
            if has_pixels(kwargs):
                return self._generate(original, kwargs)
        self._record_imageless(kwargs)
        with inside(Call(self._model)):
            return original(None, **kwargs)

    def _generate(self, original: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
        """From a prompt with images."""
        request, options, cache = self._request, Options(self._model, kwargs), cache_in(kwargs)
        options.refuse(request.family, inside=isinstance(request.pruner, LLMPruner) or request.proportional_attention)
        # Without a cache a full mask and positions with gaps would be read as packed sequences: see DropOptions.
        if options.get("use_cache") is False:
            request = replace(request, drop=request.drop._replace(spare_column=True))
        # As `generate` does around its own encoder; a `forward` keeps the graph.
        with torch.no_grad():
            batch = self._prune(request, kwargs)
        options.check_beams(request.family, batch)
        if options.get("do_sample"):  # sampling from NaN crashes an accelerator before the check could explain it
            batch.checks.raise_if_failed()
        full = FullPrompt(batch.prompts.inputs["input_ids"], batch.arguments["input_ids"])
        arguments = full.shown_to_callbacks(options.shifted(batch.arguments, full.prompt.shape[1]))
        with self._running(batch, cache):
            output = original(None, **arguments)
        refusal = ""
        if (options.get("num_beams") or 1) > 1:
            refusal = "a cache that beam search left serves no further turn: pass the full prompt and no cache"
        output, ids = full.in_front(output)
        _mark(cache if cache is not None else cache_of(output), batch, ids, refusal)
        return output

    def _generate_further(self, prompt: PrunedPrompt, original: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
        """From a cache that holds a pruned prompt."""
        options, cache = Options(self._model, kwargs), cache_in(kwargs)
        options.refuse(self._request.family, inside=prompt.held is not None or prompt.sizes is not None)
        ids, mask = _further_ids(kwargs), kwargs.get("attention_mask")
        # transformers takes both forms: all ids, or the new ones with a mask of the whole.
        whole = not isinstance(mask, Tensor) or mask.shape[1] == ids.shape[1]
        count = prompt.tokens_in(cache)
        arguments = prompt.further_arguments(self._model, cache, kwargs, whole=whole)
        full = FullPrompt(ids, arguments["input_ids"])
        arguments = full.shown_to_callbacks(options.shifted(arguments, ids.shape[1]))
        with self._running_further(prompt, cache):
            output = original(None, **arguments)
        output, ids = full.in_front(output)
        if not whole:
            ids = torch.cat((prompt.ids[:, :count].to(ids.device), ids), -1)
        mark(cache, replace(prompt, ids=ids))
        return output

    # --- forward ----------------------------------------------------------------------------------

    def run_forward(self, original: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
        """One call of the model itself by the caller."""
        cache = cache_in(kwargs)
        with _rope_deltas_restored(self._model):
            if (prompt := prompt_in(cache)) is not None:
                return self._forward_further(prompt, original, kwargs)
            if has_pixels(kwargs):
                return self._forward(original, kwargs)
        if cache is None or cache.get_seq_length() == 0:  # else a further step of a prompt that was not pruned
            self._record_imageless(kwargs)
        return original(**kwargs)

    def _forward(self, original: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
        """Of a prompt with images."""
        cache = cache_in(kwargs)
        batch = self._prune(self._request, kwargs)
        with self._running(batch, cache):
            output = original(**batch.arguments)
        _mark(cache if cache is not None else cache_of(output), batch, batch.prompts.inputs["input_ids"])
        return output

    def _forward_further(self, prompt: PrunedPrompt, original: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
        """Of further tokens on a cache that holds a pruned prompt."""
        cache = cache_in(kwargs)
        new, count = _further_ids(kwargs), prompt.tokens_in(cache)
        arguments = prompt.further_arguments(self._model, cache, kwargs, whole=False)
        # A caller's own decoding loop may count by itself; `prune_inputs` says from where.
        if kwargs.get("position_ids") is not None:
            arguments["position_ids"] = kwargs["position_ids"]
        with self._running_further(prompt, cache):
            output = original(**arguments)
        ids = torch.cat((prompt.ids[:, :count], new.to(prompt.ids)), -1)
        mark(cache, replace(prompt, ids=ids))
        return output

    # --- both -------------------------------------------------------------------------------------

    def _prune(self, request: PruneRequest, kwargs: Mapping[str, Any]) -> PrunedBatch:
        batch = prune_batch(request, kwargs)
        self._record.add(batch.selections, batch.watch)
        return batch

    def _record_imageless(self, kwargs: Mapping[str, Any]) -> None:
        """Records a call without any image; refuses one that hides an image."""
        checked_imageless(self._model, kwargs)
        ids = kwargs.get("input_ids")
        rows = ids.shape[0] if isinstance(ids, Tensor) else 0
        self._record.add([[] for _ in range(rows)], Stopwatch(device_of(self._model)))

    @contextmanager
    def _running(self, batch: PrunedBatch, cache: Any) -> Iterator[None]:
        """Around the model's own run of a pruned prompt; a cache of the caller's is marked however that ends."""
        call = Call(self._model, batch.arguments["input_ids"].shape[1], batch.shortened.ahead)
        try:
            with inside(call), batch.running():
                yield
        except BaseException:
            # For example Ctrl-C in a streamer: a further turn may follow the tokens that were decoded by then.
            refusal = (
                "the call that began this cache ended before its prompt had run: pass the full prompt and no cache"
            )
            _mark(cache, batch, batch.prompts.inputs["input_ids"], "" if call.prefilled else refusal)
            raise
        self._record.selections = batch.selections

    @contextmanager
    def _running_further(self, prompt: PrunedPrompt, cache: Any) -> Iterator[None]:
        """Around a further run on a pruned cache: each layer gets the mask for the tokens that it holds."""
        self._record.add([list(images) for images in prompt.selections], Stopwatch(device_of(self._model)))
        with inside(Call(self._model)), in_use(cache), ExitStack() as stack:
            if prompt.held is not None:
                stack.enter_context(drop_in_layers(self._model, {}, held=prompt.held))
            if prompt.sizes is not None:
                stack.enter_context(proportional_attention(self._model, None, prompt.sizes))
            yield


def _further_ids(kwargs: Mapping[str, Any]) -> Tensor:
    ids = kwargs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        raise InputError("a further turn on a pruned cache needs input_ids [B, L], a tensor of token ids")
    return ids


def _mark(cache: Any, batch: PrunedBatch, ids: Tensor, refusal: str = "") -> None:
    """Stores in the cache which tokens of a pruned batch it holds; `ids` are all tokens that it covers."""
    # If nothing was dropped, the cache is the one of the unpruned model.
    if cache is not None and cache.get_seq_length() > 0 and not batch.untouched:
        mark(cache, PrunedPrompt.of(batch, ids, refusal))


@contextmanager
def _rope_deltas_restored(model: Any) -> Iterator[None]:
    """Leaves the model's `rope_deltas` as they were."""
    # M-RoPE models store the offset of a prompt's positions. Those of a pruned prompt are passed as position_ids;
    # what the model noted of an earlier, unpruned prompt stays for the further turns of that one.
    root = model.base_model
    before = getattr(root, "rope_deltas", None)
    try:
        yield
    finally:
        if hasattr(root, "rope_deltas"):
            root.rope_deltas = before
