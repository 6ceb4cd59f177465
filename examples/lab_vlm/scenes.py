"""Scenes: a cluttered picture, what is in it, and for every patch the labels that the vision tower is taught.

A scene is a 4 x 4 board of 32-pixel slots over a photograph or a texture. Structures take one or two slots:
icons, an icon with a sign, two icons joined by an arrow, a letter pointing at an icon, an icon boxed as a group,
small scientific devices, free-standing words and numbers, and clutter drawn in the same artwork. Everything is
as salient as everything else: what matters depends on the question alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

SIZE = 128  # pixels
PATCH = 8  # pixels
GRID = SIZE // PATCH  # 16 x 16 = 256 visual tokens
SLOT = 32
BOARD = SIZE // SLOT

CHARACTERS = "abcdefghjklmnprstuvwxyz2346789"  # drawn as capitals; 0/o, 1/i, 5 and q left out as look-alikes
LABELS = "abcdefgh"
DEVICES: dict[str, tuple[str, ...]] = {
    "beaker": ("solid", "liquid", "gas", "empty"),
    "magnet": ("north", "south", "east", "west"),
    "thermometer": ("cold", "cool", "warm", "hot"),
    "circuit": ("nothing", "switch", "battery", "lamp"),
}


Box = tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels


@dataclass
class Part:
    """One labelled piece of a scene. `box` is (x0, y0, x1, y1) in pixels; the rest are the tower's targets."""

    box: Box
    cls: str  # an icon class, a device, a character, "arrow" or "other"
    colour: str = ""
    link: str = ""  # what this piece belongs to: a sign's owner, an arrow's source, "word", "number"
    nxt: str = ""  # where an arrow, its source or a label leads
    state: str = ""
    index: int = -1  # position of a character in its string
    big: int = -1
    thing: int = -1  # the Thing it is part of


@dataclass
class Thing:
    """Something a question can be about."""

    kind: str  # icon | sign | word | number | device | label | group
    name: str = ""
    colour: str = ""
    big: int = -1
    state: str = ""
    text: str = ""
    owner: int = -1  # index of the thing it is bound to
    arrow_to: int = -1
    box: Box = (0, 0, 0, 0)


@dataclass
class Scene:
    image: np.ndarray  # uint8 [SIZE, SIZE, 3]
    things: list[Thing] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)

    def coverage(self, part: Part) -> np.ndarray:
        """Share of every patch that `part.box` covers, [GRID, GRID]."""
        x0, y0, x1, y1 = part.box
        edge = np.arange(GRID) * PATCH
        across = np.clip(np.minimum(x1, edge + PATCH) - np.maximum(x0, edge), 0, None) / PATCH
        down = np.clip(np.minimum(y1, edge + PATCH) - np.maximum(y0, edge), 0, None) / PATCH
        return down[:, None] * across[None, :]

    def owners(self, least: float = 0.2) -> np.ndarray:
        """Index of the part that covers each patch most, [GRID, GRID]; -1 where none covers `least` of it."""
        best = np.full((GRID, GRID), least, dtype=np.float32)
        who = np.full((GRID, GRID), -1, dtype=np.int64)
        for i, part in enumerate(self.parts):
            share = self.coverage(part)
            # a small piece owns the one patch it sits on, even if it covers little of it
            share = share + 1e-3 * i * (share > 0)
            take = share > best
            best[take], who[take] = share[take], i
        return who

    def evidence(self, things: list[int]) -> np.ndarray:
        """Share of each patch covered by the given things, [GRID * GRID] in 0..1."""
        total = np.zeros((GRID, GRID))
        for part in self.parts:
            if part.thing in things:
                total = np.maximum(total, self.coverage(part))
        return total.reshape(-1)
