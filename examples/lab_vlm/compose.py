"""Composes scenes: which structures there are and where they go."""

from __future__ import annotations

import numpy as np

from . import art, devices
from .painter import Painter, around
from .scenes import BOARD, CHARACTERS, DEVICES, LABELS, SIZE, SLOT, Part, Scene, Thing

FOOD = ("leaf", "tree", *art.CATEGORIES["animal"])


def _string(rng: np.random.Generator, kind: str) -> str:
    letters = [c for c in CHARACTERS if c.isalpha()]
    digits = [c for c in CHARACTERS if c.isdigit()]
    length = 3 if kind == "word" else int(rng.integers(2, 4))
    pool = letters if kind == "word" else digits
    return "".join(pool[i] for i in rng.integers(0, len(pool), length))


class Composer:
    """Builds one scene. Every random choice comes from `rng`, so (seed, split) determines the scene."""

    def __init__(self, split: str, rng: np.random.Generator):
        self.p = Painter(split, rng)
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

    def _domino(
        self, directions: tuple[tuple[int, int], ...]
    ) -> tuple[tuple[float, float], tuple[float, float]] | None:
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
        (ax, ay), (_bx, _) = place
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
        target = self._icon(
            name, bx + 3 * ux + self._jitter(1), by + 3 * uy + self._jitter(1), ((15, 19),), link=letter
        )
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
        self.p.panel(around(cx, cy, 29, 29), np.full(3, 215.0, np.float32), float(self.rng.uniform(0.3, 0.8)))
        for x0, y0, x1, y1 in ((-14, -14, 14, -14), (14, -14, 14, 14), (14, 14, -14, 14), (-14, 14, -14, -14)):
            self.p.line(cx + x0, cy + y0, cx + x1, cy + y1, frame, 2)
        inside = self._icon(name, cx + 3.5, cy + 3.5, ((14, 16),), link=letter)
        index = len(self.p.things)
        self.p.things.append(Thing("group", letter, owner=inside))
        self._letter(letter, cx - 9, cy - 9, name, index)

    def _letter(self, letter: str, cx: float, cy: float, name: str, index: int) -> None:
        disc = float(self.rng.choice([20.0, 240.0]))
        self.p.panel(around(cx, cy, 12, 13), np.full(3, disc, np.float32))
        ink = np.full(3, 250.0 if disc < 128 else 10.0, np.float32)
        self.p.text(letter, cx - 4, cy, 12, ink, link="label", nxt=name, thing=index)
        self.p.parts[-1].box = around(cx, cy, 12, 13)

    def device(self, kind: str) -> None:
        slot = self._slot()
        if slot is None:
            return
        rng, p = self.rng, self.p
        state = DEVICES[kind][rng.integers(4)]
        cx, cy = slot[0] + self._jitter(2), slot[1] + self._jitter(2)
        size = float(rng.uniform(22, 27))
        p.panel(around(cx, cy, size + 2, size + 2), rng.uniform(175, 250, 3).astype(np.float32), 0.9)
        devices.draw(p, kind, cx, cy, size, state)
        box = around(cx, cy, size, size)
        p.things.append(Thing("device", kind, state=state, box=box))
        p.parts.append(Part(box, kind, state=state, thing=len(p.things) - 1))

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
