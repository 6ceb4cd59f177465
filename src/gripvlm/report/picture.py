"""The overlay: a picture whose kept visual tokens stay bright, while the dropped ones fade."""

from __future__ import annotations

import math
from io import BytesIO
from pathlib import Path
from typing import Protocol

from PIL import Image, ImageChops, ImageDraw, ImageEnhance, ImageFilter, ImageFont
from torch import Tensor

from gripvlm.report.cells import Geometry, GeometryError
from gripvlm.utils import disk

__all__ = ["overlay"]

LONG_SIDE = 720  # pixels that a small picture is enlarged to, about
NARROWEST = 480  # so that the caption has room
INK, PAPER, GREY = (24, 28, 36), (252, 252, 250), (96, 102, 112)
EDGE = (255, 214, 10)
HATCH = (120, 126, 138)


class Chosen(Protocol):
    """The part of a `Selection` that is drawn."""

    @property
    def n(self) -> int: ...
    @property
    def merge(self) -> object: ...
    def mask(self) -> Tensor: ...


def overlay(
    image: Image.Image,
    selection: Chosen,
    geometry: Geometry,
    path: str | Path | None = None,
    caption: str | None = None,
) -> Image.Image:
    """The image with the cells of dropped tokens dimmed, kept ones outlined, cropped borders hatched.

    Args:
        image: the original picture, of `geometry.image_size`.
        selection: what was kept of `geometry`'s cells.
        geometry: from `gripvlm.report.geometry`.
        path: where to write a PNG as well.
        caption: lines below the picture, the first of them larger; by default "k of n visual tokens".
            What a picture cannot show is added (tokens on padding, merged tokens, cropping). "" for
            the bare picture.

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
    kept = selection.mask().tolist()
    factor = max(1, round(LONG_SIDE / max(image.size)))
    size = (image.width * factor, image.height * factor)
    large = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    bright, seen = Image.new("L", size, 0), Image.new("L", size, 0)
    pen = ImageDraw.Draw(bright)
    for box, keep in zip(geometry.boxes, kept, strict=True):
        if keep:
            _fill(pen, box, factor)
    _fill(ImageDraw.Draw(seen), geometry.seen, factor)
    bright = ImageChops.darker(bright, seen)
    dimmed = ImageEnhance.Color(large).enhance(0.25)
    dimmed = Image.blend(dimmed, Image.new("RGB", size, INK), 0.62)
    drawn = Image.composite(large, dimmed, bright)
    drawn = Image.composite(drawn, Image.blend(_hatched(size), dimmed, 0.3), seen)
    drawn = Image.composite(Image.new("RGB", size, EDGE), drawn, _outline(bright))
    if caption != "":
        lines = (caption or f"{sum(kept)} of {len(kept)} visual tokens").strip().splitlines()
        drawn = _captioned(drawn, [*lines, *_remarks(selection, geometry, kept)])
    if path is not None:
        packed = BytesIO()
        drawn.save(packed, Image.registered_extensions().get(Path(path).suffix.lower(), "PNG"))
        disk.write(path, packed.getvalue())
    return drawn


def _fill(pen: ImageDraw.ImageDraw, box: tuple[float, float, float, float], factor: int) -> None:
    """Paints the pixels whose centres lie in the box, so that neighbouring cells never overlap."""
    left, top, right, bottom = (math.ceil(edge * factor - 0.5) for edge in box)
    if right > left and bottom > top:
        pen.rectangle((left, top, right - 1, bottom - 1), fill=255)


def _remarks(selection: Chosen, geometry: Geometry, kept: list[bool]) -> list[str]:
    """What the picture alone would not say."""
    remarks = []
    width, height = geometry.image_size
    outside = sum(
        keep and (right <= 0 or bottom <= 0 or left >= width or top >= height)
        for (left, top, right, bottom), keep in zip(geometry.boxes, kept, strict=True)
    )
    if outside:
        remarks.append(f"{outside} of the kept tokens show nothing but padding")
    if selection.merge is not None:
        remarks.append("the other tokens are averaged into the kept ones")
    if geometry.seen != (0, 0, width, height):
        remarks.append("hatched: cropped away, never seen by the model")
    return remarks


def _outline(mask: Image.Image) -> Image.Image:
    """The inner border, two pixels wide, of the white areas."""
    grown = Image.new("L", (mask.width + 4, mask.height + 4), 0)
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
    margin = 16
    rows: list[tuple[str, ImageFont.FreeTypeFont | ImageFont.ImageFont, tuple[int, int, int], int]] = []
    for number, line in enumerate(lines):
        size, ink = (22, INK) if number == 0 else (17, GREY)
        font = ImageFont.load_default(size=size)
        rows += [(part, font, ink, round(size * 1.35)) for part in _wrapped(line, font, width - 2 * margin)]
    strip = sum(row[3] for row in rows) + 2 * 12
    sheet = Image.new("RGB", (width, picture.height + strip), PAPER)
    if width > picture.width:
        ImageDraw.Draw(sheet).rectangle((0, 0, width, picture.height - 1), fill=INK)
    sheet.paste(picture, ((width - picture.width) // 2, 0))
    pen, down = ImageDraw.Draw(sheet), picture.height + 12
    for text, font, ink, height in rows:
        pen.text((margin, down), text, fill=ink, font=font)
        down += height
    return sheet


def _wrapped(line: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """The line in pieces that fit; a word that is too long is cut."""
    parts: list[str] = []
    now = ""
    for word in line.split():
        while font.getlength(word) > width:
            fits = next(i for i in range(len(word), 0, -1) if i == 1 or font.getlength(word[:i]) <= width)
            parts += [now] if now else []
            parts.append(word[:fits])
            now, word = "", word[fits:]
        longer = f"{now} {word}".strip()
        if font.getlength(longer) > width:
            parts.append(now)
            now = word
        else:
            now = longer
    return [*parts, now] if now or not parts else parts
