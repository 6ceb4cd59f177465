"""What a caller hands to `generate`, in terms of the shortened prompt: options, lengths, callbacks, ids in front."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gripvlm.errors import InputError
from gripvlm.models.compat import installed
from gripvlm.models.families import Family, chunkable

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from gripvlm.engine.pipeline import PrunedBatch

__all__ = ["CHUNKS_SINCE", "FullPrompt", "Options"]

CHUNKS_SINCE = (5, 23)
"""The first transformers that cuts encoded images into prefill chunks."""

_COUNTS = frozenset(
    {"max_length", "min_length", "prompt_length_to_skip", "prompt_ignore_length", "begin_index", "regulation_start"}
)
"""Attributes of transformers' own processors and criteria that count the prompt's tokens."""


class Options:
    """The options of one `generate` call, wherever they were given.

    transformers reads an option from the call's keywords, else from the call's `generation_config`, else from the
    model's.
    """

    def __init__(self, model: PreTrainedModel, kwargs: Mapping[str, Any]) -> None:
        self.model = model
        self.kwargs = kwargs
        self.config = kwargs.get("generation_config")
        self.model_config = getattr(model, "generation_config", None)

    def get(self, name: str) -> Any:
        """The option's value, None if it is not set."""
        for value in (self.kwargs.get(name), getattr(self.config, name, None)):
            if value is not None:
                return value
        return getattr(self.model_config, name, None)

    def refuse(self, family: Family, *, inside: bool) -> None:
        """Raises for ways of decoding that are not right with fewer tokens, or not even with all.

        `inside` says whether something is done inside the language model while it runs.
        """
        for name in ("assistant_model", "prompt_lookup_num_tokens"):
            if self.get(name) is not None:
                raise InputError(f"{name}: speculative decoding is not supported with pruning; leave it out")
        if inside and self.get("guidance_scale") not in (None, 1):
            raise InputError(
                "guidance_scale runs a second prompt through the model beside the first, and a pruner that drops "
                "inside the language model (or proportional_attention) cannot tell them apart: leave it out, or use a "
                "pruner that drops at the input"
            )
        if self.get("prefill_chunk_size") is None:
            return
        if inside:
            raise InputError(
                "prefill_chunk_size: a pruner that drops inside the language model must see the whole prompt at "
                "once; leave it out, or use a pruner that drops at the input"
            )
        if installed() < CHUNKS_SINCE:
            raise InputError(
                "prefill_chunk_size: transformers before 5.23 does not cut encoded images into chunks; leave it "
                "out, or pip install -U transformers"
            )
        if not chunkable(family, self.model):
            raise InputError(
                f"prefill_chunk_size: {family.model_type} images attend in both directions, which transformers "
                "cannot prefill in chunks; leave it out"
            )

    def check_beams(self, family: Family, batch: PrunedBatch) -> None:
        """Raises where transformers would mix images up: beams over unequal counts, or over several images."""
        if max(self.get("num_beams") or 1, self.get("num_return_sequences") or 1) == 1:
            return
        if not family.beams and any(len(images) > 1 for images in batch.selections):
            raise InputError(
                f"beams and several returned sequences are wrong in transformers itself for "
                f"{family.model_type} prompts with more than one image: decode greedily or sample one "
                "sequence, or repeat the prompt in the batch"
            )
        outputs = batch.arguments["mm_encoder_outputs"].values()
        one_tensor = any(isinstance(output.pooler_output, Tensor) for output in outputs)
        counts = {selection.k for images in batch.selections for selection in images}
        if one_tensor and len(batch.selections) > 1 and len(counts) > 1:
            raise InputError(
                f"beams or several returned sequences need the same count in every image for this "
                f"model, got {sorted(counts)}: use an int keep=, or a batch of one"
            )

    def shifted(self, arguments: dict[str, Any], full: int) -> dict[str, Any]:
        """The call's arguments with `max_length` and `min_length` less the tokens dropped.

        The caller counts the prompt's `full` tokens, `generate` sees fewer.
        """
        fewer = full - arguments["input_ids"].shape[1]
        if not fewer:
            return arguments
        for name, newer in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
            value = self.get(name)
            if value is None or self.get(newer) is not None or (name == "min_length" and not value):
                continue
            # Set where it was found: transformers warns of an option that stands beside a generation_config.
            if arguments.get(name) is not None or getattr(self.config, name, None) is None:
                arguments[name] = value - fewer
                continue
            self.config = copy.deepcopy(self.config)  # the caller's object stays as it is
            setattr(self.config, name, value - fewer)
            arguments["generation_config"] = self.config
        return arguments


