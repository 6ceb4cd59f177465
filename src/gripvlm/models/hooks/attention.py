"""Chosen rows of attention, under any attention implementation that keeps keys, without full attention.

`output_attentions=True` gives nothing under sdpa (an empty tuple) and, in Qwen's towers, not even the
weights under eager. So the queries and keys are watched where every transformers model hands them to
its attention function, and softmax(q[rows] k^T) is computed for the asked rows only: O(rows x length).

    with watch_attention(model.get_decoder(), layers=[1], queries=[-1]) as seen:
        model(**inputs)
    seen[1][0]          # [B, heads, 1, L]: what the last token looks at in layer 1
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from gripvlm.errors import InputError
from gripvlm.models.hooks.calls import before_attention

__all__ = ["blocks_of", "last_norm", "merged_rows", "modules_of", "watch_attention"]

Queries: TypeAlias = Sequence[int] | str | Callable[[int], Sequence[int] | str | None]
_NAMED = ("received", "to_first", "keys", "key_sizes")
_CHUNK = 256  # queries at a time for "received"


@dataclass
class _Watch:
    """One open block: which modules it watches, as id -> layer, and what it has seen."""

    modules: dict[int, int]
    queries: Queries
    seen: dict[int, list[Tensor]] = field(default_factory=dict)

    def look(self, module: Any, query: Tensor, key: Tensor, mask: Any, options: dict[str, Any]) -> Any:
        layer = self.modules[id(module)]
        queries = self.queries(query.shape[2]) if callable(self.queries) else self.queries
        if queries is None:
            return mask
        with torch.no_grad():
            if queries == "keys":
                self.seen.setdefault(layer, []).append(key.float().mean(1))
            elif queries == "key_sizes":
                self.seen.setdefault(layer, []).append(key.float().abs().sum((1, 3)))
            else:
                self.seen.setdefault(layer, []).append(_weights(module, query, key, mask, options, queries))
        return mask


@contextmanager
def watch_attention(root: Any, layers: Sequence[int], queries: Queries) -> Iterator[dict[int, list[Tensor]]]:
    """Inside the block, attention rows of some of `root`'s layers are noted whenever it runs.

    Args:
        root: the part of a model to watch, such as `model.get_encoder("image")` (the vision tower) or
            `model.get_decoder()` (the language model), or a whole model of one stack.
        layers: numbers of its layers; negative ones count from the last.
        queries: positions of query tokens (negative ones from the end); a function that returns them
            for a call over so many queries, None for a call to leave out; "received" for the mean over
            all queries that are no padding; "to_first" for the weight of every query on the first key; or
            "keys" for the keys instead, "key_sizes" for their L1 norms.

    Yields:
        A dict, filled while the model runs: layer -> list (calls of its attention, in order) of
        float32 tensors [B, heads, len(queries), L], or [B, heads, L] for "received" and "to_first"; of keys after
        rotary positions [B, L, d_h], the mean over heads, for "keys", and [B, L], the sum over heads, for
        "key_sizes". Towers that attend by window or by image make one call for each, in their own order: see
        `merged_rows`.

    Only modules below `root` are watched, and only in this block's calls (`models/hooks/calls.py`): other models, and
    this one in other threads, run as they would.
    Queries that see nothing (padding) give and receive zero. The attention function itself runs
    unchanged, so outputs are the same bit for bit.

    Raises:
        InputError: no such layer; or, when the model runs, an attention implementation whose mask
            does not say what each query sees.
    """
    if isinstance(queries, str) and queries not in _NAMED:
        raise InputError(f"queries={queries!r}: give positions, such as [0] or [-1], or one of {', '.join(_NAMED)}")
    watch = _Watch(modules_of(root, layers), queries)
    with before_attention(watch):
        yield watch.seen


def merged_rows(tower: Any, pieces: Sequence[Tensor], grids: Tensor) -> list[Tensor]:
    """Received attention of a tower with `<modality>_grid_thw`, for each row of each of its items.

    Args:
        tower: the vision tower, which merges square blocks of patches and may attend by window, in
            an order of its own.
        pieces: what `watch_attention(tower, [layer], "received")` noted in a layer, a list of
            [1, heads, patches of one window or image]; or other channels of the patches, so laid out.
        grids: [items, 3] (t, h, w) in patches.

    Returns:
        A list (items) of [heads, n] float32: the mean over a row's patches, in the order of the item's
        rows. The values of one attention call (a window, an image) sum to 1 over its patches before
        that mean.
    """
    block = tower.spatial_merge_size**2
    flat = torch.cat([piece[0] for piece in pieces], dim=-1)  # [heads, patches]
    if flat.shape[-1] != int(grids.prod(-1).sum()):
        raise InputError(
            f"{flat.shape[-1]} patches were noted, but grids have {int(grids.prod(-1).sum())}: one run each"
        )
    rows = flat.unflatten(-1, (-1, block)).mean(-1)
    if hasattr(tower, "window_size"):
        order = _window_order(tower, grids)
        rows = rows[:, torch.argsort(order.to(rows.device))]
    return list(rows.split((grids.prod(-1) // block).tolist(), dim=-1))


def _window_order(tower: Any, grids: Tensor) -> Tensor:
    """[rows] the row that the tower's order has at each place; older transformers have it as a method."""
    if hasattr(tower, "get_window_index"):
        return torch.as_tensor(tower.get_window_index(grids)[0])
    from transformers.vision_utils import get_vision_window_index

    return get_vision_window_index(grids, tower.spatial_merge_size, tower.window_size, tower.patch_size)[0]


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
    return max(lists, key=len)


