"""Scenes: a cluttered picture, what is in it, and for every patch the labels that the vision tower is taught.

A scene is a 4 x 4 board of 32-pixel slots over a photograph or a texture. Structures take one or two slots:
icons, an icon with a sign, two icons joined by an arrow, a letter pointing at an icon, an icon boxed as a group,
small scientific devices, free-standing words and numbers, and clutter drawn in the same artwork. Everything is
as salient as everything else: what matters depends on the question alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from gripvlm.lab import art

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
FOOD = ("leaf", "tree", *art.CATEGORIES["animal"])


@dataclass
class Part:
    """One labelled piece of a scene. `box` is (x0, y0, x1, y1) in pixels; the rest are the tower's targets."""

    box: tuple[float, float, float, float]
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
    box: tuple[float, float, float, float] = (0, 0, 0, 0)


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


class _Painter:
    """Draws pieces onto a float image and records their parts."""

    def __init__(self, split: str, rng: np.random.Generator):
        self.split, self.rng = split, rng
        self.canvas = np.array(art.background(split, SIZE, rng), dtype=np.float32)
        self.things: list[Thing] = []
        self.parts: list[Part] = []

    def blend(self, mask: np.ndarray, x: float, y: float, colour: np.ndarray, strength: float = 1.0) -> None:
        x, y = int(round(x)), int(round(y))
        h, w = mask.shape
        x0, y0, x1, y1 = max(x, 0), max(y, 0), min(x + w, SIZE), min(y + h, SIZE)
        if x1 <= x0 or y1 <= y0:
            return
        alpha = mask[y0 - y : y1 - y, x0 - x : x1 - x, None].astype(np.float32) * (strength / 255)
        patch = self.canvas[y0:y1, x0:x1]
        patch += alpha * (colour - patch)

    def panel(self, box: tuple[float, float, float, float], colour: np.ndarray, strength: float = 1.0) -> None:
        x0, y0, x1, y1 = (int(round(v)) for v in box)
        self.blend(np.full((max(y1 - y0, 1), max(x1 - x0, 1)), 255, np.uint8), x0, y0, colour, strength)

    def line(self, x0: float, y0: float, x1: float, y1: float, colour: np.ndarray, width: int = 1) -> None:
        steps = int(max(abs(x1 - x0), abs(y1 - y0))) + 1
        for t in np.linspace(0, 1, steps):
            self.panel(_around(x0 + t * (x1 - x0), y0 + t * (y1 - y0), width, width), colour)

    def halo(self, mask: np.ndarray, x: float, y: float, colour: np.ndarray) -> None:
        """A one-pixel rim of the opposite brightness, so that a shape stands off any background."""
        rim = np.pad(mask, 1)
        grown = rim.copy()
        for axis in (0, 1):
            for step in (-1, 1):
                grown = np.maximum(grown, np.roll(rim, step, axis))
        tone = 20.0 if colour.mean() > 128 else 235.0
        self.blend(grown, x - 1, y - 1, np.full(3, tone, np.float32), strength=float(self.rng.uniform(0.35, 0.8)))

    def icon(self, name: str, cx: float, cy: float, size: int, colour: str, drawing: str = "") -> tuple[float, ...]:
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

    def text(self, string: str, x: float, cy: float, size: int, ink: np.ndarray, **labels) -> tuple[float, ...]:
        """Draw `string` as capitals from x on, centred on line cy; one part a character."""
        faces = art.typefaces(self.split)
        face = faces[self.rng.integers(len(faces))]
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


def _around(cx: float, cy: float, w: float, h: float) -> tuple[float, float, float, float]:
    return (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2)


def _string(rng: np.random.Generator, kind: str) -> str:
    letters = [c for c in CHARACTERS if c.isalpha()]
    digits = [c for c in CHARACTERS if c.isdigit()]
    length = 3 if kind == "word" else int(rng.integers(2, 4))
    pool = letters if kind == "word" else digits
    return "".join(pool[i] for i in rng.integers(0, len(pool), length))


