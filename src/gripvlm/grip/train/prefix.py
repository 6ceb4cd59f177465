"""The text that all prompts begin with, read by the frozen model once for all rows of a batch.

A chat template puts a system prompt and a turn's opening before the image. Its keys and values depend neither on image
nor on question, so they are computed once and every rollout continues from them.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gripvlm.models.compat import cache_argument, cache_of
from gripvlm.models.encoded import Span
from gripvlm.models.families import chunkable, family_of

__all__ = ["SHORTEST", "Prefix", "shared_length"]

SHORTEST = 8
"""Tokens from which sharing pays: every forward also has to copy the prefix's keys and values, row by row."""

_PER_TOKEN = frozenset({"input_ids", "attention_mask", "position_ids", "mm_token_type_ids", "token_type_ids"})


def shared_length(model: PreTrainedModel, ids: Tensor, mask: Tensor, spans: Sequence[Sequence[Span]]) -> int:
    """How many tokens all prompts [B, L] (left-padded) begin with before their first visual token.

    0 where continuing from keys and values would not be exact: images that attend in both directions, recurrent or
    convolutional layers, and sliding windows, whose length counts what is in the cache.
    """
    family, text = family_of(model), model.config.get_text_config()
    sliding = getattr(text, "sliding_window", None) is not None and getattr(text, "use_sliding_window", True)
    if not chunkable(family, model) or family.equals != "masking" or not family.layers or sliding:
        return 0
    if not all(spans):  # a prompt without an image
        return 0
    starts = mask.shape[1] - mask.sum(-1)  # [B]
    firsts = [int(images[0].positions[0]) - start for images, start in zip(spans, starts.tolist(), strict=True)]
    shortest = min(firsts, default=0)
    if shortest < SHORTEST:
        return 0
    column = starts[:, None] + torch.arange(shortest, device=ids.device)
    heads = ids.gather(-1, column)
    length = int((heads == heads[:1]).all(0).long().cumprod(0).sum())
    return length if length >= SHORTEST else 0


class Prefix:
    """The keys and values of P tokens that every row begins with.

    Args:
        model: the frozen model.
        ids: [P] the tokens.
        positions: [P], or [axes, P] for M-RoPE, their positions.
    """

    def __init__(self, model: PreTrainedModel, ids: Tensor, positions: Tensor) -> None:
        self.length = ids.shape[0]
        arguments = {"attention_mask": torch.ones_like(ids)[None], "position_ids": positions.unsqueeze(-2)}
        self._name = cache_argument(model)
        self._cache = cache_of(model(input_ids=ids[None], **arguments, use_cache=True))

    @classmethod
    def of(cls, model: PreTrainedModel, arguments: Mapping[str, Any], length: int) -> Prefix:
        """The first `length` tokens of any row of `arguments` (left-padded)."""
        start = int((arguments["attention_mask"][0] == 0).sum())
        part = slice(start, start + length)
        return cls(model, arguments["input_ids"][0, part], arguments["position_ids"][..., 0, part])

    def without(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The same rows, left-padded, continuing after the prefix."""
        mask = arguments["attention_mask"]
        padding = (mask == 0).sum(-1, keepdim=True)  # [R, 1]
        rest = {name: value[..., self.length :] if name in _PER_TOKEN else value for name, value in arguments.items()}
        # No row is moved: one that was padded by s columns loses its first P columns, so that the last s tokens of its
        # prefix are still there. They become padding, as the cache holds them already.
        column = torch.arange(rest["attention_mask"].shape[1], device=mask.device)
        real = (column >= padding).to(mask)
        rest["attention_mask"] = torch.cat((real.new_ones(len(mask), self.length), real), -1)
        rest["position_ids"] = rest["position_ids"].masked_fill(real == 0, 0)
        return {**rest, self._name: self._repeated(len(mask)), "use_cache": True}

    def _repeated(self, rows: int) -> Any:
        """The cache for so many rows: views of one row's keys and values, which the model's forward copies anyway."""
        cache = copy.copy(self._cache)
        cache.layers = [copy.copy(layer) for layer in cache.layers]
        for layer in cache.layers:
            layer.keys, layer.values = (x.expand(rows, -1, -1, -1) for x in (layer.keys, layer.values))
        return cache
