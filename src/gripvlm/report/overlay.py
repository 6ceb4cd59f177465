"""Pictures whose kept visual tokens stay bright while the dropped ones fade, and where each token lies in them.

The place of a token is worked out from what the image processor says it does (pad to a square, resize, crop, cut into
tiles), so no pixel is needed. tests/report/test_overlays.py checks it against what real processors do to real pixels.
"""

from __future__ import annotations

import itertools
import math
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from PIL import Image, ImageChops, ImageDraw, ImageEnhance, ImageFilter, ImageFont

from gripvlm.errors import GripError
from gripvlm.eval.records import TokenMask
from gripvlm.types import Raster, Selection
from gripvlm.utils import disk

Box = tuple[float, float, float, float]
"""(left, top, right, bottom) in pixels of the original image."""
Grid: TypeAlias = tuple[int, int] | tuple[Raster, ...] | None
"""(h, w) of a visual item's tokens, or the rasters that they are, or neither."""

LONG_SIDE = 720  # pixels that a small picture is enlarged to, about
NARROWEST = 480  # so that the caption has room
MARGIN = 16  # around the caption
INK, PAPER, GREY, EDGE, HATCH = (24, 28, 36), (252, 252, 250), (96, 102, 112), (255, 214, 10), (120, 126, 138)
_TILES = ("image_grid_pinpoints", "do_image_splitting", "crop_to_patches", "do_pan_and_scan", "split_image")
_ANY_SIZE = ("merge_size", "patch_size")  # towers that take any size: the whole image is stretched to the grid


class GeometryError(GripError):
    """The place of a visual token in the picture is not known for this model. Nothing is guessed."""


@dataclass(frozen=True)
class Geometry:
    """Grid cells in the original image.

    Attributes:
        image_size: (width, height) of the original image.
        boxes: [h * w] boxes in the order of the tokens. A cell that shows padding reaches beyond the image.
        seen: the part of the image that the model sees at all; the rest is cropped away.
    """

    image_size: tuple[int, int]
    boxes: tuple[Box, ...]
    seen: Box


@dataclass(frozen=True)
class Part:
    """One picture to draw of an image that is several visual items, or of a prompt's images.

    Attributes:
        name: "" where it is the only one, "tiles", "whole", "frame 0" and so on, or "picture 1" and so on.
        geometry: where each of its cells lies in the user's picture (or frame).
        rows: the row that each of its cells is, of all rows of the image or prompt, items one after the other. A row
            that is a newline or a separator is in no part.
        image: which of the prompt's images it is of, from 0.
    """

    name: str
    geometry: Geometry
    rows: Sequence[int]
    image: int = 0

    @property
    def start(self) -> int:
        """The first of its rows, where they follow one another.

        Raises:
            GeometryError: newlines stand between them.
        """
        if not isinstance(self.rows, range):
            raise GeometryError(f"the tokens of {self.name!r} are not one run, newlines stand between them: use rows")
        return self.rows.start

    def of(self, selections: Sequence[Selection | TokenMask]) -> TokenMask:
        """What of it was kept, from all selections (one an item, in order), to hand to `overlay`."""
        mask = torch.cat([selection.mask() for selection in selections])
        merge = next((selection.merge for selection in selections if selection.merge is not None), None)
        return TokenMask(mask[torch.as_tensor(self.rows, device=mask.device)], merge=merge)


# --- where a token lies -----------------------------------------------------------------------------------------------


class _Axis(NamedTuple):
    """One axis from original to processed pixels: processed = original * scale + shift."""

    length: float  # of the processed image so far
    scale: float = 1.0
    shift: float = 0.0

    def resized(self, length: float) -> _Axis:
        ratio = length / self.length
        return _Axis(length, self.scale * ratio, self.shift * ratio)

    def framed(self, length: float, before: float) -> _Axis:
        """A new frame of `length` pixels that begins `before` pixels ahead of this one."""
        return _Axis(length, self.scale, self.shift + before)

    def cropped(self, length: float) -> _Axis:
        """Centre crop; an image that is too small is padded on both sides."""
        # transformers rounds both halves down, so the sign of the difference matters
        before = (length - self.length) // 2 if length > self.length else -((self.length - length) // 2)
        return self.framed(length, before)

    def edges(self, cells: int) -> list[float]:
        """[cells + 1] edges of equal cells, in original pixels."""
        return [(self.length * i / cells - self.shift) / self.scale for i in range(cells + 1)]


