"""`encode`: runs a model's vision encoder and projector by themselves, and tells whose image is whose.

transformers takes visual features that were encoded beforehand (`mm_encoder_outputs`) and scatters them, in order,
over the prompt's placeholder tokens. This file calls the private helper with which `generate` itself encodes.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gripvlm.errors import InputError
from gripvlm.models.compat import takes
from gripvlm.models.content_keys import content_keys
from gripvlm.models.encoded import Encoded, Item, Output, Span
from gripvlm.models.families import Family
from gripvlm.models.grids import Rasters
from gripvlm.models.hooks.merge_repeats import merge_repeats
from gripvlm.models.hooks.tower_drop import drop_in_tower
from gripvlm.models.hooks.tower_merge import MergedRows, merge_in_tower
from gripvlm.models.positions import SECONDS, grids_of
from gripvlm.models.prompts import Prompts
from gripvlm.models.repeats import Distinct, find_repeats
from gripvlm.models.text import padding_token
from gripvlm.models.tower_rows import DroppedRows, TowerRequest, capture_tower, split_by_item
from gripvlm.utils.batching import onto

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["PER_TOKEN", "encode", "encoder_arguments", "locate", "padding_of"]

PER_TOKEN: dict[str, int] = {
    "input_ids": 0,
    "attention_mask": 0,
    "position_ids": 0,
    "labels": -100,
    "token_type_ids": 0,
    "mm_token_type_ids": 0,
}
"""Inputs with one entry per prompt token, and what fills their padding (see `padding_of` for `input_ids`)."""


def padding_of(model: PreTrainedModel, name: str) -> int:
    """What fills the padding of an input that has one entry per prompt token."""
    return padding_token(model) if name == "input_ids" else PER_TOKEN[name]


def encoder_arguments(model: PreTrainedModel, given: Mapping[str, Any]) -> list[str]:
    """The inputs that only the vision encoder reads, found as transformers finds them."""
    functions = [getattr(model.base_model, f"get_{modality}_features", None) for modality in ("image", "video")]
    names = {name for function in functions if function is not None for name in takes(function)}
    return [name for name in given if name in names and name not in PER_TOKEN]


def locate(model: PreTrainedModel, ids: Tensor, encoded: Encoded) -> list[list[Span]]:
    """Where each item's placeholders are in the prompts [B, L]: a list (prompts) of lists, in prompt order."""
    return Prompts.of(model, {"input_ids": ids}).with_images(encoded).spans


def encode(prompts: Prompts, family: Family, wanted: TowerRequest) -> Encoded:
    """Runs the vision encoder and projector once over all pixels, and records what `wanted` lists of the tower."""
    model = prompts.model
    # Read from the device before the tower starts.
    repeats = {} if wanted.repeats is None else find_repeats(prompts, wanted.repeats)
    with ExitStack() as stack:
        if wanted.repeats is not None and repeats:
            stack.enter_context(merge_repeats(model, prompts.host, repeats, wanted.repeats.counted))
        merged = None if wanted.merging is None else stack.enter_context(merge_in_tower(model, wanted.merging))
        dropped: Mapping[str, DroppedRows] = {}
        if wanted.dropping is not None:
            dropped = stack.enter_context(drop_in_tower(prompts, family, wanted.dropping))
        capture = stack.enter_context(capture_tower(model, wanted)) if wanted.layers or wanted.patches else None
        # A copy, because the helper removes the pixels from its argument.
        filled = model._prepare_multimodal_encoder_kwargs_for_generation(dict(prompts.inputs))
    outputs = filled["mm_encoder_outputs"]
    groups = None if merged is None else _expand_groups(outputs, merged())

    items = {modality: _items(prompts, family, modality, output) for modality, output in outputs.items()}
    tower = {}
    if capture is not None:
        sizes = {modality: [item.features.shape[0] for item in made] for modality, made in items.items()}
        tower = split_by_item(family.vision, capture, prompts.inputs, sizes, dropped)
    kinds: dict[str, Output] = {}
    samples: list[tuple[Item, ...]] = [() for _ in prompts.ids]
    for modality, output in outputs.items():
        keys = content_keys(prompts.host, modality, len(items[modality])) if wanted.keys else None
        left = dropped[modality].rows if modality in dropped else [None] * len(items[modality])
        made = []
        for i, item in enumerate(items[modality]):
            vision, patches = tower[modality][i] if tower else (item.vision, None)
            key, group = 0 if keys is None else keys[i], None if groups is None else groups[i]
            item = replace(item, key=key, vision=vision, patches=patches, groups=group, tower_rows=left[i])
            made.append(_left(item, repeats[modality][i]) if modality in repeats else item)
        for sample, own in enumerate(_split_by_prompt(prompts, modality, made)):
            samples[sample] += tuple(own)
        extras = {name: getattr(output, name) for name in family.extras}
        kinds[modality] = Output(type(output), isinstance(output.pooler_output, Tensor), extras)

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


