"""The seam: encode images once, drop rows and placeholders, hand transformers its own arguments.

transformers takes visual features that are encoded beforehand (`mm_encoder_outputs`) and scatters
them, in order, over the prompt's placeholder tokens. So pruning is: fewer rows, as many fewer
placeholders, and position ids that say where the kept ones were. No forward is copied or patched.

This is the only file that calls transformers' private helpers or applies a merge.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from gripvlm.errors import InputError
from gripvlm.models.contents import content_keys
from gripvlm.models.encoded import Encoded, Item, Output, Span
from gripvlm.models.families import Family
from gripvlm.models.merging import Merged, merge_in_tower
from gripvlm.models.text import full_mask, padding_token, placeholder
from gripvlm.models.vision import NOTHING, Asked, share_out, watch_tower

__all__ = ["PER_TOKEN", "encode", "encoder_arguments", "locate", "shorten"]

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
    """The part of a selection that surgery needs."""

    @property
    def indices(self) -> Tensor: ...
    @property
    def merge(self) -> Any: ...


# --- encode -----------------------------------------------------------------------------------


def encode(model: Any, family: Family, inputs: Mapping[str, Any], asked: Asked = NOTHING) -> Encoded:
    """Runs the vision encoder and projector once over all of `inputs`' pixels, noting what is `asked` of the tower."""
    with ExitStack() as stack:
        merged = None if asked.merging is None else stack.enter_context(merge_in_tower(model, asked.merging))
        notes = stack.enter_context(watch_tower(model, asked)) if asked.layers or asked.patches else None
        filled = model._prepare_multimodal_encoder_kwargs_for_generation(dict(inputs))
    groups = None if merged is None else _spread(filled["mm_encoder_outputs"], merged())
    items: dict[str, list[Item]] = {}
    kinds: dict[str, Output] = {}
    for modality, output in filled["mm_encoder_outputs"].items():
        items[modality] = _items(model, family, inputs, modality, output)
        extras = {name: getattr(output, name) for name in family.extras}
        kinds[modality] = Output(type(output), isinstance(output.pooler_output, Tensor), extras)
    if groups is not None:
        items = {
            name: [replace(one, groups=g) for one, g in zip(made, groups, strict=True)] for name, made in items.items()
        }
    if notes is not None:
        sizes = {name: [item.features.shape[0] for item in made] for name, made in items.items()}
        for name, rows in share_out(model, family.vision, inputs, sizes, asked, notes).items():
            pairs = zip(items[name], rows, strict=True)
            items[name] = [replace(item, vision=vision, states=states) for item, (vision, states) in pairs]
    ids = inputs["input_ids"]
    shared = {name: _share_out(model, ids, name, made) for name, made in items.items()}
    samples = [tuple(item for name in shared for item in shared[name][b]) for b in range(ids.shape[0])]
    encoded = Encoded(family.model_type, tuple(samples), kinds, asked=asked)
    in_order = [tuple(span.item for span in spans) for spans in locate(model, ids, encoded)]
    return replace(encoded, samples=tuple(in_order))


def _spread(outputs: Mapping[str, Any], merged: Merged) -> Tensor:
    """Gives every row what the tower made of its group, so that a merged image has as many rows as any other.

    Returns:
        [b, n] the row that each stands in for its group.
    """
    (output,) = outputs.values()
    rows = [one[rank.to(one.device)] for one, rank in zip(output.pooler_output, merged.rank, strict=True)]
    output.pooler_output = torch.stack(rows) if isinstance(output.pooler_output, Tensor) else rows
    return merged.groups


