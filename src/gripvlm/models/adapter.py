"""`encode` images once, then `drop` rows and placeholders: transformers runs on its own arguments.

transformers takes visual features that are encoded beforehand (`mm_encoder_outputs`) and scatters them, in order,
over the prompt's placeholder tokens. So pruning is: fewer rows, as many fewer placeholders, and position ids that say
where the kept rows were. This file calls the two private helpers with which `generate` itself prepares encoder
outputs and positions.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from gripvlm.errors import InputError
from gripvlm.models.compat import takes
from gripvlm.models.content_keys import content_keys
from gripvlm.models.encoded import Encoded, Item, Output, Span
from gripvlm.models.families import Family
from gripvlm.models.hooks.tower_merge import MergedRows, merge_in_tower
from gripvlm.models.prompts import EncodedPrompts, Prompts
from gripvlm.models.text import full_mask, padding_token
from gripvlm.models.tower_rows import TowerRequest, capture_tower, split_by_item
from gripvlm.types import Selection
from gripvlm.utils.batching import onto, rows_of, shifted

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["PER_TOKEN", "DropOptions", "Shortened", "drop", "encode", "encoder_arguments", "locate"]

PER_TOKEN: dict[str, int] = {
    "input_ids": 0,
    "attention_mask": 0,
    "position_ids": 0,
    "labels": -100,
    "token_type_ids": 0,
    "mm_token_type_ids": 0,
}
"""Inputs with one entry per prompt token, and what fills their padding (`input_ids`: the pad token)."""

_SECONDS = "second_per_grid_ts"
"""Qwen2.5-VL: seconds between two temporal patches of each video, from which its positions are made."""


class DropOptions(NamedTuple):
    """How a prompt looks once rows are dropped.

    Attributes:
        positions: "original" or "renumbered", see `gripvlm.prune_inputs`.
        pad_to_multiple_of: pad to a length that is a multiple of this.
        spare_column: leave a column of padding. `generate` throws away a mask of ones, and without a cache
            transformers then takes gaps in the positions for packed sequences.
    """

    positions: str = "original"
    pad_to_multiple_of: int = 1
    spare_column: bool = False


class Shortened(NamedTuple):
    """What `drop` made of prompts of L columns.

    Attributes:
        arguments: for `generate` or `forward`.
        full: L.
        order: [B, l] the columns of the full prompt that are left.
        following: [B], or [axes, B] for M-RoPE, the position of the first token after the prompt.
        ahead: [B] or [axes, B], by how much the prompt's last position is behind the full prompt's, where an image
            ends a prompt and its last row was dropped; else None.
    """

    arguments: dict[str, Any]
    full: int
    order: Tensor
    following: Tensor
    ahead: Tensor | None


def encoder_arguments(model: PreTrainedModel, given: Mapping[str, Any]) -> list[str]:
    """The inputs that only the vision encoder reads, found as transformers finds them."""
    functions = [getattr(model.base_model, f"get_{modality}_features", None) for modality in ("image", "video")]
    names = {name for function in functions if function is not None for name in takes(function)}
    return [name for name in given if name in names and name not in PER_TOKEN]


def locate(model: PreTrainedModel, ids: Tensor, encoded: Encoded) -> list[list[Span]]:
    """Where each item's placeholders are in the prompts [B, L]: a list (prompts) of lists, in prompt order."""
    return Prompts.of(model, {"input_ids": ids}).with_images(encoded).spans


# --- encode -----------------------------------------------------------------------------------


def encode(prompts: Prompts, family: Family, wanted: TowerRequest) -> Encoded:
    """Runs the vision encoder and projector once over all pixels, noting what is `wanted` of the tower."""
    model = prompts.model
    with ExitStack() as stack:
        merged = None if wanted.merging is None else stack.enter_context(merge_in_tower(model, wanted.merging))
        capture = stack.enter_context(capture_tower(model, wanted)) if wanted.layers or wanted.patches else None
        filled = model._prepare_multimodal_encoder_kwargs_for_generation(dict(prompts.inputs))
    outputs = filled["mm_encoder_outputs"]
    groups = None if merged is None else _expand_groups(outputs, merged())
    items: dict[str, list[Item]] = {}
    kinds: dict[str, Output] = {}
    for modality, output in outputs.items():
        items[modality] = _items(prompts, family, modality, output)
        if wanted.keys:
            keys = content_keys(prompts.host, modality, len(items[modality]))
            items[modality] = [replace(item, key=key) for item, key in zip(items[modality], keys, strict=True)]
        if groups is not None:
            items[modality] = [replace(item, groups=g) for item, g in zip(items[modality], groups, strict=True)]
        extras = {name: getattr(output, name) for name in family.extras}
        kinds[modality] = Output(type(output), isinstance(output.pooler_output, Tensor), extras)
    if capture is not None:
        sizes = {name: [item.features.shape[0] for item in made] for name, made in items.items()}
        for name, rows in split_by_item(family.vision, capture, prompts.inputs, sizes).items():
            pairs = zip(items[name], rows, strict=True)
            items[name] = [replace(item, vision=vision, patches=patches) for item, (vision, patches) in pairs]
    samples: list[tuple[Item, ...]] = [() for _ in prompts.ids]
    for modality, made in items.items():
        for sample, own in enumerate(_split_by_prompt(prompts, modality, made)):
            samples[sample] += tuple(own)
    encoded = Encoded(family.model_type, tuple(samples), kinds, tower_request=wanted)
    # Items were put together modality by modality; spans are in the order in which the prompt has them.
    spans = prompts.with_images(encoded).spans
    return replace(encoded, samples=tuple(tuple(span.item for span in images) for images in spans))


