"""Draws pieces onto a picture and records what they are."""

from __future__ import annotations

import numpy as np

from . import art
from .scenes import SIZE, Box, Part, Thing


def around(cx: float, cy: float, w: float, h: float) -> Box:
    return (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2)


class Painter:
    """Draws pieces onto a float image and records their parts."""

    def __init__(self, split: str, rng: np.random.Generator):
        self.split, self.rng = split, rng
        self.canvas = np.array(art.background(split, SIZE, rng), dtype=np.float32)
        self.things: list[Thing] = []
        self.parts: list[Part] = []

    def blend(self, mask: np.ndarray, x: float, y: float, colour: np.ndarray, strength: float = 1.0) -> None:
        x, y = round(x), round(y)
        h, w = mask.shape
        x0, y0, x1, y1 = max(x, 0), max(y, 0), min(x + w, SIZE), min(y + h, SIZE)
        if x1 <= x0 or y1 <= y0:
            return
        alpha = mask[y0 - y : y1 - y, x0 - x : x1 - x, None].astype(np.float32) * (strength / 255)
        patch = self.canvas[y0:y1, x0:x1]
        patch += alpha * (colour - patch)

    def panel(self, box: Box, colour: np.ndarray, strength: float = 1.0) -> None:
        x0, y0, x1, y1 = (round(v) for v in box)
        self.blend(np.full((max(y1 - y0, 1), max(x1 - x0, 1)), 255, np.uint8), x0, y0, colour, strength)

    def line(self, x0: float, y0: float, x1: float, y1: float, colour: np.ndarray, width: int = 1) -> None:
        steps = int(max(abs(x1 - x0), abs(y1 - y0))) + 1
        for t in np.linspace(0, 1, steps):
            self.panel(around(x0 + t * (x1 - x0), y0 + t * (y1 - y0), width, width), colour)

    def halo(self, mask: np.ndarray, x: float, y: float, colour: np.ndarray) -> None:
        """A one-pixel rim of the opposite brightness, so that a shape stands off any background."""
        rim = np.pad(mask, 1)
        grown = rim.copy()
        for axis in (0, 1):
            for step in (-1, 1):
                grown = np.maximum(grown, np.roll(rim, step, axis))
        tone = 20.0 if colour.mean() > 128 else 235.0
        self.blend(grown, x - 1, y - 1, np.full(3, tone, np.float32), strength=float(self.rng.uniform(0.35, 0.8)))

    def icon(self, name: str, cx: float, cy: float, size: int, colour: str, drawing: str = "") -> Box:
        rng, train = self.rng, self.split == "train"
        pool = (drawing,) if drawing else art.drawings(name, self.split)
        mask = art.icon(
            pool[rng.integers(len(pool))],
            size,
            angle=int(rng.integers(-3, 4)) * 5,
            flip=bool(rng.random() < 0.5),
            stretch=int(rng.integers(-2, 3)) * 8,
            style=str(rng.choice(["drawn", "solid", "line"], p=(0.7, 0.15, 0.15))) if train else "drawn",
        )
        h, w = mask.shape
        x, y = cx - w / 2, cy - h / 2
        ink = art.shade(colour, rng)
        if rng.random() < 0.35:
            tone = 60.0 if colour in ("white", "yellow") else 225.0 if colour == "black" else rng.choice([50.0, 210.0])
            self.panel((x - 2, y - 2, x + w + 2, y + h + 2), np.full(3, tone, np.float32), float(rng.uniform(0.6, 1)))
        else:
            self.halo(mask, x, y, ink)
        self.blend(mask, x, y, ink)
        return (x, y, x + w, y + h)

    def text(self, string: str, x: float, cy: float, size: int, ink: np.ndarray, face: str = "", **labels) -> Box:
        """Draw `string` as capitals from x on, centred on line cy, in `face` or a random one; one part a character."""
        faces = art.typefaces(self.split)
        face = face or faces[self.rng.integers(len(faces))]
        x = min(x, SIZE - 2 - sum(art.character(face, c.upper(), size)[1] for c in string))
        start, lines = x, []
        for i, char in enumerate(string):
            mask, advance = art.character(face, char.upper(), size)
            h = mask.shape[0]
            rows = np.flatnonzero(mask.max(axis=1))
            self.blend(mask, x, cy - h / 2, ink)
            top, bottom = cy - h / 2 + rows[0], cy - h / 2 + rows[-1] + 1
            lines.append((top, bottom))
            self.parts.append(Part((x, top, x + advance, bottom), cls=char, index=i, **labels))
            x += advance
        return (start, min(t for t, _ in lines), x, max(b for _, b in lines))

    def arrow(self, x0: float, y0: float, x1: float, y1: float, link: str, nxt: str, thing: int) -> None:
        ink = art.shade(str(self.rng.choice(["black", "white", "red", "blue"])), self.rng)
        rim = np.full(3, 235.0 if ink.mean() < 128 else 25.0, np.float32)
        direction = np.array([x1 - x0, y1 - y0]) / max(np.hypot(x1 - x0, y1 - y0), 1e-6)
        side = np.array([-direction[1], direction[0]])
        tip = np.array([x1, y1])
        barbs = [tip - 4.5 * direction + 3.5 * side, tip - 4.5 * direction - 3.5 * side]
        for colour, width in ((rim, 4), (ink, 2)):
            self.line(x0, y0, x1, y1, colour, width)
            for barb in barbs:
                self.line(tip[0], tip[1], barb[0], barb[1], colour, width)
        box = (min(x0, x1) - 3, min(y0, y1) - 3, max(x0, x1) + 3, max(y0, y1) + 3)
        self.parts.append(Part(box, cls="arrow", link=link, nxt=nxt, thing=thing))