def geometry(processor: Any, image_size: tuple[int, int], grid: tuple[int, int] | None) -> Geometry:
    """The boxes of a grid of visual tokens, for an image that this processor prepares.

    Args:
        processor: a processor or an image processor.
        image_size: (width, height) of the original image, as `PIL.Image.size`.
        grid: (h, w) of the visual tokens, as `VisualTokens.grid`.

    Raises:
        GeometryError: rows that are no plain raster (tiles, merged rows), or a processor whose layout is not known.
    """
    images = getattr(processor, "image_processor", processor)
    name = type(images).__name__
    if tiled := next((option for option in _TILES if getattr(images, option, None)), None):
        raise GeometryError(
            f"{name} cuts images into tiles ({tiled}), whose layout is not known here: leave the overlay out"
        )
    x, y = (_Axis(side) for side in image_size)
    if getattr(images, "do_center_crop", False) or not any(getattr(images, option, None) for option in _ANY_SIZE):
        x, y = _prepared(images, name, x, y)
    return _raster(x, y, image_size, _plain(grid))


def layout(
    processor: Any,
    image_size: tuple[int, int],
    grids: Sequence[Grid],
    patches: tuple[int, int, int] | None = None,
) -> list[Part]:
    """The pictures to draw of one image, or of a video, so that every visual token that shows a place is in one.

    Args:
        processor: a processor, an image processor or a video processor.
        image_size: (width, height) of the original image or frame.
        grids: (h, w) of each of its visual items, in order; of an item that is several rasters, these (`Item.rasters`).
        patches: (t, h, w) before merging, for a video: its item's `patches`. A frame here is what the tower takes
            for one, two frames of the video for Qwen's.

    Raises:
        GeometryError: rows that are no raster, or a processor whose tiles are not known here.
    """
    if patches is not None and patches[0] > 1:
        return _frames(processor, image_size, patches)
    images = getattr(processor, "image_processor", processor)
    if len(grids) == 1:
        (grid,) = grids
        if grid and isinstance(grid[0], Raster):
            return _packed(images, image_size, grid)
        cell = _plain(grid)
        only = _tiled(image_size, (1, 1), cell) if _cuts(images) else geometry(processor, image_size, cell)
        return [Part("", only, range(len(only.boxes)))]
    cells = [_plain(grid) for grid in grids]
    # Ovis2's processor puts the whole view first, the others last.
    whole, tiles = (cells[0], cells[1:]) if _whole_first(images) else (cells[-1], cells[:-1])
    if len({*tiles}) != 1 or not _cuts(images):
        raise GeometryError(
            f"{len(grids)} visual items with grids {sorted({*cells})} of one image, which {type(images).__name__} is "
            "not known to make: leave the overlay out"
        )
    rows, columns = _tile_counts(images, image_size)
    if rows * columns != len(tiles):
        raise GeometryError(
            f"{type(images).__name__} makes {rows} x {columns} tiles of a {image_size[0]} x {image_size[1]} image, and "
            f"a whole view, but there are {len(grids)} visual items: pass the processor that made the inputs, or leave "
            "the overlay out"
        )
    cut, uncut = _tiled(image_size, (rows, columns), tiles[0]), _tiled(image_size, (1, 1), whole)
    first = len(uncut.boxes) if _whole_first(images) else 0
    then = 0 if _whole_first(images) else len(cut.boxes)
    return [
        Part("tiles", cut, range(first, first + len(cut.boxes))),
        Part("whole", uncut, range(then, then + len(uncut.boxes))),
    ]


