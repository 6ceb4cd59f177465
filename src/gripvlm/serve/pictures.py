"""Pictures of a request: data URLs, files of one folder, and downloads from hosts that are allowed by name."""

from __future__ import annotations

import base64
import binascii
import time
from pathlib import Path
from urllib.error import URLError
from urllib.parse import SplitResult, unquote, urlsplit
from urllib.request import HTTPRedirectHandler, build_opener

from PIL import Image

from gripvlm.serve.chat import Refusal
from gripvlm.serve.settings import Settings
from gripvlm.tasks import open_image
from gripvlm.utils.disk import regular

__all__ = ["read_picture"]

SECONDS = 10
"""For a download, as a whole."""


def read_picture(url: str, settings: Settings, name: str) -> Image.Image:
    """The picture that a URL of a request names, as RGB.

    Args:
        name: what errors call it; URLs may be megabytes.

    Raises:
        Refusal: a URL that is not allowed, or cannot be read.
        TaskError: not a picture, a damaged one, or one with too many pixels.
    """
    if url[:5].lower() == "data:":  # not by urlsplit, which keeps what it has split
        return open_image(_decoded(url[5:], name), name, max_pixels=settings.limits.pixels)
    try:
        parts = urlsplit(url)
        host = parts.hostname
    except ValueError:
        raise Refusal(f"{name} has no valid URL: pass data:image/png;base64,...") from None
    if parts.scheme == "file":
        content = _file(parts, settings, name)
    elif parts.scheme in ("http", "https") and host in settings.hosts:
        content = _downloaded(url, settings.limits.body_bytes, name)
    elif parts.scheme in ("http", "https"):
        allowed = f"allowed hosts are {', '.join(sorted(settings.hosts))}" if settings.hosts else "none is allowed"
        raise Refusal(
            f"{name} would be downloaded from {str(host)[:80]!r}, but {allowed}: pass data:image/png;base64,... or "
            "start the server with --allow-host"
        )
    else:
        raise Refusal(f"{name} has a URL of the kind {parts.scheme[:20]!r}: pass data:image/png;base64,...")
    return open_image(content, name, max_pixels=settings.limits.pixels)


def _decoded(rest: str, name: str) -> bytes:
    kind, comma, data = rest.partition(",")
    if not comma or not kind.endswith(";base64"):
        raise Refusal(f"{name} is a data URL without base64: pass data:image/png;base64,...")
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Refusal(f"{name} is not valid base64: {error}") from None


def _file(parts: SplitResult, settings: Settings, name: str) -> bytes:
    if settings.folder is None:
        raise Refusal(
            f"{name} is a file, and this server reads none: pass data:image/png;base64,... or start the server with "
            "--allow-folder"
        )
    # One message for all files that cannot be read, so that it does not say what else is on the disk.
    refusal = Refusal(f"{name} is no file that this server may read: pass a picture in the folder of --allow-folder")
    try:
        path = Path(unquote(parts.path)).resolve(strict=True)  # follows links, so that none leads out of the folder
        if parts.netloc not in ("", "localhost") or not path.is_relative_to(settings.folder.resolve()):
            raise refusal
        regular(path)
        if path.stat().st_size > settings.limits.body_bytes:
            raise Refusal(f"{name} has more than {settings.limits.body_bytes} bytes: make it smaller")
        return path.read_bytes()
    except (OSError, ValueError, RuntimeError) as error:
        raise error if isinstance(error, Refusal) else refusal from None


class _NoRedirect(HTTPRedirectHandler):
    """A host that is allowed must not send us to one that is not."""

    def redirect_request(self, *args: object, **kwargs: object) -> None:
        return None


def _downloaded(url: str, most: int, name: str) -> bytes:
    ends = time.monotonic() + SECONDS
    content = bytearray()
    try:
        with build_opener(_NoRedirect).open(url, timeout=SECONDS) as answer:
            while piece := answer.read1(1 << 16):
                content += piece
                if len(content) > most:
                    raise Refusal(f"{name} has more than {most} bytes: make it smaller")
                if time.monotonic() > ends:
                    raise TimeoutError(f"it took more than {SECONDS} seconds")
    except (URLError, OSError, ValueError) as error:
        if isinstance(error, Refusal):
            raise
        raise Refusal(f"{name} could not be downloaded: {error}") from None
    return bytes(content)
