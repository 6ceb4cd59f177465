"""`drop`: leaves the selected rows of encoded images, and as many placeholders, in the arguments of a model.

Pruning at the input is just that: fewer rows, as many fewer placeholders, and position ids that say where the kept
rows were. The model runs on its own arguments, as transformers has it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from gripvlm.models.adapter import PER_TOKEN, encoder_arguments, padding_of
from gripvlm.models.encoded import Span
from gripvlm.models.positions import full_positions, next_positions, positions_ahead, shortened_positions
from gripvlm.models.prompts import EncodedPrompts
from gripvlm.models.text import full_mask
from gripvlm.types import Selection
from gripvlm.utils.batching import onto, rows_of, shifted

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["DropOptions", "Shortened", "drop", "selected_rows"]


class DropOptions(NamedTuple):
    """How a prompt looks once rows are dropped.

    Attributes:
        renumbered: number the remaining tokens from the start, as if the dropped rows had never been there.
        pad_to_multiple_of: pad to a length that is a multiple of this.
        spare_column: leave a column of padding. `generate` throws away a mask of ones, and without a cache
            transformers then takes gaps in the positions for packed sequences.
    """

    renumbered: bool = False
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


def drop(
    images: EncodedPrompts,
    selections: Sequence[Sequence[Selection]],
    options: DropOptions = DropOptions(),  # noqa: B008  it is immutable
) -> Shortened:
    """The prompts with only the selected rows left.

    Args:
        images: the prompts, and where each image lies in them.
        selections: a list (prompts) of lists, one for each image.
        options: how the prompt looks afterwards.

    Raises:
        InputError: renumbered positions for M-RoPE, or inputs that M-RoPE positions need are missing.
    """
    prompts, _, spans = images
    model, arguments = prompts.model, dict(prompts.inputs)
    arguments["attention_mask"] = mask = full_mask(model, prompts.inputs)
    if arguments.get("position_ids") is None:
        arguments["position_ids"] = full_positions(prompts, spans, mask.device)
    positions = arguments["position_ids"]
    following, ahead = next_positions(model, positions, mask), None

    length = _length(images, selections, options)
    if length is None:
        order = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    else:
        keep = _kept_columns(mask, spans, selections)
        order = _take_columns(model, arguments, keep, length, prompts.padded_right)
        arguments["position_ids"], following = shortened_positions(
            model, arguments["position_ids"], arguments["attention_mask"], following, options.renumbered
        )
        # `generate` counts on from the last column's position, which is too low where that column's row was dropped.
        if prompts.end_in_image and not (options.renumbered or prompts.padded_right):
            ahead = positions_ahead(model, positions, arguments["position_ids"])

    # With pixels left in, the model would encode again and take those rows.
    for name in encoder_arguments(model, arguments):
        arguments.pop(name)
    arguments["mm_encoder_outputs"] = _encoder_outputs(images, selections)
    return Shortened(arguments, mask.shape[1], order, following, ahead)


# --- columns ----------------------------------------------------------------------------------


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


def _kept_columns(mask: Tensor, spans: Sequence[Sequence[Span]], selections: Sequence[Sequence[Selection]]) -> Tensor:
    """[B, L] bool: the prompts' text, and the placeholders of the selected rows of each image."""
    keep = mask.to(torch.bool, memory_format=torch.contiguous_format, copy=True)
    # All images as one index into the flattened batch: a fixed number of operations however many images there are.
    flat = [(span, row * keep.shape[1]) for row, images in enumerate(spans) for span in images]
    positions = [span.positions + start for span, start in flat]
    starts = [0, *itertools.accumulate(len(columns) for columns in positions)]
    rows = shifted([s.indices.to(keep.device) for selected in selections for s in selected], starts[:-1])
    line = keep.view(-1)
    line.index_fill_(0, onto(torch.cat([span.columns + start for span, start in flat]), keep.device), False)
    line.index_fill_(0, onto(torch.cat(positions), keep.device).index_select(0, rows), True)
    return keep


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
        value = arguments[name]
        value = value.expand(*value.shape[:-2], *keep.shape)  # positions may be one row for all prompts
        index = order.expand(*value.shape[:-1], length)  # M-RoPE positions are [axes, B, L]
        arguments[name] = value.gather(-1, index).masked_fill(~real, padding_of(model, name))
    return order


# --- rows -------------------------------------------------------------------------------------


def _encoder_outputs(images: EncodedPrompts, selections: Sequence[Sequence[Selection]]) -> dict[str, Any]:
    """modality -> a fresh output of the encoder's own class that holds the selected rows."""
    items = [span.item for spans in images.spans for span in spans]
    selected = [selection for sample in selections for selection in sample]
    outputs = {}
    for modality, made in images.encoded.outputs.items():
        pairs = [pair for pair in zip(items, selected, strict=True) if pair[0].modality == modality]
        if not pairs:
            continue
        own = [selection for _, selection in pairs]
        counts = [selection.k for selection in own]
        rows = selected_rows([item.features for item, _ in pairs], own)
        tails = [item.tail for item, _ in pairs if item.tail is not None]
        if tails:
            rows = torch.cat([part for pair in zip(rows.split(counts), tails, strict=True) for part in pair])
            counts = [k + tail.shape[0] for k, tail in zip(counts, tails, strict=True)]
        output = made.kind(pooler_output=_in_container(rows, counts, made.one_tensor), **made.extras)
        if depth := len(pairs[0][0].deepstack):
            planes = [selected_rows([item.deepstack[layer] for item, _ in pairs], own) for layer in range(depth)]
            output.deepstack_features = [_in_container(plane, counts, False) for plane in planes]
        outputs[modality] = output
    return outputs


def _in_container(rows: Tensor, counts: list[int], one_tensor: bool) -> Any:
    """Rows [K, d], so many of each item, in the container the model's forward expects: a list, or one tensor."""
    if not one_tensor:
        return list(rows.split(counts))
    if len(set(counts)) == 1:
        return rows.unflatten(0, (len(counts), counts[0]))
    return rows[None]  # forward only reads the total number of rows


def selected_rows(features: Sequence[Tensor], selections: Sequence[Selection]) -> Tensor:
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
