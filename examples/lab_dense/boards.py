"""Boards: pictures full of things that look alike, where a question's evidence is spread.

A board has 6 x 6 slots over a photograph or a texture. A slot holds an icon, a letter or a two-digit number; a sign
with a string of 6 to 8 characters takes four slots of one row. Everything has a colour, and all things are drawn in
the same size and contrast, so that only the question says which of them matter.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from lab_vlm import art
from lab_vlm.painter import Painter, around
from lab_vlm.scenes import CHARACTERS, GRID, SIZE, Part, Scene

SIDE = 6
SLOT = SIZE / SIDE
PITCH = 10.0  # pixels from one character of a sign to the next: wider than a patch, so each has a patch of its own
LETTERS = tuple(c for c in CHARACTERS if c.isalpha())
DIGITS = tuple(c for c in CHARACTERS if c.isdigit())
COLOURS = tuple(art.COLOURS)
KINDS = ("icon", "letter", "number", "sign")


@dataclass
class Board:
    """What is on a board.

    things: one entry a thing, (kind, name, colour): a class, a letter, two digits, or a sign's string.
    centre: their centres in pixels, [things, 2] as (x, y).
    scene: the picture and its labelled parts; `Part.thing` is an index into `things`.
    """

    scene: Scene
    things: list[tuple[str, str, str]] = field(default_factory=list)
    centre: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), np.float32))


@dataclass
class Facts:
    """What is on a board and where, without its picture.

    things: (kind, name, colour) each; centre: [things, 2], (x, y) in pixels; units: [GRID * GRID], `boards.units`.
    """

    things: list[tuple[str, str, str]]
    centre: np.ndarray
    units: np.ndarray


class Composer:
    """Builds one board. Every random choice comes from `rng`, so (seed, split) determines the board."""

    def __init__(self, split: str, rng: np.random.Generator):
        self.p, self.rng, self.split = Painter(split, rng), rng, split
        self.free = {(r, c) for r in range(SIDE) for c in range(SIDE)}
        self.things: list[tuple[str, str, str]] = []
        self.centres: list[tuple[float, float]] = []

    def _add(self, kind: str, name: str, colour: str, box: tuple[float, float, float, float]) -> None:
        self.things.append((kind, name, colour))
        self.centres.append(((box[0] + box[2]) / 2, (box[1] + box[3]) / 2))

    def _panel(self, cx: float, cy: float, w: float, h: float, colour: str) -> np.ndarray:
        """A coloured plate with a rim; returns the ink that stands off it."""
        paint = art.shade(colour, self.rng)
        dark = paint.mean() < 140
        rim = np.full(3, 235.0 if dark else 25.0, np.float32)
        self.p.panel(around(cx, cy, w + 2, h + 2), rim, float(self.rng.uniform(0.35, 0.8)))
        self.p.panel(around(cx, cy, w, h), paint)
        return np.full(3, 245.0 if dark else 15.0, np.float32)

    def icon(self, name: str, colour: str, cx: float, cy: float) -> None:
        box = self.p.icon(name, cx, cy, int(self.rng.integers(14, 18)), colour)
        self.p.parts.append(Part(box, name, colour, thing=len(self.things)))
        self._add("icon", name, colour, box)

    def letter(self, name: str, colour: str, cx: float, cy: float) -> None:
        ink = self._panel(cx, cy, 15, 15, colour)
        self._write(name, cx, cy, int(self.rng.integers(12, 14)), ink, colour, self._face())
        self.p.parts[-1].box = around(cx, cy, 15, 15)
        self._add("letter", name, colour, around(cx, cy, 15, 15))

    def number(self, name: str, colour: str, cx: float, cy: float) -> None:
        ink = self._panel(cx, cy, 18, 14, colour)
        self._write(name, cx, cy, 12, ink, colour, self._face())
        for part, x in zip(self.p.parts[-2:], (cx - 4.5, cx + 4.5), strict=True):
            part.box = around(x, cy, 9, 14)
        self._add("number", name, colour, around(cx, cy, 18, 14))

    def sign(self, string: str, colour: str, cx: float, cy: float) -> None:
        ink = self._panel(cx, cy, 4 * SLOT - 3, 15, colour)
        face = self._face()
        left = cx - PITCH * len(string) / 2
        for i, char in enumerate(string):
            middle = left + PITCH * (i + 0.5)
            self._write(char, middle, cy, 12, ink, colour, face)
            part = self.p.parts[-1]
            part.index, part.box = i, around(middle, cy, PITCH, 15)
        self._add("sign", string, colour, around(cx, cy, PITCH * len(string), 15))

    def _face(self) -> str:
        faces = art.typefaces(self.split)
        return faces[self.rng.integers(len(faces))]

    def _write(self, string: str, cx: float, cy: float, size: int, ink: np.ndarray, colour: str, face: str) -> None:
        """Centred text."""
        width = sum(art.character(face, c.upper(), size)[1] for c in string)
        self.p.text(string, cx - width / 2, cy, size, ink, face=face, colour=colour, thing=len(self.things))

    def slot(self) -> tuple[float, float] | None:
        if not self.free:
            return None
        cells = sorted(self.free)
        r, c = cells[self.rng.integers(len(cells))]
        self.free.remove((r, c))
        jitter = self.rng.uniform(-1.5, 1.5, 2)
        return (c + 0.5) * SLOT + jitter[0], (r + 0.5) * SLOT + jitter[1]

    def row(self) -> tuple[float, float] | None:
        """The centre of four free slots of one row."""
        starts = [(r, c) for r in range(SIDE) for c in range(SIDE - 3) if {(r, c + i) for i in range(4)} <= self.free]
        if not starts:
            return None
        r, c = starts[self.rng.integers(len(starts))]
        self.free -= {(r, c + i) for i in range(4)}
        return (c + 2) * SLOT, (r + 0.5) * SLOT + float(self.rng.uniform(-1.5, 1.5))


def _string(rng: np.random.Generator) -> str:
    return "".join(CHARACTERS[i] for i in rng.integers(0, len(CHARACTERS), int(rng.integers(6, 9))))


def compose(seed: int, split: str) -> Board:
    """The board of `seed` in `split`: the same picture on every machine with the same packages."""
    if split not in art.SPLITS:
        raise ValueError(f"split is {split!r}; choose one of {', '.join(art.SPLITS)}")
    rng = np.random.default_rng((101, art.SPLITS.index(split), seed))
    c = Composer(split, rng)
    # A few colours, classes and letters a board, unevenly often, so that there is something to compare.
    palette = rng.permutation(COLOURS)[: int(rng.integers(4, 8))]
    weight = rng.dirichlet(np.full(len(palette), 2.0))
    if rng.random() < 0.4:
        for colour in rng.permutation(COLOURS)[: int(rng.integers(2, 4))]:
            if place := c.row():
                c.sign(_string(rng), str(colour), *place)
    things = max(len(c.free) - int(rng.integers(0, 5)), 1)
    share = rng.dirichlet((3.0, 2.0, 2.0))
    kinds = rng.choice(KINDS[:3], size=things, p=share)
    names = {
        "icon": rng.permutation(art.classes(split))[: int(rng.integers(3, 7))],
        "letter": rng.permutation(LETTERS)[: int(rng.integers(4, 9))],
        "number": np.array(["".join(rng.choice(DIGITS, 2)) for _ in range(SIDE * SIDE)]),
    }
    often = {kind: rng.dirichlet(np.full(len(pool), 1.5)) for kind, pool in names.items() if kind != "number"}
    for kind in kinds:
        place = c.slot()
        if place is None:
            break
        name = str(rng.choice(names[kind], p=often.get(kind)))
        getattr(c, kind)(name, str(rng.choice(palette, p=weight)), *place)
    noise = rng.normal(0, rng.uniform(0, 5), c.p.canvas.shape)
    image = np.clip(c.p.canvas + noise, 0, 255).astype(np.uint8)
    return Board(Scene(image, [], c.p.parts), c.things, np.array(c.centres, np.float32))


def units(board: Board) -> np.ndarray:
    """Which unit of evidence each patch shows most, int16 [GRID * GRID]; -1 where none.

    A unit is what has to be seen at least once: a thing, or one character of a sign. Things come first, in their
    order, and a sign's characters after all things, in the order of the parts.
    """
    parts, count = board.scene.parts, len(board.things)
    number = np.full(len(parts) + 1, -1, np.int16)
    for i, part in enumerate(parts):
        if board.things[part.thing][0] == "sign":
            number[i], count = count, count + 1
        else:
            number[i] = part.thing
    return number[board.scene.owners().reshape(-1)]


__all__ = ["COLOURS", "DIGITS", "GRID", "KINDS", "LETTERS", "Board", "Facts", "compose", "units"]
