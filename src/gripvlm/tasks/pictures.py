"""Reading a picture that anybody may have made: it comes back as RGB, or one sentence says why not."""

from __future__ import annotations

import struct
import zlib
from io import BytesIO
from pathlib import Path

from PIL import Image, ImageOps

from gripvlm.errors import GripError
from gripvlm.utils.disk import regular

__all__ = ["TaskError", "open_image"]

_DAMAGED = (
    OSError,  # not identified, cut off, a checksum
    SyntaxError,  # a broken chunk or tag
    ValueError,  # a text that unpacks to too much, a size of nothing
    EOFError,
    struct.error,
    zlib.error,
    ArithmeticError,  # a resolution of 1/0, a number that no C integer holds
    LookupError,
    TypeError,
    AttributeError,
    NotImplementedError,
    RuntimeError,
    MemoryError,
    Image.DecompressionBombError,
)
"""What Pillow's readers raise for files that are not as they should be."""


class TaskError(GripError):
    """A task is unknown, or its files are not there or not readable."""


def open_image(path: Path | bytes, name: str | None = None) -> Image.Image:
    """The picture as RGB, turned upright as its EXIF says.

    Args:
        path: its file, or what such a file holds.
        name: what messages call it; by default the path.

    Raises:
        TaskError: no such file, not a picture, a damaged one, or one of more than `PIL.Image.MAX_IMAGE_PIXELS` pixels,
            which is said before they are unpacked: a few kilobytes can hold gigabytes.
    """
    name = name or ("a picture" if isinstance(path, bytes) else repr(str(path)))
    try:
        if not isinstance(path, bytes):
            regular(path)
        with Image.open(BytesIO(path) if isinstance(path, bytes) else path) as image:
            most = Image.MAX_IMAGE_PIXELS
            if most is not None and image.width * image.height > most:
                raise TaskError(
                    f"{name} has {image.width} x {image.height} pixels, allowed are {most} in all: make it smaller, or "
                    "set PIL.Image.MAX_IMAGE_PIXELS"
                )
            ImageOps.exif_transpose(image, in_place=True)
            return image.convert("RGB")
    except FileNotFoundError:
        raise TaskError(f"no image {name}: check the path") from None
    except IsADirectoryError:
        raise TaskError(f"{name} is a folder: type the path of one picture in it") from None
    except TaskError:
        raise
    except _DAMAGED as error:
        said = getattr(error, "strerror", None) or " ".join(str(error).split())[:200] or type(error).__name__
        raise TaskError(f"{name} is not a picture that Pillow can read: {said}") from None
