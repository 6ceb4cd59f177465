"""What a server serves and allows."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from gripvlm.budget import Budget
from gripvlm.errors import GripError
from gripvlm.serve.controller import Ladder

__all__ = ["Limits", "Settings"]


def _limit(default: float | None, least: float, about: str) -> Any:
    return field(default=default, metadata={"min": least, "help": about})


@dataclass(frozen=True)
class Limits:
    """What one request may ask for, and how many there may be. Each field is an option of `gripvlm serve`.

    Raises:
        GripError: one that is too small, or no number.
    """

    max_batch: int = _limit(8, 1, "Requests that run at a time.")
    max_queue: int = _limit(64, 0, "Requests that may wait, or be read, beside those that run; more get a 429.")
    max_tokens: int = _limit(512, 1, "Tokens of the longest answer, and of one for which no length was asked.")
    max_model_len: int | None = _limit(
        None, 1, "Tokens of a prompt, before pruning, and its answer; by default what the model was made for."
    )
    max_pictures: int = _limit(8, 0, "Pictures of a request.")
    max_megapixels: float = _limit(16, 0.01, "Size of a picture, in millions of pixels.")
    max_body_mb: float = _limit(32, 0.001, "Size of a request, in millions of bytes.")
    upload_seconds: float = _limit(30, 0.01, "In which a request must have arrived.")
    cache_mb: float = _limit(512, 0, "Encoded pictures kept for further questions, in millions of bytes.")

    def __post_init__(self) -> None:
        for one in fields(self):
            value, least = getattr(self, one.name), one.metadata["min"]
            if value is not None and not least <= value < float("inf"):
                raise GripError(f"{one.name}={value}: pass a number of {least:g} or more")

    @property
    def pixels(self) -> int:
        return round(self.max_megapixels * 1e6)

    @property
    def body_bytes(self) -> int:
        return round(self.max_body_mb * 1e6)

    @property
    def cache_bytes(self) -> int:
        return round(self.cache_mb * 1e6)


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
