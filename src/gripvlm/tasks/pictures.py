"""Reads an image file from an unknown source: returns it as RGB, or raises an error of one sentence."""

from __future__ import annotations

import re
import struct
import zlib
from io import BytesIO
from pathlib import Path

from PIL import Image, ImageOps

from gripvlm.errors import GripError
from gripvlm.utils.disk import regular

__all__ = ["TaskError", "open_image"]

# What Pillow's readers raise for damaged files. Besides its own errors a broken chunk or tag is a SyntaxError, a
# resolution of 1/0 an ArithmeticError, and a text that unpacks to too much a ValueError.
_DAMAGED: tuple[type[Exception], ...] = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error)
_DAMAGED += (ArithmeticError, LookupError, TypeError, AttributeError, NotImplementedError, RuntimeError, MemoryError)
_DAMAGED += (Image.DecompressionBombError,)


class TaskError(GripError):
    """A task is unknown, or its files are not there or not readable."""


def open_image(path: Path | bytes, name: str | None = None, max_pixels: int | None = None) -> Image.Image:
    """The image as RGB, turned upright as its EXIF says.

    Args:
        path: its file, or the content of such a file.
        name: what messages call it; by default the path.
        max_pixels: how many it may have; by default `PIL.Image.MAX_IMAGE_PIXELS`.

    Raises:
        TaskError: no such file, not an image, a damaged one, or one of more than `max_pixels` pixels, which is refused
            before they are unpacked: a few kilobytes can hold gigabytes.
    """
    name = name or ("a picture" if isinstance(path, bytes) else repr(str(path)))
    try:
        if not isinstance(path, bytes):
            regular(path)
        with Image.open(BytesIO(path) if isinstance(path, bytes) else path) as image:
            # Pillow itself only warns up to twice the limit.
            limit = Image.MAX_IMAGE_PIXELS if max_pixels is None else max_pixels
            if limit is not None and image.width * image.height > limit:
                raise TaskError(
                    f"{name} has {image.width} x {image.height} pixels, allowed are {limit} in all: make it smaller"
                    f"{', or set PIL.Image.MAX_IMAGE_PIXELS' if max_pixels is None else ''}"
                )
            # In place: the copy would hold a second image of the full size.
            ImageOps.exif_transpose(image, in_place=True)
            return image.convert("RGB")
    except FileNotFoundError:
        raise TaskError(f"no image {name}: check the path") from None
    except IsADirectoryError:
        raise TaskError(f"{name} is a folder: use the path of one picture in it") from None
    except TaskError:
        raise
    except _DAMAGED as error:
        words = re.sub(r" <_io\.BytesIO object at \w+>", "", " ".join(str(error).split()))  # says nothing to anyone
        reason = getattr(error, "strerror", None) or words[:200] or type(error).__name__
        raise TaskError(f"{name} is not a picture that Pillow can read: {reason}") from None