class Composer:
    """Builds one scene. Every random choice comes from `rng`, so (seed, split) determines the scene."""

    def __init__(self, split: str, rng: np.random.Generator):
        self.p = _Painter(split, rng)
        self.rng, self.split = rng, split
        self.free = {(r, c) for r in range(BOARD) for c in range(BOARD)}
        names = list(art.classes(split))
        weights = np.linspace(2.0, 0.6, len(names))  # some classes are common: "popular" negatives exist
        order = np.random.default_rng(7).permutation(len(names))
        p = weights[order] / weights.sum()
        self.names = [str(n) for n in rng.choice(names, size=len(names), replace=False, p=p)]
        self.colours = list(art.COLOURS)
        self.labels = list(rng.permutation(list(LABELS)))
        self.sign_colours = [str(c) for c in rng.permutation(self.colours)]

    # -- board -------------------------------------------------------------------------------------------------
    def _slot(self) -> tuple[float, float] | None:
        if not self.free:
            return None
        cells = sorted(self.free)
        r, c = cells[self.rng.integers(len(cells))]
        self.free.remove((r, c))
        return (c + 0.5) * SLOT, (r + 0.5) * SLOT

    def _domino(self, directions: tuple[tuple[int, int], ...]) -> tuple[tuple[float, float], tuple[float, float]] | None:
        pairs = [
            (a, (a[0] + dr, a[1] + dc))
            for a in sorted(self.free)
            for dr, dc in directions
            if (a[0] + dr, a[1] + dc) in self.free
        ]
        if not pairs:
            return None
        a, b = pairs[self.rng.integers(len(pairs))]
        self.free -= {a, b}
        return ((a[1] + 0.5) * SLOT, (a[0] + 0.5) * SLOT), ((b[1] + 0.5) * SLOT, (b[0] + 0.5) * SLOT)

    def _take(self, pool: tuple[str, ...] = ()) -> str:
        for i, name in enumerate(self.names):
            if not pool or name in pool:
                return self.names.pop(i)
        return ""

    def _jitter(self, scale: float = 3.0) -> float:
        return float(self.rng.uniform(-scale, scale))

    # -- structures --------------------------------------------------------------------------------------------
    def _icon(self, name: str, cx: float, cy: float, sizes=((14, 17), (22, 27)), link: str = "", nxt: str = "") -> int:
        big = int(self.rng.random() < 0.5)
        low, high = sizes[big] if len(sizes) == 2 else sizes[0]
        colour = self.colours[self.rng.integers(len(self.colours))]
        size = int(self.rng.integers(low, high + 1))
        box = self.p.icon(name, cx, cy, size, colour)
        known = big if len(sizes) == 2 else -1
        index = len(self.p.things)
        self.p.things.append(Thing("icon", name, colour, known, box=box))
        self.p.parts.append(Part(box, name, colour, link=link, nxt=nxt, big=known, thing=index))
        return index

    def plain(self, name: str) -> None:
        if slot := self._slot():
            self._icon(name, slot[0] + self._jitter(), slot[1] + self._jitter())

    def sign(self) -> None:
        """An icon with a coloured sign beside it."""
        place = self._domino(((0, 1),))
        name = self._take()
        if place is None or not name:
            return
        rng, p = self.rng, self.p
        (ax, ay), (bx, _) = place
        y = ay + self._jitter()
        owner = self._icon(name, ax - 3 + self._jitter(1.5), y, sizes=((15, 19),))
        colour = self.sign_colours.pop()
        paint = art.shade(colour, rng)
        string = _string(rng, "word" if rng.random() < 0.6 else "number")
        size = int(rng.integers(13, 16))
        x = ax + 10 + self._jitter(1.0)
        ink = np.full(3, 245.0 if paint.mean() < 140 else 15.0, np.float32)
        width = 2 + sum(art.character(art.typefaces(self.split)[0], c.upper(), size)[1] for c in string)
        self.p.panel((x - 3, y - 9, min(x + width + 3, SIZE), y + 9), paint)
        index = len(p.things)
        p.things.append(Thing("sign", name, colour, text=string, owner=owner))
        box = p.text(string, x, y, size, ink, colour=colour, link=name, thing=index)
        p.things[index].box = box

    def free_text(self, kind: str) -> None:
        slot = self._slot()
        if slot is None:
            return
        rng, p = self.rng, self.p
        string = _string(rng, kind)
        dark = rng.random() < 0.5
        ink = rng.uniform(0, 50, 3) if dark else rng.uniform(215, 255, 3)
        x, y = slot[0] - 13.5 + self._jitter(1.0), slot[1] + self._jitter()
        tone = rng.uniform(170, 255, 3) if dark else rng.uniform(0, 90, 3)
        p.panel((x - 2, y - 9, x + 31, y + 9), tone.astype(np.float32), float(rng.uniform(0.5, 0.85)))
        index = len(p.things)
        p.things.append(Thing(kind, text=string))
        box = p.text(string, x, y, int(rng.integers(13, 15)), ink.astype(np.float32), link=kind, thing=index)
        p.things[index].box = box

    def chain(self, food: bool) -> None:
        """Two icons joined by an arrow; in a food chain both are living things."""
        place = self._domino(((0, 1), (0, -1), (1, 0), (-1, 0)))
        pool = FOOD if food else ()
        first = self._take(pool)
        second = self._take(tuple(n for n in pool if n not in ("leaf", "tree")))
        if place is None or not first or not second:
            return
        (ax, ay), (bx, by) = place
        ux, uy = np.sign(bx - ax), np.sign(by - ay)
        a = self._icon(first, ax - 4 * ux + self._jitter(1), ay - 4 * uy + self._jitter(1), ((15, 18),), nxt=second)
        b = self._icon(second, bx + 4 * ux + self._jitter(1), by + 4 * uy + self._jitter(1), ((15, 18),), link=first)
        self.p.things[a].arrow_to = b
        index = len(self.p.things)
        self.p.things.append(Thing("chain" if food else "arrow", owner=a, arrow_to=b))
        mx, my = (ax + bx) / 2, (ay + by) / 2
        self.p.arrow(mx - 7 * ux, my - 7 * uy, mx + 7 * ux, my + 7 * uy, first, second, index)

    def label(self) -> None:
        """A letter with an arrow to an icon, as in a labelled diagram."""
        place = self._domino(((0, 1), (0, -1), (1, 0), (-1, 0)))
        name = self._take()
        if place is None or not name or not self.labels:
            return
        letter = self.labels.pop()
        (ax, ay), (bx, by) = place
        ux, uy = np.sign(bx - ax), np.sign(by - ay)
        lx, ly = ax - 3 * ux + self._jitter(1), ay - 3 * uy + self._jitter(1)
        target = self._icon(name, bx + 3 * ux + self._jitter(1), by + 3 * uy + self._jitter(1), ((15, 19),), link=letter)
        index = len(self.p.things)
        self.p.things.append(Thing("label", letter, arrow_to=target))
        self._letter(letter, lx, ly, name, index)
        mx, my = (ax + bx) / 2, (ay + by) / 2
        self.p.arrow(mx - 5 * ux, my - 5 * uy, mx + 7 * ux, my + 7 * uy, letter, name, index)

    def group(self) -> None:
        """An icon in a frame that carries a letter: one bin of a sorting task."""
        slot = self._slot()
        name = self._take()
        if slot is None or not name or not self.labels:
            return
        letter = self.labels.pop()
        cx, cy = slot[0] + self._jitter(1), slot[1] + self._jitter(1)
        frame = art.shade(self.colours[self.rng.integers(len(self.colours))], self.rng)
        self.p.panel(_around(cx, cy, 29, 29), np.full(3, 215.0, np.float32), float(self.rng.uniform(0.3, 0.8)))
        for x0, y0, x1, y1 in ((-14, -14, 14, -14), (14, -14, 14, 14), (14, 14, -14, 14), (-14, 14, -14, -14)):
            self.p.line(cx + x0, cy + y0, cx + x1, cy + y1, frame, 2)
        inside = self._icon(name, cx + 3.5, cy + 3.5, ((14, 16),), link=letter)
        index = len(self.p.things)
        self.p.things.append(Thing("group", letter, owner=inside))
        self._letter(letter, cx - 9, cy - 9, name, index)

    def _letter(self, letter: str, cx: float, cy: float, name: str, index: int) -> None:
        disc = float(self.rng.choice([20.0, 240.0]))
        self.p.panel(_around(cx, cy, 12, 13), np.full(3, disc, np.float32))
        ink = np.full(3, 250.0 if disc < 128 else 10.0, np.float32)
        self.p.text(letter, cx - 4, cy, 12, ink, link="label", nxt=name, thing=index)
        self.p.parts[-1].box = _around(cx, cy, 12, 13)

    def device(self, kind: str) -> None:
        slot = self._slot()
        if slot is None:
            return
        rng, p = self.rng, self.p
        state = DEVICES[kind][rng.integers(4)]
        cx, cy = slot[0] + self._jitter(2), slot[1] + self._jitter(2)
        size = float(rng.uniform(22, 27))
        p.panel(_around(cx, cy, size + 2, size + 2), rng.uniform(175, 250, 3).astype(np.float32), 0.9)
        getattr(self, f"_{kind}")(cx, cy, size, state)
        box = _around(cx, cy, size, size)
        p.things.append(Thing("device", kind, state=state, box=box))
        p.parts.append(Part(box, kind, state=state, thing=len(p.things) - 1))

    def _ink(self) -> np.ndarray:
        """Line colour of devices; the test split draws in other inks than training."""
        low, high = {"train": (0, 60), "val": (30, 80), "test": (20, 90)}[self.split]
        return self.rng.uniform(low, high, 3).astype(np.float32)

    def _beaker(self, cx: float, cy: float, size: float, state: str) -> None:
        p, rng, ink, half = self.p, self.rng, self._ink(), size / 2 - 2
        for x0, y0, x1, y1 in ((-1, -1, -1, 1), (-1, 1, 1, 1), (1, 1, 1, -1)):
            p.line(cx + x0 * half, cy + y0 * half, cx + x1 * half, cy + y1 * half, ink, 2)
        dot = art.shade(str(rng.choice(["blue", "purple", "red", "green"])), rng)
        inner = half - 3
        if state == "solid":
            spots = [(x, y) for x in (-1, -0.35, 0.3, 0.95) for y in (1, 0.4, -0.2)]
        elif state == "liquid":
            p.panel((cx - inner - 1, cy, cx + inner + 2, cy + inner + 2), dot, 0.45)
            spots = [(float(rng.uniform(-1, 1)), float(rng.uniform(0.1, 1))) for _ in range(8)]
        elif state == "gas":
            spots = [(float(rng.uniform(-1, 1)), float(rng.uniform(-1.1, 1))) for _ in range(7)]
        else:
            spots = []
        for x, y in spots:
            p.panel(_around(cx + x * inner, cy + y * inner, 3, 3), dot)

    def _magnet(self, cx: float, cy: float, size: float, state: str) -> None:
        """A compass needle over a bar magnet: red half shows where north is."""
        p, ink, half = self.p, self._ink(), size / 2 - 3
        ux, uy = {"north": (0, -1), "south": (0, 1), "east": (1, 0), "west": (-1, 0)}[state]
        for angle in np.linspace(0, 2 * np.pi, 28):
            p.panel(_around(cx + (half + 2) * np.cos(angle), cy + (half + 2) * np.sin(angle), 2, 2), ink)
        p.line(cx, cy, cx + ux * half, cy + uy * half, art.shade("red", self.rng), 4)
        p.line(cx, cy, cx - ux * half, cy - uy * half, art.shade("white", self.rng) * 0.6, 4)

    def _thermometer(self, cx: float, cy: float, size: float, state: str) -> None:
        p, ink, half = self.p, self._ink(), size / 2 - 2
        level = {"cold": 0.05, "cool": 0.35, "warm": 0.65, "hot": 0.97}[state] + float(self.rng.uniform(-0.03, 0.03))
        top, bottom = cy - half, cy + half - 7
        p.panel((cx - 4, top - 1, cx + 4, bottom + 4), ink)
        p.panel((cx - 2, top + 1, cx + 2, bottom + 4), np.full(3, 250.0, np.float32))
        red = art.shade("red", self.rng)
        p.panel(_around(cx, cy + half - 3, 10, 8), red)
        p.panel((cx - 2, bottom - level * (bottom - top - 1), cx + 2, bottom + 5), red)
        for t in (0.2, 0.5, 0.8):
            p.line(cx + 6, bottom - t * (bottom - top), cx + 9, bottom - t * (bottom - top), ink, 1)

    def _circuit(self, cx: float, cy: float, size: float, state: str) -> None:
        """A loop with lamp (top), battery (bottom) and switch (right); `state` names what is missing."""
        p, ink, half = self.p, self._ink(), size / 2 - 4
        p.line(cx - half, cy - half, cx - half, cy + half, ink, 2)
        for y in (-half, half):
            p.line(cx - half, cy + y, cx - 4, cy + y, ink, 2)
            p.line(cx + 4, cy + y, cx + half, cy + y, ink, 2)
        if state == "switch":
            p.line(cx + half, cy + half, cx + half, cy + 4, ink, 2)
            p.line(cx + half, cy + 4, cx + half + 5, cy - 5, ink, 2)
        else:
            p.line(cx + half, cy - half, cx + half, cy + half, ink, 2)
        if state != "lamp":
            p.panel(_around(cx, cy - half, 8, 8), art.shade("yellow", self.rng))
        if state != "battery":
            p.line(cx - 3, cy + half - 5, cx - 3, cy + half + 4, ink, 2)
            p.line(cx + 3, cy + half - 2, cx + 3, cy + half + 2, ink, 3)

    def clutter(self) -> None:
        rng, p = self.rng, self.p
        pool = art.clutter(self.split)
        if slot := self._slot():
            box = p.icon(
                "",
                slot[0] + self._jitter(4),
                slot[1] + self._jitter(4),
                int(rng.integers(13, 25)),
                self.colours[rng.integers(len(self.colours))],
                drawing=pool[rng.integers(len(pool))],
            )
            p.parts.append(Part(box, "other"))