def last_norm(model: Any) -> Callable[[Tensor], Tensor]:
    """What a model's language model does to the states of its last layer; states come back where they were."""
    norm = model.get_decoder().norm
    return lambda states: norm(states.to(norm.weight.device)).to(states.device)


def modules_of(root: Any, layers: Sequence[int]) -> dict[int, int]:
    """id of a module -> its layer, for all modules inside the chosen layers."""
    blocks = blocks_of(root)
    count = len(blocks)
    if wrong := [layer for layer in layers if not -count <= layer < count]:
        raise InputError(f"no layer {wrong[0]} in this {type(root).__name__}: it has {count}, from 0 to {count - 1}")
    wanted = {layer % count for layer in layers}
    return {id(module): layer for layer in wanted for module in blocks[layer].modules()}


def _weights(
    module: Any, query: Tensor, key: Tensor, mask: Any, options: dict[str, Any], queries: Sequence[int] | str
) -> Tensor:
    """[B, H, r, L] weights of the asked queries; [B, H, L] received by each key on average, or given to the first."""
    unclear = mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 4)
    if unclear or options.get("cu_seq_lens_q") is not None:
        raise InputError(
            f"{type(module).__name__} runs with a mask that does not say what each query sees (flash or flex "
            "attention): load the model with attn_implementation='sdpa' to watch it"
        )
    if any(options.get(name) is not None for name in ("s_aux", "position_bias")):
        raise InputError(f"{type(module).__name__} adds sinks or biases to its scores, which are not watched")
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    length, total = query.shape[2], key.shape[2]
    causal = options.get("is_causal")
    causal = (getattr(module, "is_causal", True) if causal is None else causal) and mask is None and length > 1

    def rows(index: Tensor) -> Tensor:
        scale = options.get("scaling")
        scores = query[:, :, index].float() @ key.transpose(2, 3).float()
        scores = scores * (query.shape[-1] ** -0.5 if scale is None else scale)
        if (cap := options.get("softcap")) is not None:
            scores = torch.tanh(scores / cap) * cap
        if mask is not None:
            part = mask[:, :, index if mask.shape[2] > 1 else slice(None), :total]
            if part.dtype == torch.bool:
                scores = scores.masked_fill(~part, -torch.inf)
            else:
                hidden = part <= torch.finfo(part.dtype).min / 2
                scores = (scores + part.float()).masked_fill(hidden, -torch.inf)
        elif causal:  # aligned at the top left, as scaled_dot_product_attention does
            after = torch.arange(total, device=index.device) > index[:, None]
            scores = scores.masked_fill(after, -torch.inf)
        return scores.softmax(-1).nan_to_num(0.0)  # NaN: a query that sees nothing

    everyone = torch.arange(length, device=query.device)
    if queries == "to_first":
        return torch.cat([rows(part)[..., 0] for part in everyone.split(_CHUNK)], dim=-1)
    if isinstance(queries, str):
        real = _real(mask, query, total)  # [B or 1, length]
        received = sum((rows(part) * real[:, None, part, None]).sum(2) for part in everyone.split(_CHUNK))
        assert isinstance(received, Tensor)
        return received / real.sum(-1).clamp(min=1)[:, None, None]
    if wrong := [place for place in queries if not -length <= place < length]:
        raise InputError(f"no query {wrong[0]} in a call over {length} tokens")
    return rows(everyone[list(queries)])


def _real(mask: Tensor | None, query: Tensor, total: int) -> Tensor:
    """[B or 1, L] 1.0 for queries that are no padding: those that some other query sees as a key."""
    length = query.shape[2]
    if mask is None or length != total:
        return query.new_ones(1, length, dtype=torch.float32)
    sees = mask[..., :total]
    sees = sees if sees.dtype == torch.bool else sees > torch.finfo(sees.dtype).min / 2
    sees = sees.any(1).expand(-1, length, -1)  # [B or 1, L, L]
    lonely = torch.eye(length, dtype=torch.bool, device=sees.device)  # padding may be left to see itself
    return ((sees & ~lonely).any(1) | (sees.sum(1) == length)).float() if length > 1 else sees.any(1).float()
