"""Images that are several rasters, such as a whole view and tiles, for pruners that need a grid: one raster at a time.

The budget is shared out in proportion to the rasters' rows. Rows of no raster, newlines and separators, show no place
of the image: they stay only where the budget is more than all rasters hold.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gripvlm.engine.outputs import DeferredChecks, checked_selection, checked_selections
from gripvlm.pruners import LLMPruner, Pruner
from gripvlm.pruners.ops.apportion import nearest
from gripvlm.types import LLMTokens, Merge, Raster, Selection, VisualTokens
from gripvlm.utils.batching import onto

__all__ = ["select_at_layer", "select_batch"]


def select_batch(pruner: Pruner, images: Sequence[VisualTokens], checks: DeferredChecks) -> list[Any]:
    """The pruner's answer for each image, as it is; where an image is several rasters, joined from checked ones."""
    if "grid" not in pruner.needs or not any(_several(tokens) for tokens in images):
        return list(pruner.select_batch(images))
    divided = [_divided(tokens) if _several(tokens) else None for tokens in images]
    asked: list[VisualTokens] = []
    for tokens, parts in zip(images, divided, strict=True):
        asked += [tokens] if parts is None else [part.tokens for part in parts if part.asks]
    answers = iter(checked_selections(pruner, list(pruner.select_batch(asked)), asked, checks) if asked else ())
    return [
        next(answers) if parts is None else _joined(tokens.n, parts, answers)
        for tokens, parts in zip(images, divided, strict=True)
    ]


def select_at_layer(pruner: LLMPruner, layer: int, tokens: LLMTokens, where: str) -> Any:
    """As `select_batch`, before a layer of the language model; `where` is for errors."""
    if "grid" not in pruner.needs or not _several(tokens.input):
        return pruner.select_at_layer(layer, tokens)
    parts = _divided_at_layer(tokens)
    asked = [part.tokens for part in parts if part.asks]
    answers = [checked_selection(pruner.name, pruner.select_at_layer(layer, part), part, where) for part in asked]
    return _joined(tokens.n, parts, iter(answers))


class _Part(NamedTuple):
    """Rows of an image that are chosen from by themselves.

    Attributes:
        rows: [m] which of the image's rows they are, ascending.
        keep: how many of them stay, 0 to m.
        tokens: what the pruner sees of a raster; None for rows of no raster, the first of which stay.
    """

    rows: Tensor
    keep: int
    tokens: Any

    @property
    def asks(self) -> bool:
        """Whether the pruner chooses: not where all rows stay or all go."""
        return self.tokens is not None and 0 < self.keep < self.rows.numel()


def _several(tokens: VisualTokens) -> bool:
    return tokens.grid is None and bool(tokens.rasters)


def _shares(keep: int, sizes: Sequence[int]) -> list[int]:
    """How many of `keep` rows each raster gets, of so many rows; may be 0."""
    shared, total = min(keep, sum(sizes)), max(sum(sizes), 1)
    return nearest(shared, [shared * size / total for size in sizes], [0] * len(sizes), sizes)


def _divided(tokens: VisualTokens) -> list[_Part]:
    rasters, device = tokens.rasters, tokens.features.device
    # Sizes alone decide, so all of it is worked out on the host.
    places = [raster.rows() for raster in rasters]
    free = torch.ones(tokens.n, dtype=torch.bool)
    free[torch.cat(places)] = False
    others, counts = free.nonzero().flatten(), _shares(tokens.keep, [raster.n for raster in rasters])
    parts = []
    for raster, rows, keep in zip(rasters, (onto(rows, device) for rows in places), counts, strict=True):
        parts.append(_Part(rows, keep, _of_raster(tokens, raster, rows, keep)))
    return [*parts, _Part(onto(others, device), tokens.keep - sum(counts), None)]


def _divided_at_layer(tokens: LLMTokens) -> list[_Part]:
    device, image = tokens.rows.device, tokens.input
    parts, free = [], torch.ones_like(tokens.rows, dtype=torch.bool)
    inside = []
    for raster in image.rasters:
        own = onto(raster.rows(), device)
        places = torch.isin(tokens.rows, own).nonzero().flatten()
        free[places] = False
        inside.append((raster, own, places))
    counts = _shares(tokens.keep, [places.numel() for _, _, places in inside])
    for (raster, own, places), keep in zip(inside, counts, strict=True):
        fields: dict[str, Any] = {"rows": torch.searchsorted(own, tokens.rows[places]), "keep": keep}
        for name in ("hidden", "before", "keys", "all_keys", "key_sizes", "values", "rotary"):
            if (value := getattr(tokens, name)) is not None:
                fields[name] = value[places.to(value.device)]
        for name in ("last", "question"):  # [H, n] and [H, t, n]
            if (value := getattr(tokens, name)) is not None:
                fields[name] = value[..., places.to(value.device)]
        # Of the image as it was: some of its rows may have gone before.
        of_raster = _of_raster(image, raster, own.to(image.features.device), raster.n)
        parts.append(_Part(places, keep, replace(tokens, input=of_raster, **fields)))
    return [*parts, _Part(free.nonzero().flatten(), tokens.keep - sum(counts), None)]


def _of_raster(tokens: VisualTokens, raster: Raster, rows: Tensor, keep: int) -> VisualTokens:
    """One raster of an image, as an image of its own."""
    return replace(
        tokens,
        features=tokens.features[rows],
        keep=keep,
        grid=(raster.height, raster.width),
        vision={layer: seen.at(rows) for layer, seen in tokens.vision.items()},
        patches=None if tokens.patches is None else tokens.patches[rows],
        groups=None if tokens.groups is None else tokens.groups[rows],
        first_keys=None if tokens.first_keys is None else tokens.first_keys[rows],
        rasters=(),
    )


def _joined(n: int, parts: Sequence[_Part], answers: Iterator[Selection]) -> Selection:
    """What is kept of all n rows. Scores are left out: those of different rasters were never compared."""
    kept, sources, slots, weights, sound = [], [], [], [], True
    start = 0
    for part in parts:
        if not part.asks:
            kept.append(part.rows[: part.keep])
        else:
            choice = next(answers)
            kept.append(part.rows[choice.indices.to(part.rows.device)])
            sound &= choice.sound
            if choice.merge is not None:
                sources.append(part.rows[choice.merge.source.to(part.rows.device)])
                slots.append(choice.merge.destination.to(part.rows.device) + start)
                weights.append(choice.merge.weight.to(part.rows.device))
        start += part.keep
    # Rasters may lie between one another's rows, so the kept ones are sorted; slots move along.
    order = torch.sort(torch.cat(kept))
    merge = None
    if sources:
        place = torch.empty_like(order.indices)
        place[order.indices] = torch.arange(place.numel(), device=place.device)
        merge = Merge(torch.cat(sources), place[torch.cat(slots)], torch.cat(weights))
    return Selection(order.values, n, merge=merge, sound=sound)
