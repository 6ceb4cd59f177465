"""The seam: encode images once, drop rows and placeholders, hand transformers its own arguments.

transformers takes visual features that are encoded beforehand (`mm_encoder_outputs`) and scatters
them, in order, over the prompt's placeholder tokens. So pruning is: fewer rows, as many fewer
placeholders, and position ids that say where the kept ones were. No forward is copied or patched.

This is the only file that calls transformers' private helpers or applies a merge.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from gripvlm.errors import InputError
from gripvlm.models.encoded import Encoded, Item, Span
from gripvlm.models.families import Family
from gripvlm.models.text import full_mask, padding_token, placeholder

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


def encode(model: Any, family: Family, inputs: Mapping[str, Any]) -> Encoded:
    """Runs the vision encoder and projector once over all of `inputs`' pixels."""
    filled = model._prepare_multimodal_encoder_kwargs_for_generation(dict(inputs))
    outputs = filled["mm_encoder_outputs"]
    items: dict[str, list[Item]] = {}
    kinds: dict[str, tuple[type, bool]] = {}
    for modality, output in outputs.items():
        rows = list(output.pooler_output)
        planes = getattr(output, "deepstack_features", None) or ()
        sizes = [row.shape[0] for row in rows]
        grids = family.grid(model, inputs, sizes)
        keys = _content_keys(inputs, len(rows))
        items[modality] = [
            Item(modality, row, tuple(plane[i] for plane in planes), grid, key)
            for i, (row, grid, key) in enumerate(zip(rows, grids, keys, strict=True))
        ]
        kinds[modality] = (type(output), isinstance(output.pooler_output, Tensor))
    ids = inputs["input_ids"]
    shared = {name: _share_out(model, ids, name, made) for name, made in items.items()}
    samples = [tuple(item for name in shared for item in shared[name][b]) for b in range(ids.shape[0])]
    return Encoded(family.model_type, tuple(samples), kinds)


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


def _content_keys(inputs: Mapping[str, Any], count: int) -> list[int]:
    """One number an image, from some of its own pixels: the same in any batch, on any device."""
    pixels = inputs.get("pixel_values")
    if not isinstance(pixels, Tensor) or pixels.shape[0] != count or pixels.ndim < 3:
        return [0] * count
    flat = pixels.detach().reshape(count, -1)
    few = flat[:, :: max(1, flat.shape[1] // 4096)].float().cpu()
    return [int.from_bytes(hashlib.blake2b(row.numpy().tobytes(), digest_size=7).digest(), "little") for row in few]


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
        arguments["position_ids"] = model._prepare_position_ids_for_generation(arguments["input_ids"], dict(arguments))
    if bool(dropped.any()):
        length = min(keep.shape[1], int(keep.sum(-1).max()) + spare_column)
        _compact(model, arguments, keep, length, right=not bool(mask[:, -1].all()))
        _renumber(model, arguments, dropped, positions)
    for name in encoder_arguments(model, arguments):
        arguments.pop(name)
    arguments["mm_encoder_outputs"] = _visual_outputs(encoded, spans, chosen)
    return arguments


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


def _renumber(model: Any, arguments: dict[str, Any], dropped: Tensor, positions: str) -> None:
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
    if (deltas := getattr(model.base_model, "rope_deltas", None)) is not None:
        model.base_model.rope_deltas = deltas + dropped[:, None].to(deltas.device)


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
    for modality, (output_class, was_tensor) in encoded.outputs.items():
        pairs = [
            (span.item, pick)
            for mine, picks in zip(spans, chosen, strict=True)
            for span, pick in zip(mine, picks, strict=True)
            if span.item.modality == modality
        ]
        if not pairs:
            continue
        rows = [_rows(item.features, pick) for item, pick in pairs]
        output = output_class(pooler_output=_contain(rows, was_tensor))
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
