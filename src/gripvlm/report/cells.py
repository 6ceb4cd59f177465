"""Where each visual token lies in the picture the user has: grid cells as boxes in its own pixels.

Worked out from what the image processor says it does (pad to a square, resize, centre crop), so no
pixel is needed. `tests/report/test_report.py` checks it against what real image processors do to real pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gripvlm.errors import GripError

__all__ = ["Box", "Geometry", "GeometryError", "geometry"]

Box = tuple[float, float, float, float]
"""(left, top, right, bottom) in pixels of the original image."""

_TILES = ("image_grid_pinpoints", "do_image_splitting", "crop_to_patches", "do_pan_and_scan", "split_image")
_WHOLE = ("merge_size", "patch_size")  # towers that take any size: the whole image is stretched to the grid


class GeometryError(GripError):
    """The place of a visual token in the picture is not known for this model."""


@dataclass(frozen=True)
class Geometry:
    """Grid cells in the original image.

    Attributes:
        image_size: (width, height) of the original image.
        grid: (h, w) of the raster of visual tokens.
        boxes: [h * w] boxes in raster order. A cell that shows padding reaches beyond the image.
        seen: the part of the image that the model sees at all; the rest is cropped away.
    """

    image_size: tuple[int, int]
    grid: tuple[int, int]
    boxes: tuple[Box, ...]
    seen: Box


@dataclass(frozen=True)
class _Axis:
    """One axis of the way from original to processed pixels: processed = original * scale + shift."""

    original: int
    length: float  # of the processed image so far
    scale: float = 1.0
    shift: float = 0.0

    def resized(self, length: float) -> _Axis:
        ratio = length / self.length
        return _Axis(self.original, length, self.scale * ratio, self.shift * ratio)

    def framed(self, length: float, before: float) -> _Axis:
        """A new frame of `length` pixels that begins `before` pixels ahead of this one."""
        return _Axis(self.original, length, self.scale, self.shift + before)

    def back(self, processed: float) -> float:
        return (processed - self.shift) / self.scale


def geometry(processor: Any, image_size: tuple[int, int], grid: tuple[int, int] | None) -> Geometry:
    """The boxes of a grid of visual tokens, for an image that this processor prepares.

    Args:
        processor: a processor or an image processor.
        image_size: (width, height) of the original image, as `PIL.Image.size`.
        grid: (h, w) of the visual tokens, as `VisualTokens.grid`.

    Raises:
        GeometryError: rows that are no plain raster (tiles, merged rows), or a processor whose
            layout is not known here. Nothing is guessed.
    """
    images = getattr(processor, "image_processor", processor)
    name = type(images).__name__
    if grid is None:
        raise GeometryError(
            f"the visual tokens of this model ({name}) are no plain raster of the image, so no picture of them can be "
            "drawn: leave the overlay out"
        )
    if tiled := next((option for option in _TILES if getattr(images, option, None)), None):
        raise GeometryError(
            f"{name} cuts images into tiles ({tiled}), whose layout is not known here: leave the overlay out"
        )
    x, y = (_Axis(length, length) for length in image_size)
    if not getattr(images, "do_center_crop", False) and any(getattr(images, option, None) for option in _WHOLE):
        return _geometry(x, y, grid)
    if getattr(images, "do_pad", False) and hasattr(images, "pad_to_square"):  # before anything else
        side = max(image_size)
        x, y = (axis.framed(side, (side - axis.original) // 2) for axis in (x, y))
    if getattr(images, "do_resize", False):
        width, height = _resized(name, _sizes(getattr(images, "size", None)), x.length, y.length)
        x, y = x.resized(width), y.resized(height)
    if getattr(images, "do_center_crop", False):
        crop = _sizes(getattr(images, "crop_size", None))
        if not {"height", "width"} <= crop.keys():
            raise GeometryError(f"{name} crops to {crop}, expected a height and a width: leave the overlay out")
        x, y = _cropped(x, crop["width"]), _cropped(y, crop["height"])
    if getattr(images, "do_pad", False) and not hasattr(images, "pad_to_square"):
        target = _sizes(getattr(images, "pad_size", None))
        if not {"height", "width"} <= target.keys():
            raise GeometryError(f"{name} pads to a size that depends on the batch: leave the overlay out")
        x, y = x.framed(target["width"], 0), y.framed(target["height"], 0)  # at the right and the bottom
    return _geometry(x, y, grid)


def _sizes(size: Any) -> dict[str, float]:
    """A size in any of transformers' forms as a plain dict of what is set."""
    if isinstance(size, int):
        return {"height": size, "width": size}
    if size is None:
        return {}
    pairs = size.items() if isinstance(size, Mapping) else vars(size).items()
    return {name: value for name, value in pairs if value is not None}


def _resized(name: str, size: dict[str, float], width: float, height: float) -> tuple[float, float]:
    """(width, height) after transformers' resize, rounded down as there."""
    if {"height", "width"} <= size.keys():
        return size["width"], size["height"]
    short, long = min(width, height), max(width, height)
    if size.keys() == {"shortest_edge"}:
        edge, other = size["shortest_edge"], int(size["shortest_edge"] * long / short)
        return (edge, other) if width <= height else (other, edge)
    if size.keys() == {"longest_edge"}:
        edge, other = size["longest_edge"], int(size["longest_edge"] * short / long)
        return (edge, other) if width >= height else (other, edge)
    raise GeometryError(f"{name} resizes to {size}, whose layout is not known here: leave the overlay out")


def _cropped(axis: _Axis, length: float) -> _Axis:
    """Centre crop; an image that is too small is padded on both sides."""
    before = (length - axis.length) // 2 if length > axis.length else -((axis.length - length) // 2)
    return axis.framed(length, before)


def _geometry(x: _Axis, y: _Axis, grid: tuple[int, int]) -> Geometry:
    rows, columns = grid
    left = [x.back(x.length * c / columns) for c in range(columns + 1)]
    top = [y.back(y.length * r / rows) for r in range(rows + 1)]
    boxes = tuple((left[c], top[r], left[c + 1], top[r + 1]) for r in range(rows) for c in range(columns))
    width, height = x.original, y.original
    seen = (max(0.0, left[0]), max(0.0, top[0]), min(float(width), left[-1]), min(float(height), top[-1]))
    return Geometry((width, height), grid, boxes, seen)
