"""What a server serves and allows."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from gripvlm.budget import Budget
from gripvlm.serve.controller import Ladder

__all__ = ["Limits", "Settings"]


@dataclass(frozen=True)
class Limits:
    """What one request may ask for, and how many there may be.

    Attributes:
        batch: requests that run at a time.
        queue: requests that may wait, or be read, beside those that run; more get a 429.
        tokens: of the longest answer, and of an answer for which no length was asked.
        prompt: tokens of a prompt before pruning and of its answer together; 0 for what the model was made for.
        pictures: of one request.
        pixels: of one picture.
        body: bytes of one request.
        upload_seconds: in which a body must have arrived.
        cache_bytes: of encoded pictures that are kept.
    """

    batch: int = 8
    queue: int = 64
    tokens: int = 512
    prompt: int = 0
    pictures: int = 8
    pixels: int = 16_000_000
    body: int = 32_000_000
    upload_seconds: float = 30.0
    cache_bytes: int = 512_000_000


@dataclass(frozen=True)
class Settings:
    """A server's settings.

    Attributes:
        model: the name by which requests ask for the model.
        pruners: specs that requests may name; the first is used where they name none.
        keep: for requests that name none.
        positions: "original" or "renumbered".
        keys: API keys; without any, none is asked for.
        folder: pictures may be files in it; None for no files.
        hosts: names of hosts that pictures may be downloaded from.
        ladder: how `keep` follows the load; None for always the same.
    """

    model: str
    pruners: tuple[str, ...] = ("divprune",)
    keep: Budget = field(default_factory=lambda: Budget(0.25))
    positions: str = "original"
    keys: tuple[str, ...] = ()
    folder: Path | None = None
    hosts: frozenset[str] = frozenset()
    ladder: Ladder | None = None
    limits: Limits = field(default_factory=Limits)