def _items(model: Any, family: Family, inputs: Mapping[str, Any], modality: str, output: Any) -> list[Item]:
    """One `Item` for each entry of the encoder's output, or for each part of a joined one."""
    rows = list(output.pooler_output)
    if family.joined is not None:
        one = family.joined(model, inputs)
        rows = [part for row in rows for part in row.split(one) if part.shape[0]]  # none: a prompt without images
    sizes = [row.shape[0] for row in rows]
    planes = getattr(output, "deepstack_features", None) or ()
    grids = family.grid(model, inputs, modality, sizes)
    keys = content_keys(inputs, modality, len(rows))
    told = inputs.get(f"{modality}_grid_thw")
    patches = [None] * len(rows) if told is None else [(t, h, w) for t, h, w in told.tolist()]
    return [
        Item(modality, row, tuple(plane[i] for plane in planes), grids[i], keys[i], patches[i])
        for i, row in enumerate(rows)
    ]


def _share_out(model: Any, ids: Tensor, modality: str, items: list[Item]) -> list[list[Item]]:
    """The items of each prompt: they follow one another, as many as fill its placeholders."""
    counts = (ids == placeholder(model, modality)).sum(-1).tolist()
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


# --- where things are in the prompt -------------------------------------------------------------


def locate(model: Any, ids: Tensor, encoded: Encoded) -> list[list[Span]]:
    """Where each item's placeholders are: a list (samples) of lists of `Span`, in prompt order.

    Raises:
        InputError: the prompts' placeholders and the encoded rows do not match in number.
    """
    if ids.shape[0] != len(encoded):
        raise InputError(f"{ids.shape[0]} prompts, but images are encoded for {len(encoded)}")
    samples = []
    for sample, (row, items) in enumerate(zip(ids, encoded.samples, strict=True)):
        spans = []
        for modality in encoded.outputs:
            mine = [item for item in items if item.modality == modality]
            positions = (row == placeholder(model, modality)).nonzero().flatten()
            sizes = [item.features.shape[0] for item in mine]
            if positions.numel() != sum(sizes):
                raise InputError(
                    f"sample {sample} has {positions.numel()} {modality} placeholder tokens, but "
                    f"{sum(sizes)} visual tokens are encoded for it"
                )
            spans += [Span(*pair) for pair in zip(mine, positions.split(sizes), strict=True)]
        samples.append(sorted(spans, key=lambda span: int(span.positions[0])))
    return samples


# --- surgery ------------------------------------------------------------------------------------


def shorten(
    model: Any,
    inputs: Mapping[str, Any],
    encoded: Encoded,
    spans: Sequence[Sequence[Span]],
    chosen: Sequence[Sequence[Chosen]],
    positions: str,
    spare_column: bool = False,
) -> dict[str, Any]:
    """Arguments for `generate` or `forward` in which only the chosen rows are left.

    Per-token inputs lose the placeholders of dropped rows and are padded again on the side they
    were padded on. Where nothing is dropped they stay as they are, so that the run is the
    unpruned one bit for bit. `attention_mask` (2D) and `position_ids` are always there.

    `spare_column` leaves a column of padding after dropping. `generate` throws away a mask of ones,
    and without a cache transformers then takes gaps in the positions for packed sequences.
    """
    arguments = dict(inputs)
    arguments["attention_mask"] = mask = full_mask(model, inputs)
    keep = mask.to(torch.bool, copy=True)
    for row, mine, picks in zip(keep, spans, chosen, strict=True):
        for span, pick in zip(mine, picks, strict=True):
            row[span.positions] = False
            row[span.positions[pick.indices.to(span.positions.device)]] = True
    dropped = mask.bool().sum(-1) - keep.sum(-1)  # [B]
    if arguments.get("position_ids") is None:
        arguments["position_ids"] = _full_positions(model, arguments, spans)
    if bool(dropped.any()):
        length = min(keep.shape[1], int(keep.sum(-1).max()) + spare_column)
        _compact(model, arguments, keep, length, right=not bool(mask[:, -1].all()))
        _renumber(model, arguments, positions)
    for name in encoder_arguments(model, arguments):
        arguments.pop(name)
    arguments["mm_encoder_outputs"] = _visual_outputs(encoded, spans, chosen)
    return arguments


