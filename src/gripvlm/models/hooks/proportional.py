"""Size-aware ("proportional") attention: a token that stands for m tokens is attended to as if all m were there.

softmax(q k^T / sqrt(d) + log s), s the size of each key's token: ToMe, arXiv 2210.09461, eq. 1. The logarithms
join the mask where every transformers model hands its keys to its attention function, so nothing of a model is
copied, and the bias is as long as the keys really are: in prefill, in decoding, and after tokens were dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from gripvlm.errors import InputError, UnsupportedModelError
from gripvlm.models.families import family_of
from gripvlm.models.hooks.attention import blocks_of, modules_of
from gripvlm.models.hooks.calls import before_attention, hooked
from gripvlm.models.hooks.llm_drop import checked_dynamic, checked_keys, ids_of
from gripvlm.models.renamed import cache_in

__all__ = ["LayerSizes", "Sized", "checked_sizes", "proportional_attention", "with_sizes"]


class LayerSizes(NamedTuple):
    """Sizes of the prompt's tokens that a layer sees.

    Attributes:
        sizes: [B, l] float32, above 0; 1 for a token that is just itself.
        missing: tokens of the prompt that the layer does not see, L - l.
    """

    sizes: Tensor
    missing: int


Sized: TypeAlias = Callable[[int, int, int], LayerSizes]
"""(layer, rows of the batch, tokens of the prompt) -> `LayerSizes`, asked in every prefill of every layer."""


def checked_sizes(model: Any) -> None:
    """Raises an UnsupportedModelError where a bias for each key cannot be carried exactly."""
    family = family_of(model)
    if family.equals == "deletion":
        raise UnsupportedModelError(
            f"proportional_attention adds a bias to the scores of each key, but some layers of {family.model_type} "
            "have no such scores (linear attention or convolutions): leave proportional_attention out"
        )
    checked_keys(model, "proportional_attention adds a bias to the scores of each key")


@contextmanager
def proportional_attention(
    model: Any, sized: Sized | None, known: Mapping[int, LayerSizes | None] | None = None
) -> Iterator[dict[int, LayerSizes | None]]:
    """Inside the block, every query of the language model attends to each key with log(size) added to its score.

    Args:
        model: a supported model, under sdpa or eager attention.
        sized: the sizes of a prompt's tokens. Tokens decoded later have size 1; rows that `generate` repeats
            follow one another.
        known: what another block yielded, for a further turn on the cache that was filled there.

    Yields:
        layer -> the sizes in the latest prompt, None where all are 1; filled when it has run.

    Where all sizes are 1 the attention call is left as it is, so the run is the same bit for bit.

    Raises:
        UnsupportedModelError: see `checked_sizes`.
        InputError: when the model runs: a cache that is not dynamic, or a layer whose attention does not go
            through transformers' attention functions.
    """
    checked_sizes(model)
    decoder = model.get_decoder()
    biaser = _Biaser(modules_of(decoder, range(len(blocks_of(decoder)))), sized, dict(known or {}))
    root = model.base_model  # a LoRA wrapper calls the model's forward past its hooks
    with (
        hooked({root: biaser.begin}, {root: biaser.end}),
        before_attention(biaser, first=True),  # whoever watches attention sees the weights that count
    ):
        yield biaser.known


class _Biaser:
    """The sizes of one prompt, from its prefill to its last token."""

    def __init__(self, modules: dict[int, int], sized: Sized | None, known: dict[int, LayerSizes | None]) -> None:
        self.modules, self.sized = modules, sized
        self.known = known
        self.fresh, self.total = True, 0

    def begin(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the whole model: how many tokens will there be, and is this a prompt?"""
        ids = ids_of(args, kwargs)
        if ids is None:
            raise InputError("proportional_attention needs input_ids, not inputs_embeds: call model(input_ids=...)")
        cache = cache_in(kwargs)
        checked_dynamic(cache)
        past = 0 if cache is None else cache.get_seq_length()
        self.fresh, self.total = past == 0, past + ids.shape[1]
        if self.fresh:
            self.known.clear()

    def end(self, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        """After the whole model: a layer that was not seen was not given its sizes."""
        if unseen := sorted({*self.modules.values()} - {*self.known}):
            raise InputError(
                f"the attention of layer {unseen[0]} of the language model does not go through transformers' attention "
                "functions, so sizes cannot be added to its scores: leave proportional_attention out"
            )

    def look(self, module: Any, query: Tensor, key: Tensor, mask: Any, options: dict[str, Any]) -> Any:
        layer = self.modules[id(module)]
        if self.fresh and self.sized is not None and layer not in self.known:  # else backward runs it again
            asked = self.sized(layer, query.shape[0], self.total)
            self.known[layer] = asked if bool((asked.sizes != 1).any()) else None
        known = self.known.get(layer)
        if known is None:
            return mask
        sizes, missing = known
        have, own = key.shape[2], self.total - missing
        if have > own:
            raise InputError(f"{have} keys for {own} tokens in layer {layer}: use the default dynamic cache")
        sizes = torch.nn.functional.pad(sizes, (0, max(0, own - sizes.shape[1])), value=1.0)[:, :own]
        return with_sizes(module, query, key, mask, options, sizes[:, own - have :])  # sliding layers keep the last


def with_sizes(module: Any, query: Tensor, key: Tensor, mask: Any, options: dict[str, Any], sizes: Tensor) -> Any:
    """The mask of an attention call with log(sizes [B, K]) added for each of its K keys."""
    bias = sizes.to(query.device, torch.float32).log()[:, None, None]  # [B, 1, 1, K]
    length, total = query.shape[2], key.shape[2]
    if mask is None:
        causal = options.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        if not causal or length == 1:
            return bias.to(query.dtype)
        mask = torch.ones(length, total, dtype=torch.bool, device=query.device).tril(total - length)
    if not isinstance(mask, Tensor) or mask.ndim not in (2, 4):
        raise InputError(
            f"{type(module).__name__} runs with a mask that takes no bias for each key (flash or flex attention): load "
            "the model with attn_implementation='sdpa'"
        )
    mask = mask[..., :total]
    least = torch.finfo(query.dtype).min
    if mask.dtype == torch.bool:
        return torch.where(mask, bias.to(query.dtype), least)
    hidden = mask <= torch.finfo(mask.dtype).min / 2
    return (mask.float() + bias).masked_fill(hidden, least).to(query.dtype)