def _expand_groups(outputs: Mapping[str, Any], merged: MergedRows) -> Tensor:
    """Gives every row what the tower made of its group, so that a merged image has as many rows as any other.

    Returns:
        [b, n] the row that stands for each row's group.
    """
    (output,) = outputs.values()
    rows = [image[rank.to(image.device)] for image, rank in zip(output.pooler_output, merged.rank, strict=True)]
    output.pooler_output = torch.stack(rows) if isinstance(output.pooler_output, Tensor) else rows
    return merged.groups


def _items(prompts: Prompts, family: Family, modality: str, output: Any) -> list[Item]:
    """One `Item` for each entry of the encoder's output, or for each part of a joined one."""
    host, rows = prompts.host, list(output.pooler_output)
    if family.joined is not None:
        size = family.joined(prompts.model, host)
        # An entry of no rows is a prompt without images.
        rows = [part for row in rows for part in row.split(size) if part.shape[0]]
    planes = getattr(output, "deepstack_features", None) or ()
    grids = family.grid(prompts.model, host, modality, [row.shape[0] for row in rows])
    thw = host.get(f"{modality}_grid_thw")
    seconds = host.get(_SECONDS) if modality == "video" else None
    return [
        Item(
            modality=modality,
            features=row,
            deepstack=tuple(plane[i] for plane in planes),
            grid=grids[i],
            key=0,
            grid_thw=None if thw is None else tuple(thw[i].tolist()),
            seconds=None if seconds is None else float(seconds[i]),
        )
        for i, row in enumerate(rows)
    ]


def _split_by_prompt(prompts: Prompts, modality: str, items: list[Item]) -> list[list[Item]]:
    """The items of each prompt: they follow one another, as many as fill its placeholders."""
    samples: list[list[Item]] = []
    rest = list(items)
    for sample, columns in enumerate(prompts.placeholders[modality]):
        own: list[Item] = []
        rows = 0
        while rest and rows < len(columns):
            own.append(rest.pop(0))
            rows += own[-1].features.shape[0]
        if rows != len(columns):
            raise InputError(
                f"sample {sample} has {len(columns)} {modality} placeholder tokens, which its {modality}s' {rows} "
                "visual tokens do not fill: make the inputs with the model's own processor, one image for each image "
                "in the text"
            )
        samples.append(own)
    if rest:
        raise InputError(
            f"{len(rest)} of {len(items)} {modality}s have no placeholder tokens in the prompts: the text needs one "
            "image token for each image"
        )
    return samples


# --- drop -------------------------------------------------------------------------------------


