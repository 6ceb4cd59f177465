"""The seam: encode images once, drop rows and placeholders, hand transformers its own arguments.

transformers takes visual features that are encoded beforehand (`mm_encoder_outputs`) and scatters
them, in order, over the prompt's placeholder tokens. So pruning is: fewer rows, as many fewer
placeholders, and position ids that say where the kept ones were. No forward is copied or patched.

This is the only file that calls transformers' private helpers or applies a merge.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from gripvlm.errors import InputError
from gripvlm.models.compat import takes
from gripvlm.models.content_keys import content_keys
from gripvlm.models.encoded import Encoded, Item, Output, Span
from gripvlm.models.families import Family
from gripvlm.models.hooks.tower_merge import MergedRows, merge_in_tower
from gripvlm.models.layout import Layout
from gripvlm.models.text import full_mask, padding_token
from gripvlm.models.tower_rows import FEATURES_ONLY, TowerRequest, capture_tower, split_by_item
from gripvlm.utils.batching import onto, rows_of, shifted

__all__ = ["PER_TOKEN", "Shortened", "encode", "encoder_arguments", "locate", "shorten"]

SECONDS = "second_per_grid_ts"
"""Qwen2.5-VL: seconds between two temporal patches of each video, of which its positions are made."""

PER_TOKEN: dict[str, int] = {
    "input_ids": 0,
    "attention_mask": 0,
    "position_ids": 0,
    "labels": -100,
    "token_type_ids": 0,
    "mm_token_type_ids": 0,
}
"""Inputs with one entry a prompt token, and what fills their padding (input_ids: the pad token)."""


class _MergeLike(Protocol):
    source: Tensor
    destination: Tensor
    weight: Tensor


class Chosen(Protocol):
    """The part of a selection that overhead needs."""

    @property
    def indices(self) -> Tensor: ...
    @property
    def merge(self) -> Any: ...


class Shortened(NamedTuple):
    """How prompts of L columns became prompts of l.

    Attributes:
        full: L.
        order: [B, l] the columns of the full prompt that are left.
        following: [B], or [axes, B] for M-RoPE, the position of the first token after the prompt.
        ahead: [B] or [axes, B], by how much the prompt's last position is behind the full prompt's, where an image
            ends a prompt and its last row was dropped; else None.
    """

    full: int
    order: Tensor
    following: Tensor
    ahead: Tensor | None


# --- encode -----------------------------------------------------------------------------------


def encode(
    model: Any,
    family: Family,
    inputs: Mapping[str, Any],
    asked: TowerRequest = FEATURES_ONLY,
    layout: Layout | None = None,
) -> Encoded:
    """Runs the vision encoder and projector once over all of `inputs`' pixels, noting what is `asked` of the tower.

    `layout` is that of `inputs`, where it is known already.
    """
    layout = Layout.of(model, inputs) if layout is None else layout
    with ExitStack() as stack:
        merged = None if asked.merging is None else stack.enter_context(merge_in_tower(model, asked.merging))
        capture = stack.enter_context(capture_tower(model, asked)) if asked.layers or asked.patches else None
        filled = model._prepare_multimodal_encoder_kwargs_for_generation(dict(inputs))
    groups = None if merged is None else _spread(filled["mm_encoder_outputs"], merged())
    items: dict[str, list[Item]] = {}
    kinds: dict[str, Output] = {}
    for modality, output in filled["mm_encoder_outputs"].items():
        items[modality] = _items(model, family, layout.inputs, modality, output, asked.keys)
        extras = {name: getattr(output, name) for name in family.extras}
        kinds[modality] = Output(type(output), isinstance(output.pooler_output, Tensor), extras)
    if groups is not None:
        items = {
            name: [replace(one, groups=g) for one, g in zip(made, groups, strict=True)] for name, made in items.items()
        }
    if capture is not None:
        sizes = {name: [item.features.shape[0] for item in made] for name, made in items.items()}
        for name, rows in split_by_item(family.vision, capture, inputs, sizes).items():
            pairs = zip(items[name], rows, strict=True)
            items[name] = [replace(item, vision=vision, patches=patches) for item, (vision, patches) in pairs]
    shared = {name: _share_out(layout, name, made) for name, made in items.items()}
    samples = [tuple(item for name in shared for item in shared[name][b]) for b in range(len(layout.ids))]
    encoded = Encoded(family.model_type, tuple(samples), kinds, tower_request=asked)
    in_order = [tuple(span.item for span in spans) for spans in layout.spans(encoded)]
    return replace(encoded, samples=tuple(in_order))


def _spread(outputs: Mapping[str, Any], merged: MergedRows) -> Tensor:
    """Gives every row what the tower made of its group, so that a merged image has as many rows as any other.

    Returns:
        [b, n] the row that each stands in for its group.
    """
    (output,) = outputs.values()
    rows = [one[rank.to(one.device)] for one, rank in zip(output.pooler_output, merged.rank, strict=True)]
    output.pooler_output = torch.stack(rows) if isinstance(output.pooler_output, Tensor) else rows
    return merged.groups


def _items(
    model: Any, family: Family, inputs: Mapping[str, Any], modality: str, output: Any, keyed: bool
) -> list[Item]:
    """One `Item` for each entry of the encoder's output, or for each part of a joined one."""
    rows = list(output.pooler_output)
    if family.joined is not None:
        one = family.joined(model, inputs)
        rows = [part for row in rows for part in row.split(one) if part.shape[0]]  # none: a prompt without images
    sizes = [row.shape[0] for row in rows]
    planes = getattr(output, "deepstack_features", None) or ()
    grids = family.grid(model, inputs, modality, sizes)
    keys = content_keys(inputs, modality, len(rows)) if keyed else [0] * len(rows)
    told = inputs.get(f"{modality}_grid_thw")
    patches = [None] * len(rows) if told is None else [(t, h, w) for t, h, w in told.tolist()]
    seconds = inputs.get(SECONDS) if modality == "video" else None
    seconds = [None] * len(rows) if seconds is None else [float(value) for value in seconds]
    return [
        Item(modality, row, tuple(plane[i] for plane in planes), grids[i], keys[i], patches[i], seconds=seconds[i])
        for i, row in enumerate(rows)
    ]