def _full_positions(model: Any, inputs: Mapping[str, Any], spans: Sequence[Sequence[Span]]) -> Tensor:
    """Position ids of the full prompt, as the model itself would make them.

    [B, L], or [axes, B, L] for M-RoPE, which needs to know the items' patches; those are the
    encoded items' own, so that an encoding serves any prompts it fits.
    """
    told: dict[str, list[tuple[int, int, int]]] = {}
    for mine in spans:
        for span in mine:
            if span.item.patches is not None:
                told.setdefault(f"{span.item.modality}_grid_thw", []).append(span.item.patches)
    if told and inputs.get("mm_token_type_ids") is None:
        raise InputError(
            "mm_token_type_ids are missing, without which this model's positions are wrong: pass "
            "everything the processor returns"
        )
    ids = inputs["input_ids"]
    grids = {name: torch.tensor(rows, device=ids.device) for name, rows in told.items()}
    return model._prepare_position_ids_for_generation(ids, dict(inputs) | grids)


def _compact(model: Any, arguments: dict[str, Any], keep: Tensor, length: int, right: bool) -> None:
    """Leaves the entries that `keep` [B, L] marks in every per-token input, padded to `length`."""
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


def _renumber(model: Any, arguments: dict[str, Any], positions: str) -> None:
    """Position ids after dropping: as they were, or counted anew."""
    now = arguments["position_ids"]
    mask = arguments["attention_mask"].long()
    counted = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)
    if now.ndim == 2:
        if positions == "renumbered":
            arguments["position_ids"] = counted
        return
    if positions == "renumbered":
        raise InputError(
            "positions='renumbered' is not defined for models with M-RoPE, whose positions are "
            "coordinates in the image: leave positions='original'"
        )
    if now.shape[0] == 4:  # text row + t, h, w: the text row only counts tokens
        arguments["position_ids"] = torch.cat((counted[None], now[1:]))
    if hasattr(model.base_model, "rope_deltas"):  # what a manual decoding loop adds to the tokens it counts
        beyond = now[-3:].masked_fill(mask == 0, -1).amax(dim=(0, 2)) + 1
        model.base_model.rope_deltas = (beyond - mask.sum(-1))[:, None]


def encoder_arguments(model: Any, given: Mapping[str, Any]) -> list[str]:
    """The inputs that only the vision encoder reads, found as transformers finds them."""
    names: set[str] = set()
    for modality in ("image", "video"):
        function = getattr(model.base_model, f"get_{modality}_features", None)
        if function is not None:
            names.update(inspect.signature(function).parameters)
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
        rows = [_rows(item.features, pick) for item, pick in pairs]
        output = made.kind(pooler_output=_contain(rows, made.one_tensor), **made.extras)
        depth = len(pairs[0][0].deepstack)
        if depth:
            output.deepstack_features = [
                [_rows(item.deepstack[layer], pick) for item, pick in pairs] for layer in range(depth)
            ]
        outputs[modality] = output
    return outputs


def _contain(rows: list[Tensor], as_tensor: bool) -> Any:
    """Rows in the container the model's forward expects: a list, or one tensor."""
    if not as_tensor:
        return rows
    if len({row.shape[0] for row in rows}) == 1:
        return torch.stack(rows)
    return torch.cat(rows)[None]  # only the total number of rows is read


def _rows(features: Tensor, pick: Chosen) -> Tensor:
    """[k, d]: the chosen rows, merged where the selection says so."""
    rows = features.index_select(0, pick.indices.to(features.device))
    merge: _MergeLike | None = pick.merge
    if merge is None:
        return rows
    source, destination = merge.source.to(rows.device), merge.destination.to(rows.device)
    weight = merge.weight.to(rows.device, torch.float32)[:, None]
    sums = torch.zeros(rows.shape, dtype=torch.float32, device=rows.device)
    sums.index_add_(0, destination, features.index_select(0, source).float() * weight)
    merged = torch.zeros(rows.shape[0], dtype=torch.bool, device=rows.device)
    merged[destination] = True
    return torch.where(merged[:, None], sums.to(rows.dtype), rows)