class FullPrompt:
    """Puts the caller's prompt in front of the tokens that were decoded.

    Args:
        ids: [B, L] the caller's prompts.
        short: [B, l] the prompts that `generate` runs on.
    """

    def __init__(self, ids: Tensor, short: Tensor) -> None:
        self.prompt, self.short, self.length = ids, short, short.shape[1]

    def ids(self, shown: Tensor) -> Tensor:
        """[R, L + t] for what `generate` shows, [R, l + t]; the R / B rows of a prompt follow one another."""
        front = self.prompt.to(shown.device, shown.dtype).repeat_interleave(shown.shape[0] // self.prompt.shape[0], 0)
        return torch.cat((front, shown[:, self.length :]), dim=-1)

    def in_front(self, output: Any) -> tuple[Any, Tensor]:
        """What `generate` returned with the caller's own prompts in front; and its ids, or the prompts if it has none.

        What a decoding loop of the caller's own returns is left as it is unless it begins with the short prompts.
        """
        tensor = isinstance(output, Tensor)
        sequences = output if tensor else getattr(output, "sequences", None)
        if not isinstance(sequences, Tensor) or not self._begins(sequences):
            return output, self.prompt
        sequences = self.ids(sequences)
        if tensor:
            return sequences, sequences
        output.sequences = sequences
        return output, sequences

    def _begins(self, shown: Tensor) -> bool:
        """Whether rows begin with the shortened prompts."""
        if shown.ndim != 2 or shown.shape[0] % len(self.short) or shown.shape[1] < self.length:
            return False
        short = self.short.to(shown.device, shown.dtype).repeat_interleave(shown.shape[0] // len(self.short), 0)
        return torch.equal(shown[:, : self.length], short)

    def shown_to_callbacks(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """`generate`'s keyword arguments, with every callback among them shown the full prompt.

        A decoding loop of the caller's own (`custom_generate`) drives the model itself and so sees the shortened
        prompt; the processors and criteria that it is handed see the full one.
        """
        changed = dict(arguments)
        for name in ("logits_processor", "stopping_criteria"):
            if entries := changed.get(name):
                changed[name] = type(entries)([self._callback(entry) for entry in entries])
        if changed.get("prefix_allowed_tokens_fn") is not None:
            changed["prefix_allowed_tokens_fn"] = self._prefix(changed["prefix_allowed_tokens_fn"])
        if changed.get("streamer") is not None:
            changed["streamer"] = _Streamer(changed["streamer"], self)
        return changed

    def _callback(self, callback: Any) -> Any:
        """A processor or criterion that is called with the full prompt.

        transformers lets a caller's take the place of its own of the same class. So those keep their class, and what
        they count is less by the tokens that are gone; a prompt's words, which some of them read, are all there.
        """
        # Anything else is the caller's own code, which may read ids in any way: it gets all of them.
        if not type(callback).__module__.startswith("transformers.generation."):
            return _Callback(callback, self)
        shorter = copy.copy(callback)
        for name in _COUNTS & vars(shorter).keys():
            if isinstance(count := getattr(shorter, name), int):
                setattr(shorter, name, max(0, count - self.prompt.shape[1] + self.length))
        if (allowed := vars(shorter).get("_prefix_allowed_tokens_fn")) is not None:
            shorter._prefix_allowed_tokens_fn = self._prefix(allowed)
        return shorter

    def _prefix(self, allowed: Callable[[int, Tensor], Any]) -> Callable[[int, Tensor], Any]:
        def shown(row: int, ids: Tensor) -> Any:
            # `row` numbers prompts or, in older transformers, all sequences of all prompts.
            candidates = [index for index in (row, *range(len(self.short))) if index < len(self.short)]
            sample = next(index for index in candidates if torch.equal(self.short[index], ids[: self.length]))
            return allowed(row, torch.cat((self.prompt[sample].to(ids.device, ids.dtype), ids[self.length :])))

        return shown


class _Shown:
    """Stands for a callback, and has all its public attributes."""

    def __init__(self, wrapped: Any, full: FullPrompt) -> None:
        self._wrapped, self._full = wrapped, full

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._wrapped, name)


class _Callback(_Shown):
    """A logits processor or stopping criterion that is called with the full prompt's ids."""

    def __call__(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self._wrapped(self._full.ids(input_ids), *args, **kwargs)

    def __getattribute__(self, name: str) -> Any:
        if name == "__call__":  # transformers reads off its signature which further arguments it takes
            return object.__getattribute__(self, "_wrapped").__call__
        return object.__getattribute__(self, name)


class _Streamer(_Shown):
    """A streamer that is first put the full prompt."""

    _began = False

    def put(self, value: Tensor) -> None:
        # The first thing that is put is the prompt; then one token after another.
        if not self._began:
            self._began = True
            value = self._full.ids(value)
        self._wrapped.put(value)

    def end(self) -> None:
        self._wrapped.end()
