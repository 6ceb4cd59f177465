"""Proportional attention: a token that m tokens were merged into gets the attention of m tokens.

softmax(q k^T / sqrt(d) + log s), s the size of each key's token: ToMe, arXiv 2210.09461, eq. 1. The logarithms join
the mask where every transformers model hands its keys to its attention function (`calls.py`), so the bias is as long
as the keys really are: in prefill, in decoding, and after tokens were dropped.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from gripvlm.errors import InputError, UnsupportedModelError
from gripvlm.models.families import family_of
from gripvlm.models.hooks.attention import modules_of, seen_keys
from gripvlm.models.hooks.calls import AttentionCall, call_hooks
from gripvlm.models.hooks.llm_drop import checked_keys, read_call

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class LayerSizes(NamedTuple):
    """Sizes of the prompt's tokens that a layer sees.

    Attributes:
        sizes: [B, l] float32, above 0; 1 for a token that is just itself.
        missing: tokens of the prompt that the layer does not see, L - l.
    """

    sizes: Tensor
    missing: int


SizesOf: TypeAlias = Callable[[int, int, int], LayerSizes]
"""(layer, rows of the batch, tokens of the prompt) -> `LayerSizes`, called in every prefill of every layer."""


def checked_sizes(model: PreTrainedModel) -> None:
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
    model: PreTrainedModel, sizes_of: SizesOf | None, known: Mapping[int, LayerSizes | None] | None = None
) -> Iterator[dict[int, LayerSizes | None]]:
    """Inside the block, every query of the language model attends to each key with log(size) added to its score.

    Args:
        model: a supported model, under sdpa or eager attention.
        sizes_of: the sizes of a prompt's tokens. Tokens decoded later have size 1; rows that `generate` repeats
            follow one another.
        known: what another block yielded, for a further turn on the cache that was filled there.

    Yields:
        layer -> the sizes in the latest prompt, None where all are 1; filled when it has run.

    Where all sizes are 1 the attention call is left as it is, so the run is the same bit for bit.

    Raises:
        UnsupportedModelError: see `checked_sizes`.
        InputError: when the model runs: a cache that is not dynamic, or a layer whose attention does not go through
            transformers' attention functions.
    """
    checked_sizes(model)
    bias = _SizeBias(sizes_of, dict(known or {}), layers=len(model.get_decoder().layers))
    # The base model, as a LoRA wrapper calls the model's own forward past its hooks.
    root, modules = model.base_model, modules_of(model.get_decoder())
    attention = {module: functools.partial(bias.before_attention, layer) for module, layer in modules.items()}
    # first: hooks that capture attention then see the weights that count
    with call_hooks({root: bias.begin}, {root: bias.end}, attention, first=True):
        yield bias.known


class _SizeBias:
    """The sizes of one prompt, from its prefill to its last token."""

    def __init__(self, sizes_of: SizesOf | None, known: dict[int, LayerSizes | None], layers: int) -> None:
        self.sizes_of, self.known, self.layers = sizes_of, known, layers
        self.prefill, self.total = False, 0

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Before the whole model: is this a new prompt?"""
        ids, _, past = read_call(args, kwargs, "proportional_attention")
        self.prefill, self.total = past == 0, past + ids.shape[1]
        if self.prefill:
            self.known.clear()

    def end(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """After the whole model: a layer that was not seen was not given its sizes."""
        if unseen := sorted({*range(self.layers)} - {*self.known}):
            raise InputError(
                f"the attention of layer {unseen[0]} of the language model does not go through transformers' attention "
                "functions, so sizes cannot be added to its scores: leave proportional_attention out"
            )

    def before_attention(self, layer: int, call: AttentionCall) -> None:
        # A layer that is known already is one that backward runs again.
        if self.prefill and self.sizes_of is not None and layer not in self.known:
            given = self.sizes_of(layer, call.query.shape[0], self.total)
            # None: the call stays as it is, and so goes to the same kernel as the unpruned model's.
            # It waits for the device, once a layer and prompt.
            self.known[layer] = given if bool((given.sizes != 1).any()) else None
        known = self.known.get(layer)
        if known is None:
            return
        keys, tokens = call.key.shape[2], self.total - known.missing
        if keys > tokens:
            raise InputError(f"{keys} keys for {tokens} tokens in layer {layer}: use the default dynamic cache")
        decoded = max(0, tokens - known.sizes.shape[1])
        sizes = nn.functional.pad(known.sizes, (0, decoded), value=1.0)[:, :tokens]
        add_sizes(call, sizes[:, tokens - keys :])  # layers with a sliding window keep the last keys only


def add_sizes(call: AttentionCall, sizes: Tensor) -> None:
    """Replaces the mask of an attention call by one with log(sizes [B, K]) added for each of its K keys."""
    bias = sizes.to(call.query.device, torch.float32).log()[:, None, None]  # [B, 1, 1, K]
    length, total, mask = call.query.shape[2], call.key.shape[2], call.mask
    if mask is None:
        if not call.causal:
            call.mask = bias.to(call.query.dtype)
            return
        # The function would have hidden what comes after each query; with a mask given, that is up to the mask.
        mask = torch.ones(length, total, dtype=torch.bool, device=call.query.device).tril(total - length)
    if not isinstance(mask, Tensor) or mask.ndim not in (2, 4):
        raise InputError(
            f"{type(call.module).__name__} runs with a mask that takes no bias for each key (flash or flex attention): "
            "load the model with attn_implementation='sdpa'"
        )
    # Cut to the keys, as eager attention functions in transformers do.
    mask = mask[..., :total]
    lowest = torch.finfo(call.query.dtype).min
    if mask.dtype == torch.bool:
        call.mask = torch.where(mask, bias.to(call.query.dtype), lowest)
        return
    # Summed in float32 and rounded once; the lowest number and not -inf, which would make an all-hidden row NaN.
    call.mask = (mask.float() + bias).masked_fill(~seen_keys(mask), lowest).to(call.query.dtype)