def compose(seed: int, split: str) -> Scene:
    """The scene of `seed` in `split`: the same picture on every machine with the same packages."""
    if split not in art.SPLITS:
        raise ValueError(f"split is {split!r}; choose one of {', '.join(art.SPLITS)}")
    rng = np.random.default_rng((art.SPLITS.index(split), seed))
    c = Composer(split, rng)
    # (structure, probability); big structures first so that they find room
    plan = [
        (c.sign, 1.0), (c.sign, 0.75), (lambda: c.chain(True), 0.8), (c.label, 0.85), (lambda: c.chain(False), 0.5),
        (c.group, 0.7), (lambda: c.free_text("word"), 0.85), (lambda: c.free_text("number"), 0.85),
    ]  # fmt: skip
    for make, chance in plan:
        if rng.random() < chance:
            make()
    for kind in rng.permutation(list(DEVICES))[: int(rng.integers(1, 3))]:
        c.device(str(kind))
    if c.free and rng.random() < 0.75:  # several of one kind, to count
        name = c._take()
        for _ in range(int(rng.integers(2, 4))):
            c.plain(name)
    while len(c.free) > 1 and rng.random() < 0.85:
        c.plain(c._take())
    while c.free and rng.random() < 0.7:
        c.clutter()
    noise = rng.normal(0, rng.uniform(0, 5), c.p.canvas.shape)
    image = np.clip(c.p.canvas + noise, 0, 255).astype(np.uint8)
    return Scene(image, c.p.things, c.p.parts)
