"""Which visual tokens were kept, as a samples file records it: one bit a token."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gripvlm.models.encoded import Item
from gripvlm.types import Selection

__all__ = ["Kept", "packed", "unpacked"]


@dataclass(frozen=True, eq=False)
class Kept:
    """What one visual item kept, read back; has what `gripvlm.report.overlay` draws.

    Attributes:
        kept: [n] bool.
        grid: (h, w) of its raster, or None.
        merge: True where the dropped rows were averaged into the kept ones, else None.
    """

    kept: Tensor
    grid: tuple[int, int] | None = None
    merge: object = None

    @property
    def n(self) -> int:
        return int(self.kept.numel())

    def mask(self) -> Tensor:
        return self.kept


def packed(selection: Selection, item: Item) -> dict[str, Any]:
    """{"n", "grid", "mask"}: the mask's bits in row order, the first is the highest of its byte, base64."""
    bits = np.packbits(selection.mask().cpu().numpy())
    found: dict[str, Any] = {
        "n": selection.n,
        "grid": None if item.grid is None else list(item.grid),
        "mask": base64.b64encode(bits.tobytes()).decode(),
    }
    return found | ({"merged": True} if selection.merge is not None else {})


def unpacked(items: Sequence[Mapping[str, Any]]) -> list[Kept]:
    """What `packed` made of each of a sample's items."""
    read = []
    for item in items:
        bits = np.unpackbits(np.frombuffer(base64.b64decode(item["mask"]), dtype=np.uint8), count=item["n"])
        grid = None if item["grid"] is None else (int(item["grid"][0]), int(item["grid"][1]))
        read.append(Kept(torch.from_numpy(bits.astype(bool)), grid, item.get("merged")))
    return read