def _share_out(layout: Layout, modality: str, items: list[Item]) -> list[list[Item]]:
    """The items of each prompt: they follow one another, as many as fill its placeholders."""
    counts = [len(columns) for columns in layout.places[modality]]
    samples: list[list[Item]] = []
    rest = list(items)
    for sample, wanted in enumerate(counts):
        mine: list[Item] = []
        while rest and sum(item.features.shape[0] for item in mine) < wanted:
            mine.append(rest.pop(0))
        have = sum(item.features.shape[0] for item in mine)
        if have != wanted:
            raise InputError(
                f"sample {sample} has {wanted} {modality} placeholder tokens, which its "
                f"{modality}s' {have} visual tokens do not fill: make the inputs with the model's "
                "own processor, one image for each image in the text"
            )
        samples.append(mine)
    if rest:
        raise InputError(
            f"{len(rest)} of {len(items)} {modality}s have no placeholder tokens in the prompts: "
            "the text needs one image token for each image"
        )
    return samples


def locate(model: Any, ids: Tensor, encoded: Encoded) -> list[list[Span]]:
    """Where each item's placeholders are in the prompts [B, L]: see `Layout.spans`."""
    return Layout.of(model, {"input_ids": ids}).spans(encoded)


# --- overhead ------------------------------------------------------------------------------------


def shorten(
    model: Any,
    inputs: Mapping[str, Any],
    encoded: Encoded,
    layout: Layout,
    spans: Sequence[Sequence[Span]],
    chosen: Sequence[Sequence[Chosen]],
    positions: str,
    spare_column: bool = False,
    pad_to_multiple_of: int = 1,
) -> tuple[dict[str, Any], Shortened]:
    """Arguments for `generate` or `forward` in which only the chosen rows are left, and how they were made.

    Per-token inputs lose the placeholders of dropped rows and are padded again on the side they
    were padded on, to a multiple of `pad_to_multiple_of`. Where nothing is dropped or padded they stay as
    they are, so that the run is the unpruned one bit for bit. `attention_mask` (2D) and `position_ids` are
    always there. Nothing here waits for an accelerator.

    `spare_column` leaves a column of padding after dropping. `generate` throws away a mask of ones,
    and without a cache transformers then takes gaps in the positions for packed sequences.
    """
    arguments = dict(inputs)
    arguments["attention_mask"] = mask = full_mask(model, inputs)
    if arguments.get("position_ids") is None:
        arguments["position_ids"] = _full_positions(model, layout, spans, mask.device)
    picks = [pick.indices for mine in chosen for pick in mine]
    real = layout.mask.sum(-1)
    left = [
        int(count) + sum(pick.indices.numel() - span.real for span, pick in zip(mine, sample, strict=True))
        for count, mine, sample in zip(real, spans, chosen, strict=True)
    ]
    length, width = mask.shape[1], mask.shape[1]
    fewer = left != real.tolist()
    if fewer:
        length = min(width, max(left) + spare_column)
    length += -length % pad_to_multiple_of
    following = _following(arguments["position_ids"], mask)
    last, ahead = arguments["position_ids"][..., -1], None
    if fewer or length != width:
        order = _compact(model, arguments, _kept(mask, spans, picks), length, layout.right)
        following = _renumber(model, arguments, positions, following)
        if positions == "original" and not layout.right and layout.ends_in_image:
            ahead = last - arguments["position_ids"][..., -1]
            if ahead.ndim == 2:
                ahead = torch.cat((torch.zeros_like(ahead[:-3]), ahead[-3:]))  # the text row only counts tokens
    else:
        order = torch.arange(width, device=mask.device).expand_as(mask)
    for name in encoder_arguments(model, arguments):
        arguments.pop(name)
    arguments["mm_encoder_outputs"] = _visual_outputs(encoded, spans, chosen)
    return arguments, Shortened(width, order, following, ahead)


