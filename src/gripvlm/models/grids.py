"""Which rows of which family are a plain raster of one picture, and how high and wide it is: one rule each.

A rule gets the model, its inputs, a modality and the rows of each item, and returns one grid an item: (h, w) with
h * w == n, or None where the item's n rows are no plain raster. A raster rule returns the rasters that such rows are
made of.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from gripvlm.models.vision_rules import TowerItems, packed
from gripvlm.types import Raster

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Inputs: TypeAlias = Mapping[str, Any]
Grid: TypeAlias = tuple[int, int] | None
GridRule: TypeAlias = Callable[["PreTrainedModel", Inputs, str, list[int]], list[Grid]]
Rasters: TypeAlias = tuple[Raster, ...]
RasterRule: TypeAlias = Callable[["PreTrainedModel", Inputs, str, list[int]], list[Rasters]]


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

    None for a video whose rows are one raster a frame after the other; some towers make one of the mean over frames.
    """
    shapes = zip(_in_rows(model, inputs, modality), sizes, strict=True)
    return [(h, w) if t == 1 or h * w == n else None for (t, h, w), n in shapes]


def _in_rows(model: PreTrainedModel, inputs: Inputs, modality: str) -> list[tuple[int, int, int]]:
    """`<modality>_grid_thw`, in rows."""
    merge = merged_edge(model)
    return [(t, h // merge, w // merge) for t, h, w in inputs[f"{modality}_grid_thw"].tolist()]


def merged_edge(model: PreTrainedModel) -> int:
    """The patches along the edge of the square that becomes one row; 1 where the config names none."""
    config, vision = model.config, model.config.vision_config
    if hasattr(vision, "merge_kernel_size"):  # Kimi's name for it, (height, width)
        return int(vision.merge_kernel_size[0])
    edge = getattr(vision, "spatial_merge_size", None) or getattr(config, "spatial_merge_size", None)
    return 1 if edge is None else int(edge)


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


def frames(model: PreTrainedModel, inputs: Inputs, modality: str, sizes: list[int]) -> list[Rasters]:
    """Towers that get `<modality>_grid_thw`: a video's frames (for Qwen's, pairs of frames), one raster each."""
    grids = _in_rows(model, inputs, modality)
    return [tuple(Raster(i * h * w, h, w, w) for i in range(t)) for t, h, w in grids]


def in_lines(model: PreTrainedModel, inputs: Inputs, modality: str, sizes: list[int]) -> list[Rasters]:
    """Models that pack the tiles of an image: the whole view, then all tiles as one raster whose lines end in newlines.

    An image that is not cut has the whole view and one newline behind it. () where the rows are more or fewer, as with
    a CLS row that stays in front.
    """
    vision = model.config.vision_config
    side = vision.image_size // vision.patch_size
    items = TowerItems(model, inputs, modality, sizes)
    # Ones in place of patches: where the model packs zeros, its newline, there is no patch.
    tiles = [torch.ones(count, side * side, 1) for count in packed.tiles_of_images(items)]
    whole, found = Raster(0, side, side, side), []
    for n, rows in zip(sizes, packed.pack(items, tiles), strict=True):
        ends = (rows[whole.n :, 0] < 0.5).nonzero().flatten().tolist()
        lines: Rasters = ()
        if rows.shape[0] == n:
            # Newlines are at the end of each line: the first one is as far from the start as a line is wide.
            lines = (whole, Raster(whole.n, len(ends), ends[0], ends[0] + 1)) if ends[0] else (whole,)
        found.append(lines)
    return found


def in_marked_lines(model: PreTrainedModel, inputs: Inputs, modality: str, sizes: list[int]) -> list[Rasters]:
    """Towers that get `<modality>_grid_thw` and end each line with a newline row, with a row before and one behind."""
    grids = from_patches(model, inputs, modality, [n - 2 for n in sizes])
    lines = [() if grid is None else (Raster(1, *grid, grid[1] + 1),) for grid in grids]
    return [own if own and own[0].height * own[0].stride + 2 == n else () for own, n in zip(lines, sizes, strict=True)]


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