def layout_of_images(
    processor: Any,
    image_sizes: Sequence[tuple[int, int]],
    grids: Sequence[Grid],
    tokens: Sequence[int] | None = None,
) -> list[Part]:
    """`layout` for a prompt with one image or several.

    Args:
        image_sizes: (width, height) of each image, in the prompt's order.
        grids: (h, w) of the prompt's visual items, in order, or their rasters, as for `layout`.
        tokens: how many each visual item has; by default as many as its grid has cells.

    Raises:
        GeometryError: as `layout`, and where it is not known which items are of which image.
    """
    if len(image_sizes) == 1:
        return layout(processor, image_sizes[0], grids)
    images, counts = getattr(processor, "image_processor", processor), [1] * len(image_sizes)
    if len(grids) > len(image_sizes) and _cuts(images):
        tiles = [math.prod(_tile_counts(images, size)) for size in image_sizes]
        counts = [count + (count > 1) for count in tiles]
    if len(grids) != sum(counts):
        raise GeometryError(
            f"{len(image_sizes)} images became {len(grids)} visual items, and which belong to which image is not "
            "known here: leave the overlay out"
        )
    lengths = [math.prod(_plain(grid)) for grid in grids] if tokens is None else tokens
    ends = list(itertools.accumulate(counts))
    parts: list[Part] = []
    for number, (size, count, end) in enumerate(zip(image_sizes, counts, ends, strict=True)):
        before = sum(lengths[: end - count])
        for part in layout(processor, size, grids[end - count : end]):
            parts.append(
                replace(
                    part,
                    name=f"picture {number + 1} {part.name}".strip(),
                    rows=_moved(part.rows, before),
                    image=number,
                )
            )
    return parts


def _moved(rows: Sequence[int], before: int) -> Sequence[int]:
    """The same rows where `before` others come ahead of them."""
    if isinstance(rows, range):
        return range(rows.start + before, rows.stop + before)
    return [row + before for row in rows]


