"""Pictures of what was kept where one image is several visual items: tiles and a whole view, or frames of a video.

Each part is a picture of its own: the tiles side by side as they were cut, the thumbnail of the whole, each frame.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gripvlm.eval.records import TokenMask
from gripvlm.report.cells import Box, Geometry, GeometryError, geometry

__all__ = ["Part", "layout"]


@dataclass(frozen=True)
class Part:
    """One picture to draw.

    Attributes:
        name: "" where it is the only one, "tiles", "whole", or "frame 0" and so on.
        geometry: where each of its cells lies in the user's picture (or frame).
        start: the first of its cells among all rows of the image, items one after the other.
    """

    name: str
    geometry: Geometry
    start: int

    def of(self, selections: Sequence[Any]) -> TokenMask:
        """What of it was kept, from the image's selections (one an item, in order), to hand to `overlay`."""
        kept = torch.cat([selection.mask() for selection in selections])
        merge = next((selection.merge for selection in selections if selection.merge is not None), None)
        return TokenMask(kept[self.start : self.start + len(self.geometry.boxes)], merge=merge)


def layout(
    processor: Any,
    image_size: tuple[int, int],
    grids: Sequence[tuple[int, int] | None],
    patches: tuple[int, int, int] | None = None,
) -> list[Part]:
    """The pictures to draw of one image, or of a video, so that every visual token is in one of them.

    Args:
        processor: a processor, an image processor or a video processor.
        image_size: (width, height) of the original image or frame.
        grids: (h, w) of each of its visual items, in order.
        patches: (t, h, w) before merging, for a video: its item's `patches`. A frame here is what the tower takes
            for one, two frames of the video for Qwen's.

    Raises:
        GeometryError: rows that are no raster, or a processor whose tiles are not known here. Nothing is guessed.
    """
    if patches is not None and patches[0] > 1:
        return _frames(processor, image_size, patches)
    images = getattr(processor, "image_processor", processor)
    if len(grids) == 1:
        whole = (
            _tiled(image_size, 1, 1, _raster(grids[0])) if _cuts(images) else geometry(processor, image_size, grids[0])
        )
        return [Part("", whole, 0)]
    raster = {_raster(grid) for grid in grids}
    if len(raster) != 1 or not _cuts(images):
        raise GeometryError(
            f"{len(grids)} visual items with grids {sorted(raster)} of one image, which {type(images).__name__} is not "
            "known to make: leave the overlay out"
        )
    (cell,) = raster
    rows, columns = _cut(images, image_size, len(grids))
    cut = _tiled(image_size, rows, columns, cell)
    return [Part("tiles", cut, 0), Part("whole", _tiled(image_size, 1, 1, cell), len(cut.boxes))]


def _frames(processor: Any, size: tuple[int, int], patches: tuple[int, int, int]) -> list[Part]:
    videos = getattr(processor, "video_processor", processor)
    t, h, w = patches
    merge = getattr(videos, "merge_size", None)
    if merge is None:
        raise GeometryError(
            f"{type(videos).__name__} does not say how many patches make a token (merge_size): leave the overlay out"
        )
    one = geometry(videos, size, (h // merge, w // merge))
    return [Part(f"frame {i}", one, i * len(one.boxes)) for i in range(t)]


def _raster(grid: tuple[int, int] | None) -> tuple[int, int]:
    if grid is None:
        raise GeometryError("the visual tokens of this model are no plain raster of the image: leave the overlay out")
    return grid


def _cuts(images: Any) -> bool:
    """Whether the processor stretches an image to whole tiles, as InternVL's and Idefics3's do."""
    return hasattr(images, "crop_to_patches") or bool(getattr(images, "do_image_splitting", False))


def _cut(images: Any, size: tuple[int, int], items: int) -> tuple[int, int]:
    """(rows, columns) of the tiles of an image that became so many items, the last of them the whole view."""
    width, height = size
    if hasattr(images, "crop_to_patches"):
        canvas = sys.modules[type(images).__module__].get_optimal_tiled_canvas
        side = _sides(images.size)
        columns, rows = canvas((height, width), side, images.min_patches, images.max_patches)
    else:
        _, rows, columns = images.get_number_of_image_patches(height, width)
    if rows * columns + 1 != items:
        raise GeometryError(
            f"{type(images).__name__} makes {rows} x {columns} tiles of a {width} x {height} image, and a whole view, "
            f"but there are {items} visual items: pass the processor that made the inputs, or leave the overlay out"
        )
    return rows, columns


def _sides(size: Any) -> tuple[int, int]:
    told: Mapping[str, Any] = size if isinstance(size, Mapping) else vars(size)
    return int(told["height"]), int(told["width"])


def _tiled(size: tuple[int, int], rows: int, columns: int, cell: tuple[int, int]) -> Geometry:
    """The cells of an image stretched to rows x columns tiles, tile after tile, each a raster of its own."""
    width, height = size
    h, w = cell
    boxes: list[Box] = []
    for tile in range(rows * columns):
        top, left = (tile // columns) * h, (tile % columns) * w
        for i in range(h * w):
            y, x = top + i // w, left + i % w
            boxes.append(
                (
                    x * width / (columns * w),
                    y * height / (rows * h),
                    (x + 1) * width / (columns * w),
                    (y + 1) * height / (rows * h),
                )
            )
    return Geometry(size, (rows * h, columns * w), tuple(boxes), (0, 0, float(width), float(height)))