def drop(
    images: EncodedPrompts,
    selections: Sequence[Sequence[Selection]],
    options: DropOptions = DropOptions(),  # noqa: B008  it is immutable
) -> Shortened:
    """Arguments for `generate` or `forward` in which only the selected rows are left.

    Inputs with one entry per token lose the placeholders of dropped rows and are padded again on the side they were
    padded on. Where nothing is dropped or padded they stay as they are, so that the run is the unpruned one bit for
    bit. `attention_mask` (2D) and `position_ids` are always there. Nothing here waits for an accelerator.

    Args:
        images: prompts of L columns and their images, from `Prompts.with_images`.
        selections: one for each image, in prompt order; taken as they are, without checks.
        options: how the prompt looks afterwards.

    Raises:
        InputError: "renumbered" positions for M-RoPE, or inputs that M-RoPE positions need are missing.
    """
    prompts, encoded, spans = images
    model = prompts.model
    arguments = dict(prompts.inputs)
    arguments["attention_mask"] = mask = full_mask(model, prompts.inputs)
    if arguments.get("position_ids") is None:
        arguments["position_ids"] = _full_positions(prompts, spans, mask.device)
    width = mask.shape[1]
    length = _length(images, selections, options)
    following, ahead = _following(arguments["position_ids"], mask), None
    if length is None:
        order = torch.arange(width, device=mask.device).expand_as(mask)
    else:
        last = arguments["position_ids"][..., -1]
        keep = _kept_columns(mask, spans, selections)
        order = _take_columns(model, arguments, keep, length, prompts.padded_right)
        following = _renumber(model, arguments, options.positions, following)
        if options.positions == "original" and not prompts.padded_right and prompts.end_in_image:
            ahead = last - arguments["position_ids"][..., -1]
            if ahead.ndim == 2:  # M-RoPE: only t, h, w; the text row, where there is one, merely counts tokens
                ahead = torch.cat((torch.zeros_like(ahead[:-3]), ahead[-3:]))
    # With pixels left in, the model would encode again and take those rows.
    for name in encoder_arguments(model, arguments):
        arguments.pop(name)
    arguments["mm_encoder_outputs"] = _encoder_outputs(encoded, spans, selections)
    return Shortened(arguments, width, order, following, ahead)


def _length(images: EncodedPrompts, selections: Sequence[Sequence[Selection]], options: DropOptions) -> int | None:
    """Columns of the shortened prompts; None where no column changes."""
    before = images.prompts.mask.sum(-1).tolist()
    after = list(before)
    for sample, (spans, selected) in enumerate(zip(images.spans, selections, strict=True)):
        after[sample] += sum(selection.k - span.real for span, selection in zip(spans, selected, strict=True))
    width = images.prompts.ids.shape[1]
    length = width if after == before else min(width, max(after) + options.spare_column)
    length += -length % options.pad_to_multiple_of
    return None if after == before and length == width else length


def _following(positions: Tensor, mask: Tensor) -> Tensor:
    """[B], or [axes, B] for M-RoPE: the position of the first token after the full prompt."""
    after = positions.masked_fill(mask == 0, -1).amax(-1) + 1
    if after.ndim == 2:  # text goes on after the largest coordinate, the same on all axes
        after = torch.cat((after[:-3], after[-3:].amax(0).expand(3, -1)))
    return after


def _kept_columns(mask: Tensor, spans: Sequence[Sequence[Span]], selections: Sequence[Sequence[Selection]]) -> Tensor:
    """[B, L] bool: the prompts' text, and the placeholders of the selected rows of each image."""
    keep = mask.to(torch.bool, memory_format=torch.contiguous_format, copy=True)
    # All images as one index into the flattened batch: a fixed number of operations however many images there are.
    flat = [span.positions + row * keep.shape[1] for row, images in enumerate(spans) for span in images]
    starts = [0, *itertools.accumulate(len(columns) for columns in flat)]
    columns = onto(torch.cat(flat), keep.device)
    rows = shifted([s.indices.to(keep.device) for selected in selections for s in selected], starts[:-1])
    line = keep.view(-1)
    line.index_fill_(0, columns, False)
    line.index_fill_(0, columns.index_select(0, rows), True)
    return keep


def _full_positions(prompts: Prompts, spans: Sequence[Sequence[Span]], device: torch.device) -> Tensor:
    """Position ids of the full prompt, [B, L] or [axes, B, L] for M-RoPE, as the model itself would make them.

    M-RoPE needs the items' grids. They are taken from the encoded items, not from the inputs, so that one encoding
    serves any prompts it fits.
    """
    model, inputs = prompts.model, dict(prompts.host)
    inputs["attention_mask"] = full_mask(model, inputs)
    grids: dict[str, list[Any]] = {}
    for item in (span.item for images in spans for span in images):
        if item.grid_thw is not None:
            grids.setdefault(f"{item.modality}_grid_thw", []).append(item.grid_thw)
        if item.seconds is not None:
            grids.setdefault(_SECONDS, []).append(item.seconds)
    if grids and inputs.get("mm_token_type_ids") is None:
        raise InputError(
            "mm_token_type_ids are missing, without which this model's positions are wrong: pass everything the "
            "processor returns"
        )
    inputs |= {name: torch.tensor(values) for name, values in grids.items()}
    # Made on the host, from the host's copies: on an accelerator this helper would wait many times.
    positions: Tensor = model._prepare_position_ids_for_generation(inputs["input_ids"], inputs)
    deltas = getattr(model.base_model, "rope_deltas", None)
    if isinstance(deltas, Tensor):  # the helper has just left them on the host
        model.base_model.rope_deltas = onto(deltas, device)
    return onto(positions, device)


