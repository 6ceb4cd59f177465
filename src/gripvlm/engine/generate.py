"""What a wrapped `generate` must mind: options, lengths that count the prompt, ids in front."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from gripvlm.engine.callbacks import FullPrompt
from gripvlm.errors import InputError
from gripvlm.models.compat import installed
from gripvlm.models.families import Family, chunkable

__all__ = ["Options", "with_prompt"]

CHUNKS_SINCE = (5, 23)


class Options:
    """The options of one `generate` call, wherever they were given.

    transformers reads an option from the call's keywords, else from the call's `generation_config`,
    else from the model's.
    """

    def __init__(self, model: Any, kwargs: Mapping[str, Any]) -> None:
        self.model = model
        self.kwargs = kwargs
        self.config = kwargs.get("generation_config")
        self.model_config = getattr(model, "generation_config", None)

    def get(self, name: str) -> Any:
        """The option's value, None where nobody set it."""
        for source in (self.kwargs.get(name), getattr(self.config, name, None)):
            if source is not None:
                return source
        return getattr(self.model_config, name, None)

    @property
    def uncached(self) -> bool:
        """True where decoding runs without a key-value cache."""
        return self.get("use_cache") is False

    def refuse(self, family: Family, inside: bool) -> None:
        """Raises for ways of decoding that are not right with fewer tokens, or not even with all.

        `inside` says whether something is done inside the language model while it runs.
        """
        if inside and self.get("guidance_scale") not in (None, 1):
            raise InputError(
                "guidance_scale runs a second prompt through the model beside the first, and a pruner that drops "
                "inside the language model (or proportional_attention) cannot tell them apart: leave it out, or use a "
                "pruner that drops at the input"
            )
        if self.get("prefill_chunk_size") is not None and inside:
            raise InputError(
                "prefill_chunk_size: a pruner that drops inside the language model must see the whole prompt at "
                "once; leave it out, or use a pruner that drops at the input"
            )
        if self.get("prefill_chunk_size") is not None and installed() < CHUNKS_SINCE:
            raise InputError(
                "prefill_chunk_size: transformers before 5.23 does not cut encoded images into chunks; leave it "
                "out, or pip install -U transformers"
            )
        if self.get("prefill_chunk_size") is not None and not chunkable(family, self.model):
            raise InputError(
                f"prefill_chunk_size: {family.model_type} images attend in both directions, which transformers "
                "cannot prefill in chunks; leave it out"
            )
        for name in ("assistant_model", "prompt_lookup_num_tokens"):
            if self.get(name) is not None:
                raise InputError(f"{name}: speculative decoding is not supported with pruning; leave it out")

    def check_beams(self, family: Family, arguments: Mapping[str, Any], selections: Sequence[Sequence[Any]]) -> None:
        """Raises where transformers would mix images up: beams over unequal counts, or over several images."""
        several = max(self.get("num_beams") or 1, self.get("num_return_sequences") or 1) > 1
        counts = {selection.k for sample in selections for selection in sample}
        one_tensor = any(
            isinstance(output.pooler_output, Tensor) for output in arguments["mm_encoder_outputs"].values()
        )
        if several and not family.beams and any(len(sample) > 1 for sample in selections):
            raise InputError(
                f"beams and several returned sequences are wrong in transformers itself for "
                f"{family.model_type} prompts with more than one image: decode greedily or sample one "
                "sequence, or repeat the prompt in the batch"
            )
        if several and one_tensor and len(selections) > 1 and len(counts) > 1:
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
            if arguments.get(name) is not None or getattr(self.config, name, None) is None:
                arguments[name] = value - fewer
                continue
            self.config = copy.deepcopy(self.config)
            setattr(self.config, name, value - fewer)
            arguments["generation_config"] = self.config
        return arguments


def with_prompt(output: Any, full: FullPrompt) -> tuple[Any, Tensor]:
    """What `generate` returned, with the caller's own prompt ids in front; and its ids, the prompt's if it has none.

    Args:
        output: a tensor [B * r, shortened + new] or an output with such `sequences`; what a decoding loop of the
            caller's own made is left as it is where it does not begin with the prompt that it was given.
    """
    tensor = isinstance(output, Tensor)
    sequences = output if tensor else getattr(output, "sequences", None)
    if not isinstance(sequences, Tensor) or not full.begins(sequences):
        return output, full.prompt
    sequences = full.ids(sequences)
    if tensor:
        return sequences, sequences
    output.sequences = sequences
    return output, sequences