def _following(positions: Tensor, mask: Tensor) -> Tensor:
    """[B], or [axes, B] for M-RoPE: the position of the first token after the full prompt."""
    after = positions.masked_fill(mask == 0, -1).amax(-1) + 1
    if after.ndim == 2:  # text goes on after the largest coordinate, the same on all axes
        after = torch.cat((after[:-3], after[-3:].amax(0).expand(3, -1)))
    return after


def _kept(mask: Tensor, spans: Sequence[Sequence[Span]], picks: Sequence[Tensor]) -> Tensor:
    """[B, L] bool: the prompts' text, and the placeholders of the picked rows [k] of each image."""
    keep = mask.to(torch.bool, memory_format=torch.contiguous_format, copy=True)
    flat = [span.positions + row * keep.shape[1] for row, mine in enumerate(spans) for span in mine]
    starts = [0, *itertools.accumulate(len(one) for one in flat)]
    places = onto(torch.cat(flat), keep.device)
    rows = shifted([pick.to(keep.device) for pick in picks], starts[:-1])
    line = keep.view(-1)
    line.index_fill_(0, places, False)
    line.index_fill_(0, places.index_select(0, rows), True)
    return keep


def _full_positions(model: Any, layout: Layout, spans: Sequence[Sequence[Span]], device: torch.device) -> Tensor:
    """Position ids of the full prompt, as the model itself would make them; made on the host.

    [B, L], or [axes, B, L] for M-RoPE, which needs to know the items' patches; those are the
    encoded items' own, so that an encoding serves any prompts it fits.
    """
    inputs = dict(layout.inputs)
    inputs["attention_mask"] = full_mask(model, inputs)
    told: dict[str, list[tuple[int, int, int]]] = {}
    seconds: list[float] = []
    for mine in spans:
        for span in mine:
            if span.item.grid_thw is not None:
                told.setdefault(f"{span.item.modality}_grid_thw", []).append(span.item.grid_thw)
            if span.item.seconds is not None:
                seconds.append(span.item.seconds)
    if told and inputs.get("mm_token_type_ids") is None:
        raise InputError(
            "mm_token_type_ids are missing, without which this model's positions are wrong: pass "
            "everything the processor returns"
        )
    grids = {name: torch.tensor(rows) for name, rows in told.items()}
    if seconds:
        grids[SECONDS] = torch.tensor(seconds)
    made: Tensor = model._prepare_position_ids_for_generation(inputs["input_ids"], inputs | grids)
    deltas = getattr(model.base_model, "rope_deltas", None)
    if isinstance(deltas, Tensor):  # the model just noted them, on the host
        model.base_model.rope_deltas = onto(deltas, device)
    return onto(made, device)


def _compact(model: Any, arguments: dict[str, Any], keep: Tensor, length: int, right: bool) -> Tensor:
    """Leaves the entries that `keep` [B, L] marks in every per-token input, padded to `length`.

    Returns:
        [B, length] the columns that are left; some are dropped ones, which the mask hides.
    """
    if (more := length - keep.shape[1]) > 0:
        side = (0, more) if right else (more, 0)
        keep = pad(keep, side, value=False)
        for name in PER_TOKEN.keys() & {name for name, value in arguments.items() if value is not None}:
            arguments[name] = pad(arguments[name], side)
    # A stable sort puts the kept ones side by side, in order, and the rest where padding belongs.
    order = torch.sort(keep.int(), dim=-1, descending=right, stable=True).indices
    order = order[:, :length] if right else order[:, -length:]
    real = keep.gather(-1, order)
    for name, fill in PER_TOKEN.items():
        if (value := arguments.get(name)) is None:
            continue
        if name == "input_ids":
            fill = padding_token(model)
        value = value.expand(*value.shape[:-2], *keep.shape)  # positions may be one row for all
        index = order.expand(*value.shape[:-1], length)  # M-RoPE positions are [axes, B, L]
        arguments[name] = value.gather(-1, index).masked_fill(~real, fill)
    return order


