"""Selected rows of attention, under sdpa or eager, without computing the rest.

`output_attentions=True` gives nothing under sdpa (an empty tuple) and, in Qwen's towers, not even the weights under
eager. So queries and keys are read where every transformers model hands them to its attention function, and
softmax(q[rows] k^T) is computed for the requested rows only: O(rows x length).

    with capture_attention(model.get_decoder(), layers=[1], queries=[-1]) as attention:
        model(**inputs)
    attention[1][0]          # [B, heads, 1, L]: what the last token looks at in layer 1
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from gripvlm.errors import InputError
from gripvlm.models.hooks.calls import AttentionCall, call_hooks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Queries: TypeAlias = Sequence[int] | str | Callable[[int], Sequence[int] | str | None]
NAMED_QUERIES = ("received", "to_first", "keys", "all_keys", "key_sizes", "values")
CHUNK = 256  # queries at a time for "received" and "to_first", so that no [L, L] matrix is made of a large image


@contextmanager
def capture_attention(
    root: PreTrainedModel, layers: Sequence[int], queries: Queries
) -> Iterator[dict[int, list[Tensor]]]:
    """Inside the block, attention rows of some of `root`'s layers are captured whenever it runs.

    Args:
        root: the part of a model to read, such as `model.get_encoder("image")` (the vision tower) or
            `model.get_decoder()` (the language model), or a whole model of one stack.
        layers: numbers of its layers; negative ones count from the last.
        queries: positions of query tokens (negative ones from the end); "received" for the mean over all queries that
            are no padding; "to_first" for the weight of every query on the first key; "keys" for the keys instead,
            "all_keys" for those of every head, "key_sizes" for their L1 norms, "values" for the values. Or a function
            that returns one of these for a call over so many queries, None for a call to leave out.

    Yields:
        A dict, filled while the model runs: layer -> list (calls of its attention, in order) of float32 tensors
        [B, heads, len(queries), L]; [B, heads, L] for "received" and "to_first"; [B, L, d_h] for "keys", the mean over
        heads after rotary positions; [B, L, key heads x d_h] for "all_keys"; [B, L] for "key_sizes", the sum over
        heads; [B, L, key heads, d_v] for "values". Towers that attend by window or by image make one call for each, in
        their own order: see `models/tower_rows.py`.

    Only modules below `root` are read, and only in this block's calls (`hooks/calls.py`). Queries that see nothing
    (padding) give and receive zero. The attention function itself runs unchanged: outputs are the same bit for bit.

    Raises:
        InputError: no such layer; or, when the model runs, an attention implementation whose mask does not say what
            each query sees.
    """
    if isinstance(queries, str) and queries not in NAMED_QUERIES:
        names = ", ".join(NAMED_QUERIES)
        raise InputError(f"queries={queries!r}: give positions, such as [0] or [-1], or one of {names}")
    captured: dict[int, list[Tensor]] = {}

    @torch.no_grad()
    def capture(layer: int, call: AttentionCall) -> None:
        requested = queries(call.query.shape[2]) if callable(queries) else queries
        if requested is not None:
            captured.setdefault(layer, []).append(_observed(call, requested))

    functions = {module: functools.partial(capture, layer) for module, layer in modules_of(root, layers).items()}
    with call_hooks(attention=functions):
        yield captured


# --- parts of a model -------------------------------------------------------------------------------------------------


def blocks_of(root: nn.Module) -> nn.ModuleList:
    """The blocks of a tower or a language model: its longest list of modules.

    Raises:
        InputError: it has none.
    """
    lists = [module for module in root.modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise InputError(
            f"a {type(root).__name__} has no blocks whose attention could be read: use a pruner of features only"
        )
    # A stem may have numbered parts as well (the lab's has), but fewer of them than there are blocks.
    return max(lists, key=len)


def feature_block(model: PreTrainedModel) -> nn.Module:
    """The block of the vision tower whose output becomes features; the last one, where those of several do."""
    blocks, config = blocks_of(model.get_encoder("image")), model.config
    # The plural is VipLLaVA's in transformers 5.19.
    numbers = getattr(config, "vision_feature_layer", getattr(config, "vision_feature_layers", None))
    numbers = [-1] if numbers is None else [numbers] if isinstance(numbers, int) else numbers
    # transformers numbers hidden states, of which the embeddings are the first; negative numbers need no shift.
    return blocks[max((number if number < 0 else number - 1) % len(blocks) for number in numbers)]


def last_norm(model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    """What the language model does to the states of its last layer; the result is on the device of the states."""
    decoder = model.get_decoder()
    norm: Any = decoder.norm if hasattr(decoder, "norm") else decoder.embedding_norm  # LFM2 calls it so
    return lambda states: norm(states.to(norm.weight.device)).to(states.device)


def modules_of(root: nn.Module, layers: Sequence[int] | None = None) -> dict[nn.Module, int]:
    """Module -> its layer, for all modules inside the chosen layers (all by default).

    Not the layers alone: which of a layer's modules calls the attention function differs by model.
    """
    blocks = blocks_of(root)
    count = len(blocks)
    layers = range(count) if layers is None else layers
    if wrong := [layer for layer in layers if not -count <= layer < count]:
        raise InputError(f"no layer {wrong[0]} in this {type(root).__name__}: it has {count}, from 0 to {count - 1}")
    numbers = {layer % count for layer in layers}
    return {module: number for number in numbers for module in blocks[number].modules()}


# --- from queries, keys and a mask to weights -------------------------------------------------------------------------


def _observed(call: AttentionCall, queries: Sequence[int] | str) -> Tensor:
    """What `capture_attention` gives for one call."""
    if queries == "keys":
        return call.key.float().mean(1)
    if queries == "all_keys":
        return call.key.float().transpose(1, 2).flatten(2)
    if queries == "key_sizes":
        return call.key.float().abs().sum((1, 3))
    if queries == "values":
        return call.value.float().transpose(1, 2)
    _check_readable(call)
    length = call.query.shape[2]
    # Grouped-query attention: each key head serves several query heads that follow one another.
    keys = call.key.repeat_interleave(call.query.shape[1] // call.key.shape[1], dim=1).transpose(2, 3).float()
    every = torch.arange(length, device=call.query.device)
    if queries == "to_first":
        return torch.cat([_rows(call, keys, part)[..., 0] for part in every.split(CHUNK)], dim=-1)
    if isinstance(queries, str):  # "received"
        real = _real(call)  # [B or 1, length]
        total = torch.zeros((), device=call.query.device)
        for part in every.split(CHUNK):
            total = total + (_rows(call, keys, part) * real[:, None, part, None]).sum(2)
        return total / real.sum(-1).clamp(min=1)[:, None, None]
    if wrong := [place for place in queries if not -length <= place < length]:
        raise InputError(f"no query {wrong[0]} in a call over {length} tokens")
    return _rows(call, keys, every[list(queries)])


def _check_readable(call: AttentionCall) -> None:
    name = type(call.module).__name__
    # Flex attention has a BlockMask, flash attention a mask [B, L] or lengths of packed sequences.
    unclear = call.mask is not None and (not isinstance(call.mask, Tensor) or call.mask.ndim != 4)
    if unclear or call.options.get("cu_seq_lens_q") is not None:
        raise InputError(
            f"{name} runs with a mask that does not say what each query sees (flash or flex attention): load the "
            "model with attn_implementation='sdpa' to watch it"
        )
    if any(call.options.get(option) is not None for option in ("s_aux", "position_bias")):
        raise InputError(
            f"{name} adds sinks or biases to its scores, which are not watched: use a pruner of features only"
        )


def _rows(call: AttentionCall, keys: Tensor, index: Tensor) -> Tensor:
    """[B, H, r, L] float32 weights of the queries `index` [r]; keys [B, H, d_h, L]."""
    scale, cap, mask = call.options.get("scaling"), call.options.get("softcap"), call.mask
    # In float32 whatever the model's dtype: rankings are made of these, and bfloat16 has ties.
    scores = call.query[:, :, index].float() @ keys
    scores = scores * (call.query.shape[-1] ** -0.5 if scale is None else scale)
    if cap is not None:
        scores = torch.tanh(scores / cap) * cap
    if mask is not None:
        # Cut to the keys, as eager attention functions in transformers do.
        part = mask[:, :, index if mask.shape[2] > 1 else slice(None), : keys.shape[-1]]
        if part.dtype != torch.bool:
            scores = scores + part.float()
        scores = scores.masked_fill(~seen_keys(part), -torch.inf)
    elif call.causal:
        # Aligned at the top left, as scaled_dot_product_attention does.
        after = torch.arange(keys.shape[-1], device=index.device) > index[:, None]
        scores = scores.masked_fill(after, -torch.inf)
    return scores.softmax(-1).nan_to_num(0.0)  # NaN: a query that sees nothing


def seen_keys(mask: Tensor) -> Tensor:
    """A mask as bool, True where a key is seen."""
    # Masks that are added hide by the smallest number of their dtype; sums with a bias may come out a bit larger.
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def _real(call: AttentionCall) -> Tensor:
    """[B or 1, L] 1.0 for queries that are no padding: those that some other query sees as a key."""
    length, total, mask = call.query.shape[2], call.key.shape[2], call.mask
    # In decoding (fewer queries than keys) nothing says which queries are padding; they count as real.
    if mask is None or length != total:
        return call.query.new_ones(1, length, dtype=torch.float32)
    sees = seen_keys(mask[..., :total]).any(1).expand(-1, length, -1)  # [B or 1, L, L]
    if length == 1:
        return sees.any(1).float()
    itself = torch.eye(length, dtype=torch.bool, device=sees.device)  # padding may be left to see itself
    return ((sees & ~itself).any(1) | (sees.sum(1) == length)).float()