def _left(item: Item, distinct: Distinct) -> Item:
    """The item with the rows that are left where repeats were merged ahead of the tower."""
    if len(distinct.rows) == len(distinct.slot):
        return item
    rows = onto(distinct.rows, item.features.device)
    planes = tuple(plane.index_select(0, rows.to(plane.device)) for plane in item.deepstack)
    return replace(item, features=item.features.index_select(0, rows), deepstack=planes, distinct=distinct)


def _items(prompts: Prompts, family: Family, modality: str, output: Any) -> list[Item]:
    """One `Item` for each entry of the encoder's output, or for each part of a joined one."""
    host, rows = prompts.host, list(output.pooler_output)
    if family.joined is not None:
        size = family.joined(prompts.model, host)
        # An entry of no rows is a prompt without images.
        rows = [part for row in rows for part in row.split(size) if part.shape[0]]
    tails: list[Tensor | None] = [None] * len(rows)
    if family.tail:
        rows, tails = [row[: -family.tail] for row in rows], [row[-family.tail :] for row in rows]
    planes = getattr(output, "deepstack_features", None) or ()
    sizes = [row.shape[0] for row in rows]
    grids = family.grid(prompts.model, host, modality, sizes)
    rasters: list[Rasters] = [()] * len(rows)
    if family.rasters is not None and None in grids:
        rasters = family.rasters(prompts.model, host, modality, sizes)
    patches = grids_of(prompts.model, host, modality)
    seconds = host.get(SECONDS) if modality == "video" else None
    return [
        Item(
            modality=modality,
            features=row,
            deepstack=tuple(plane[i] for plane in planes),
            grid=grids[i],
            key=0,
            tail=tails[i],
            patch_grid=None if patches is None else tuple(patches[i].tolist()),
            seconds=None if seconds is None else float(seconds[i]),
            rasters=rasters[i] if grids[i] is None else (),
        )
        for i, row in enumerate(rows)
    ]


def _split_by_prompt(prompts: Prompts, modality: str, items: list[Item]) -> list[list[Item]]:
    """The items of each prompt: they follow one another, as many as fill its placeholders."""
    samples: list[list[Item]] = []
    start = 0
    for sample, columns in enumerate(prompts.placeholders[modality]):
        end, rows = start, 0
        while end < len(items) and rows < len(columns):
            rows += items[end].placeholders
            end += 1
        if rows != len(columns):
            raise InputError(
                f"sample {sample} has {len(columns)} {modality} placeholder tokens, which its {modality}s' {rows} "
                "visual tokens do not fill: make the inputs with the model's own processor, one image for each image "
                "in the text"
            )
        samples.append(items[start:end])
        start = end
    if start < len(items):
        raise InputError(
            f"{len(items) - start} of {len(items)} {modality}s have no placeholder tokens in the prompts: the text "
            "needs one image token for each image"
        )
    return samples