def _renumber(model: Any, arguments: dict[str, Any], positions: str, following: Tensor) -> Tensor:
    """Position ids after dropping: as they were, or counted anew.

    Args:
        following: the positions of the first token after the full prompt, see `_following`.

    Returns:
        The same for the prompt as it is now.
    """
    now = arguments["position_ids"]
    mask = arguments["attention_mask"].long()
    counted = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)
    if now.ndim == 2:
        if positions == "renumbered":
            arguments["position_ids"] = counted
            return mask.sum(-1)
        return following
    if positions == "renumbered":
        raise InputError(
            "positions='renumbered' is not defined for models with M-RoPE, whose positions are "
            "coordinates in the image: leave positions='original'"
        )
    if now.shape[0] == 4:  # text row + t, h, w: the text row only counts tokens
        arguments["position_ids"] = torch.cat((counted[None], now[1:]))
    if hasattr(model.base_model, "rope_deltas"):  # what a manual decoding loop adds to the tokens it counts
        model.base_model.rope_deltas = (following[-1] - mask.sum(-1))[:, None]
    return torch.cat((mask.sum(-1)[None], following[1:])) if now.shape[0] == 4 else following


def encoder_arguments(model: Any, given: Mapping[str, Any]) -> list[str]:
    """The inputs that only the vision encoder reads, found as transformers finds them."""
    functions = [getattr(model.base_model, f"get_{modality}_features", None) for modality in ("image", "video")]
    names = {name for function in functions if function is not None for name in takes(function)}
    return [name for name in given if name in names and name not in PER_TOKEN]


def _visual_outputs(
    encoded: Encoded, spans: Sequence[Sequence[Span]], chosen: Sequence[Sequence[Chosen]]
) -> dict[str, Any]:
    """modality -> a fresh output of the encoder's own class that holds the chosen rows."""
    outputs = {}
    for modality, made in encoded.outputs.items():
        pairs = [
            (span.item, pick)
            for mine, picks in zip(spans, chosen, strict=True)
            for span, pick in zip(mine, picks, strict=True)
            if span.item.modality == modality
        ]
        if not pairs:
            continue
        picks = [pick for _, pick in pairs]
        rows = _rows([item.features for item, _ in pairs], picks)
        output = made.kind(pooler_output=_contain(rows, picks, made.one_tensor), **made.extras)
        depth = len(pairs[0][0].deepstack)
        if depth:
            planes = [_rows([item.deepstack[layer] for item, _ in pairs], picks) for layer in range(depth)]
            output.deepstack_features = [_contain(plane, picks, False) for plane in planes]
        outputs[modality] = output
    return outputs


def _contain(rows: Tensor, picks: Sequence[Chosen], as_tensor: bool) -> Any:
    """Rows [K, d] in the container the model's forward expects: a list, or one tensor."""
    counts = [pick.indices.numel() for pick in picks]
    if not as_tensor:
        return list(rows.split(counts))
    if len(set(counts)) == 1:
        return rows.unflatten(0, (len(counts), counts[0]))
    return rows[None]  # only the total number of rows is read


def _rows(features: Sequence[Tensor], picks: Sequence[Chosen]) -> Tensor:
    """[K, d]: the chosen rows of all images, merged where a selection says so."""
    rows = rows_of(features, [pick.indices for pick in picks])
    if all(pick.merge is None for pick in picks):
        return rows
    starts = [0, *itertools.accumulate(pick.indices.numel() for pick in picks)]
    some = [i for i, pick in enumerate(picks) if pick.merge is not None]
    merges: list[_MergeLike] = [picks[i].merge for i in some]
    source = rows_of([features[i] for i in some], [merge.source for merge in merges]).float()
    destination = shifted([merge.destination.to(rows.device) for merge in merges], [starts[i] for i in some])
    weight = torch.cat([merge.weight.to(rows.device, torch.float32) for merge in merges])[:, None]
    sums = torch.zeros(rows.shape, dtype=torch.float32, device=rows.device).index_add(0, destination, source * weight)
    merged = torch.zeros(rows.shape[0], dtype=torch.bool, device=rows.device).index_fill(0, destination, True)
    return torch.where(merged[:, None], sums.to(rows.dtype), rows)