def _take_columns(
    model: PreTrainedModel, arguments: dict[str, Any], keep: Tensor, length: int, padded_right: bool
) -> Tensor:
    """Leaves the columns that `keep` [B, L] marks in every per-token argument, padded to `length`.

    Returns:
        [B, length] the columns that are left; some are dropped ones, which the mask hides.
    """
    present = [name for name in PER_TOKEN if arguments.get(name) is not None]
    if (more := length - keep.shape[1]) > 0:
        side = (0, more) if padded_right else (more, 0)
        keep = pad(keep, side, value=False)
        arguments.update({name: pad(arguments[name], side) for name in present})
    # A stable sort puts the kept columns side by side, in order, and the others where padding belongs.
    order = torch.sort(keep.int(), dim=-1, descending=padded_right, stable=True).indices
    order = order[:, :length] if padded_right else order[:, -length:]
    real = keep.gather(-1, order)
    for name in present:
        fill = padding_token(model) if name == "input_ids" else PER_TOKEN[name]
        value = arguments[name]
        value = value.expand(*value.shape[:-2], *keep.shape)  # positions may be one row for all prompts
        index = order.expand(*value.shape[:-1], length)  # M-RoPE positions are [axes, B, L]
        arguments[name] = value.gather(-1, index).masked_fill(~real, fill)
    return order


def _renumber(model: PreTrainedModel, arguments: dict[str, Any], positions: str, following: Tensor) -> Tensor:
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
            "positions='renumbered' is not defined for models with M-RoPE, whose positions are coordinates in the "
            "image: leave positions='original'"
        )
    if hasattr(model.base_model, "rope_deltas"):  # what a caller's own decoding loop adds to the tokens it counts
        model.base_model.rope_deltas = (following[-1] - mask.sum(-1))[:, None]
    if now.shape[0] == 4:  # text row + t, h, w: the text row only counts tokens
        arguments["position_ids"] = torch.cat((counted[None], now[1:]))
        return torch.cat((mask.sum(-1)[None], following[1:]))
    return following


def _encoder_outputs(
    encoded: Encoded, spans: Sequence[Sequence[Span]], selections: Sequence[Sequence[Selection]]
) -> dict[str, Any]:
    """modality -> a fresh output of the encoder's own class that holds the selected rows."""
    items = [span.item for images in spans for span in images]
    selected = [selection for sample in selections for selection in sample]
    outputs = {}
    for modality, made in encoded.outputs.items():
        pairs = [pair for pair in zip(items, selected, strict=True) if pair[0].modality == modality]
        if not pairs:
            continue
        own = [selection for _, selection in pairs]
        rows = _selected_rows([item.features for item, _ in pairs], own)
        output = made.kind(pooler_output=_in_container(rows, own, made.one_tensor), **made.extras)
        depth = len(pairs[0][0].deepstack)
        if depth:
            planes = [_selected_rows([item.deepstack[layer] for item, _ in pairs], own) for layer in range(depth)]
            output.deepstack_features = [_in_container(plane, own, False) for plane in planes]
        outputs[modality] = output
    return outputs


def _in_container(rows: Tensor, selections: Sequence[Selection], one_tensor: bool) -> Any:
    """Rows [K, d] in the container the model's forward expects: a list, or one tensor."""
    counts = [selection.k for selection in selections]
    if not one_tensor:
        return list(rows.split(counts))
    if len(set(counts)) == 1:
        return rows.unflatten(0, (len(counts), counts[0]))
    return rows[None]  # forward only reads the total number of rows


def _selected_rows(features: Sequence[Tensor], selections: Sequence[Selection]) -> Tensor:
    """[K, d]: the selected rows of all images, merged where a selection says so."""
    rows = rows_of(features, [selection.indices for selection in selections])
    starts = itertools.accumulate((selection.k for selection in selections), initial=0)
    merges = [
        (image, selection.merge, start)
        for image, selection, start in zip(features, selections, starts, strict=False)
        if selection.merge is not None
    ]
    if not merges:
        return rows
    source = rows_of([image for image, _, _ in merges], [merge.source for _, merge, _ in merges]).float()
    slots = [merge.destination.to(rows.device) for _, merge, _ in merges]
    destination = shifted(slots, [start for _, _, start in merges])
    weight = torch.cat([merge.weight.to(rows.device, torch.float32) for _, merge, _ in merges])[:, None]
    sums = torch.zeros(rows.shape, dtype=torch.float32, device=rows.device).index_add(0, destination, source * weight)
    merged = torch.zeros(rows.shape[0], dtype=torch.bool, device=rows.device).index_fill(0, destination, True)
    return torch.where(merged[:, None], sums.to(rows.dtype), rows)