def _prepared(images: Any, name: str, x: _Axis, y: _Axis) -> tuple[_Axis, _Axis]:
    """Both axes after padding, resizing and cropping, in the order in which transformers does it."""
    # LLaVA's own processor pads to a square before all else; the others pad at the end
    pads, square_first = getattr(images, "do_pad", False), hasattr(images, "pad_to_square")
    if pads and square_first:
        side = max(x.length, y.length)
        x, y = (axis.framed(side, (side - axis.length) // 2) for axis in (x, y))
    if getattr(images, "do_resize", False):
        width, height = _resized(name, _sizes(getattr(images, "size", None)), x.length, y.length)
        x, y = x.resized(width), y.resized(height)
    if getattr(images, "do_center_crop", False):
        crop = _sizes(getattr(images, "crop_size", None))
        if not {"height", "width"} <= crop.keys():
            raise GeometryError(f"{name} crops to {crop}, expected a height and a width: leave the overlay out")
        x, y = x.cropped(crop["width"]), y.cropped(crop["height"])
    if pads and not square_first:
        target = _sizes(getattr(images, "pad_size", None))
        if not {"height", "width"} <= target.keys():
            raise GeometryError(f"{name} pads to a size that depends on the batch: leave the overlay out")
        x, y = x.framed(target["width"], 0), y.framed(target["height"], 0)  # at the right and the bottom
    return x, y


def _sizes(size: Any) -> dict[str, float]:
    """A size in any form of transformers as a plain dict of the values that are set."""
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
    if size.keys() not in ({"shortest_edge"}, {"longest_edge"}):
        raise GeometryError(f"{name} resizes to {size}, whose layout is not known here: leave the overlay out")
    ((which, edge),) = size.items()
    by_width = (width <= height) if which == "shortest_edge" else (width >= height)
    return (edge, int(edge * height / width)) if by_width else (int(edge * width / height), edge)


def _plain(grid: Grid) -> tuple[int, int]:
    if not grid or isinstance(grid[0], Raster):
        raise GeometryError(
            "the visual tokens of this model are no plain raster of the image, so no picture of them can be drawn: "
            "leave the overlay out"
        )
    return grid


def _raster(x: _Axis, y: _Axis, image_size: tuple[int, int], grid: tuple[int, int]) -> Geometry:
    rows, columns = grid
    left, top = x.edges(columns), y.edges(rows)
    boxes = tuple((left[c], top[r], left[c + 1], top[r + 1]) for r in range(rows) for c in range(columns))
    width, height = image_size
    seen = (max(0.0, left[0]), max(0.0, top[0]), min(float(width), left[-1]), min(float(height), top[-1]))
    return Geometry(image_size, boxes, seen)


def _tiled(image_size: tuple[int, int], tiles: tuple[int, int], cell: tuple[int, int]) -> Geometry:
    """The cells of an image stretched to rows x columns tiles, tile after tile, each a raster of its own."""
    (rows, columns), (h, w) = tiles, cell
    whole = _raster(_Axis(image_size[0]), _Axis(image_size[1]), image_size, (rows * h, columns * w))
    # tokens come tile by tile, the raster row by row across all tiles
    order = np.arange(len(whole.boxes)).reshape(rows, h, columns, w).swapaxes(1, 2).ravel()
    return Geometry(image_size, tuple(whole.boxes[i] for i in order), whole.seen)


def _cuts(images: Any) -> bool:
    """Whether the processor stretches an image to whole tiles, also where it is a single one."""
    return hasattr(images, "crop_to_patches") or bool(getattr(images, "do_image_splitting", False))


def _whole_first(images: Any) -> bool:
    return hasattr(images, "use_covering_area_grid")


def _tile_counts(images: Any, image_size: tuple[int, int]) -> tuple[int, int]:
    """(rows, columns) of the tiles of an image, by the processor's own functions: how it chooses is not ours to repeat.

    An image of more than one tile has a whole view as well.
    """
    width, height = image_size
    if hasattr(images, "crop_to_patches"):
        if not images.crop_to_patches:
            return 1, 1
        module, side = sys.modules[type(images).__module__], _sizes(images.size)
        tile = (int(side["height"]), int(side["width"]))
        if getattr(images, "use_covering_area_grid", False):
            columns, rows = module.get_min_tile_covering_grid((height, width), tile[0], images.max_patches)
        else:
            columns, rows = module.get_optimal_tiled_canvas(
                (height, width), tile, images.min_patches, images.max_patches
            )
    else:
        _, rows, columns = images.get_number_of_image_patches(height, width)
    return rows, columns


def _packed(images: Any, image_size: tuple[int, int], rasters: tuple[Raster, ...]) -> list[Part]:
    """LLaVA-NeXT and LLaVA-OneVision: the whole view, then the tiles as one raster without what was padded.

    Cells divide a tile equally. A tower whose patches do not fill it (SigLIP's 27 of 14 pixels in 384) leaves the last
    pixels of each tile out, so that a cell may be drawn up to so many pixels of the tile too far.
    """
    if not hasattr(images, "image_grid_pinpoints"):
        raise GeometryError(
            f"a visual item of {len(rasters)} rasters, which {type(images).__name__} is not known to make: leave the "
            "overlay out"
        )
    whole, *lines = rasters
    stretched = _tiled(image_size, (1, 1), (whole.height, whole.width))
    if not lines:
        # One of several images is not cut, but padded to a square.
        side = max(image_size)
        x, y = (_Axis(length).framed(side, (side - length) // 2) for length in image_size)
        return [Part("", _raster(x, y, image_size, (whole.height, whole.width)), range(whole.n))]
    from transformers.image_processing_utils import get_patch_output_size, select_best_resolution
    from transformers.image_utils import ChannelDimension

    canvas = select_best_resolution(image_size[::-1], images.image_grid_pinpoints)
    blank = np.broadcast_to(np.uint8(0), (1, *image_size[::-1]))
    resized = get_patch_output_size(blank, canvas, input_data_format=ChannelDimension.FIRST)
    size = _sizes(images.crop_size) if getattr(images, "crop_size", None) else _sizes(images.size)
    tile = size.get("height") or size["shortest_edge"]
    pixels, cells = tile / whole.height, [round(length / tile) * whole.height for length in canvas]
    (height, width), trimmed = image_size[::-1], [0, 0]
    # The model leaves out whole lines of cells that are padding, as many at both ends.
    if width / height > cells[1] / cells[0]:
        trimmed[0] = (cells[0] - int(round(height * cells[1] / width, 7))) // 2
    else:
        trimmed[1] = (cells[1] - int(round(width * cells[0] / height, 7))) // 2
    y, x = (
        _Axis(own).resized(new).framed(full, (full - new) // 2).framed(full - 2 * cut * pixels, -cut * pixels)
        for own, new, full, cut in zip(image_size[::-1], resized, canvas, trimmed, strict=True)
    )
    left, found = tuple(n - 2 * cut for n, cut in zip(cells, trimmed, strict=True)), lines[0][1:3]
    # LLaVA-OneVision makes fewer lines of many, and shorter ones.
    if found != left and not (found[0] < left[0] and found[1] < left[1]):
        raise GeometryError(
            f"{type(images).__name__} makes {left[0]} x {left[1]} tokens of the tiles of a {width} x {height} image, "
            f"but there are {found[0]} x {found[1]}: pass the processor that made the inputs, or leave the overlay out"
        )
    return [
        Part("tiles", _raster(x, y, image_size, found), lines[0].rows().tolist()),
        Part("whole", stretched, range(whole.n)),
    ]


def _frames(processor: Any, image_size: tuple[int, int], patches: tuple[int, int, int]) -> list[Part]:
    videos = getattr(processor, "video_processor", processor)
    frames, h, w = patches
    merge = getattr(videos, "merge_size", None)
    if merge is None:
        raise GeometryError(
            f"{type(videos).__name__} does not say how many patches make a token (merge_size): leave the overlay out"
        )
    frame = geometry(videos, image_size, (h // merge, w // merge))
    n = len(frame.boxes)
    return [Part(f"frame {i}", frame, range(i * n, (i + 1) * n)) for i in range(frames)]


# --- the picture ------------------------------------------------------------------------------------------------------


def overlay(
    image: Image.Image,
    selection: Selection | TokenMask,
    geometry: Geometry,
    path: str | Path | None = None,
    caption: str | None = None,
) -> Image.Image:
    """The image with the cells of dropped tokens dimmed, kept ones outlined, cropped borders hatched.

    Args:
        image: the original picture, of `geometry.image_size`.
        selection: the kept cells of `geometry`.
        geometry: from `gripvlm.report.geometry`.
        path: where to write a PNG as well.
        caption: lines below the picture, the first of them larger; by default "k of n visual tokens". What a picture
            cannot show is added (tokens on padding, merged tokens, cropping). "" for the bare picture.

    Returns:
        RGB, enlarged by a whole number where the picture is small.

    Raises:
        GeometryError: the image or the selection is not the one that the geometry is for.
    """
    if image.size != geometry.image_size:
        raise GeometryError(f"the image is {image.size}, but the geometry is for {geometry.image_size} pixels")
    if selection.n != len(geometry.boxes):
        raise GeometryError(
            f"the selection is of {selection.n} tokens, but the geometry has {len(geometry.boxes)} cells"
        )
    mask = selection.mask().tolist()
    kept_boxes = [box for box, keep in zip(geometry.boxes, mask, strict=True) if keep]
    # a whole factor, so that every cell's border falls between pixels as it did before
    factor = max(1, round(LONG_SIDE / max(image.size)))
    size = (image.width * factor, image.height * factor)
    large = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    seen = _filled(size, [geometry.seen], factor)
    bright = ImageChops.darker(_filled(size, kept_boxes, factor), seen)
    dimmed = Image.blend(ImageEnhance.Color(large).enhance(0.25), Image.new("RGB", size, INK), 0.62)
    # dropped cells first, then what was cropped, then the outline over both
    drawn = Image.composite(large, dimmed, bright)
    drawn = Image.composite(drawn, Image.blend(_hatched(size), dimmed, 0.3), seen)
    drawn = Image.composite(Image.new("RGB", size, EDGE), drawn, _outline(bright))
    if caption != "":
        lines = (caption or f"{len(kept_boxes)} of {len(mask)} visual tokens").strip().splitlines()
        drawn = _captioned(drawn, [*lines, *_remarks(selection, geometry, kept_boxes)])
    if path is not None:
        buffer = BytesIO()
        drawn.save(buffer, Image.registered_extensions().get(Path(path).suffix.lower(), "PNG"))
        disk.write(path, buffer.getvalue())
    return drawn


def _filled(size: tuple[int, int], boxes: Sequence[Box], factor: int) -> Image.Image:
    """A mask of the pixels whose centres lie in a box, so that neighbouring cells never overlap."""
    mask = Image.new("L", size, 0)
    pen = ImageDraw.Draw(mask)
    for box in boxes:
        left, top, right, bottom = (math.ceil(edge * factor - 0.5) for edge in box)
        if right > left and bottom > top:
            pen.rectangle((left, top, right - 1, bottom - 1), fill=255)
    return mask


def _remarks(selection: Selection | TokenMask, geometry: Geometry, kept_boxes: Sequence[Box]) -> list[str]:
    """What the picture alone would not say."""
    remarks = []
    width, height = geometry.image_size
    padding = sum(
        right <= 0 or bottom <= 0 or left >= width or top >= height for left, top, right, bottom in kept_boxes
    )
    if padding:
        remarks.append(f"{padding} of the kept tokens show nothing but padding")
    if selection.merge is not None:
        remarks.append("the other tokens are averaged into the kept ones")
    if geometry.seen != (0, 0, width, height):
        remarks.append("hatched: cropped away, never seen by the model")
    return remarks


def _outline(mask: Image.Image) -> Image.Image:
    """The inner border, two pixels wide, of the white areas."""
    grown = Image.new("L", (mask.width + 4, mask.height + 4), 0)  # the filter reads no pixel beyond the picture
    grown.paste(mask, (2, 2))
    inner = grown.filter(ImageFilter.MinFilter(5)).crop((2, 2, 2 + mask.width, 2 + mask.height))
    return ImageChops.subtract(mask, inner)


def _hatched(size: tuple[int, int]) -> Image.Image:
    """What stands for parts the model never sees: diagonal lines on a dark ground."""
    sheet = Image.new("RGB", size, (8, 9, 12))
    pen = ImageDraw.Draw(sheet)
    for start in range(-size[1], size[0], 14):
        pen.line((start, size[1], start + size[1], 0), fill=HATCH, width=2)
    return sheet


def _captioned(picture: Image.Image, lines: list[str]) -> Image.Image:
    """The picture with its caption below; centred where it is narrower than the caption needs."""
    width = max(picture.width, NARROWEST)
    title, small = ImageFont.load_default(size=22), ImageFont.load_default(size=17)
    rows = [(text, title, INK, 30) for text in _wrapped(lines[0], title, width - 2 * MARGIN)]
    for line in lines[1:]:
        rows += [(text, small, GREY, 23) for text in _wrapped(line, small, width - 2 * MARGIN)]
    sheet = Image.new("RGB", (width, picture.height + sum(row[3] for row in rows) + 24), PAPER)
    pen, down = ImageDraw.Draw(sheet), picture.height + 12
    pen.rectangle((0, 0, width, picture.height - 1), fill=INK)
    sheet.paste(picture, ((width - picture.width) // 2, 0))
    for text, font, ink, height in rows:
        pen.text((MARGIN, down), text, fill=ink, font=font)
        down += height
    return sheet


def _wrapped(line: str, font: Any, width: int) -> list[str]:
    """The line in pieces that fit; a word that is too long is cut."""
    columns = int(width / font.getlength("i"))  # no line holds more
    while columns > 1 and max(map(font.getlength, textwrap.wrap(line, columns)), default=0) > width:
        columns -= 1
    return textwrap.wrap(line, columns) if line else [""]
