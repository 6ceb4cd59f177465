"""Which rows of which family are a plain raster of one picture, and how high and wide it is: one rule each.

A rule gets the model, its inputs, a modality and the rows of each item, and returns one grid an item: (h, w) with
h * w == n, or None where the item's n rows are no plain raster.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Inputs: TypeAlias = Mapping[str, Any]
Grid: TypeAlias = tuple[int, int] | None
GridRule: TypeAlias = Callable[["PreTrainedModel", Inputs, str, list[int]], list[Grid]]


def square(model: PreTrainedModel, inputs: Inputs, modality: str, sizes: list[int]) -> list[Grid]:
    """Towers whose items are square: n = h * h."""
    return [_factor(n, 1, 1) for n in sizes]


def from_pixels(model: PreTrainedModel, inputs: Inputs, modality: str, sizes: list[int]) -> list[Grid]:
    """Towers that see each image whole: h / w is the image's own height / width.

    Needs no patch size, so it serves any tower whose rows are one square patch (or one square block of them) each.
    None if n has no such factors (for instance, if a CLS row stays in front).
    """
    # Where a processor pads pixels to the largest image, it also says how large each one is.
    shapes = inputs.get("image_sizes")
    if shapes is None:
        shapes = [inputs["pixel_values"].shape[-2:]] * len(sizes)
    return [_factor(n, int(height), int(width)) for n, (height, width) in zip(sizes, shapes, strict=True)]


def from_patches(model: PreTrainedModel, inputs: Inputs, modality: str, sizes: list[int]) -> list[Grid]:
    """Towers that get `<modality>_grid_thw`, in patches before merging.

    None for a video of several frames: its rows are one raster after the other.
    """
    merge = model.config.vision_config.spatial_merge_size
    grids = inputs[f"{modality}_grid_thw"].tolist()
    return [(h // merge, w // merge) if t == 1 else None for t, h, w in grids]


def from_coordinates(model: PreTrainedModel, inputs: Inputs, modality: str, sizes: list[int]) -> list[Grid]:
    """Towers that get each patch's (x, y), -1 for padding, and may pool square blocks."""
    grids: list[Grid] = []
    for n, places in zip(sizes, inputs[f"{modality}_position_ids"], strict=True):
        w, h = (int(places[:, axis].max() + 1) for axis in (0, 1))
        grids.append(_merged(n, h, w))
    return grids


def from_shapes(model: PreTrainedModel, inputs: Inputs, modality: str, sizes: list[int]) -> list[Grid]:
    """Towers that get `spatial_shapes` [images, 2] in patches and merge square blocks, the last ones padded."""
    block = model.config.downsample_factor
    shapes = [(-(-int(h) // block), -(-int(w) // block)) for h, w in inputs["spatial_shapes"]]
    return [(h, w) if h * w == n else None for (h, w), n in zip(shapes, sizes, strict=True)]


def from_targets(model: PreTrainedModel, inputs: Inputs, modality: str, sizes: list[int]) -> list[Grid]:
    """Towers that get `target_sizes` [items, 2] in patches and merge square blocks."""
    return [_merged(n, int(h), int(w)) for n, (h, w) in zip(sizes, inputs["target_sizes"], strict=True)]


def unknown(model: PreTrainedModel, inputs: Inputs, modality: str, sizes: list[int]) -> list[Grid]:
    """No grid: rows are no plain raster (tiles joined, newline rows in between)."""
    return [None] * len(sizes)


def _merged(n: int, height: int, width: int) -> Grid:
    """The grid of n rows that are square blocks of height x width patches, or None."""
    block = max(1, math.isqrt(height * width // n))
    h, w = height // block, width // block
    return (h, w) if h * w == n else None


def _factor(n: int, height: int, width: int) -> Grid:
    """(h, w) with h * w == n and h / w within a tenth of height / width, or None."""
    # A tenth: processors round edges to whole patches, so a raster is never quite as long as its image.
    h = max(1, round(math.sqrt(n * height / width)))
    w = n // h
    return (h, w) if h * w == n and abs(math.log(h * width / (w * height))) < 0.1 else None
