"""The small scientific devices of the science family, drawn procedurally: one state of four each."""

from __future__ import annotations

import numpy as np

from . import art
from .painter import Painter, around


def draw(p: Painter, kind: str, cx: float, cy: float, size: float, state: str) -> None:
    """Draw device `kind` in `state` (see scenes.DEVICES), centred on (cx, cy), `size` pixels wide."""
    _DRAW[kind](p, cx, cy, size, state)


def _ink(p: Painter) -> np.ndarray:
    """Line colour of devices; the other splits draw in other inks than training."""
    low, high = {"train": (0, 60), "val": (30, 80), "test": (20, 90), "scorer": (10, 70)}[p.split]
    return p.rng.uniform(low, high, 3).astype(np.float32)


def _beaker(p: Painter, cx: float, cy: float, size: float, state: str) -> None:
    rng, ink, half = p.rng, _ink(p), size / 2 - 2
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
        p.panel(around(cx + x * inner, cy + y * inner, 3, 3), dot)


def _magnet(p: Painter, cx: float, cy: float, size: float, state: str) -> None:
    """A compass needle over a bar magnet: red half shows where north is."""
    ink, half = _ink(p), size / 2 - 3
    ux, uy = {"north": (0, -1), "south": (0, 1), "east": (1, 0), "west": (-1, 0)}[state]
    for angle in np.linspace(0, 2 * np.pi, 28):
        p.panel(around(cx + (half + 2) * np.cos(angle), cy + (half + 2) * np.sin(angle), 2, 2), ink)
    p.line(cx, cy, cx + ux * half, cy + uy * half, art.shade("red", p.rng), 4)
    p.line(cx, cy, cx - ux * half, cy - uy * half, art.shade("white", p.rng) * 0.6, 4)


def _thermometer(p: Painter, cx: float, cy: float, size: float, state: str) -> None:
    ink, half = _ink(p), size / 2 - 2
    level = {"cold": 0.05, "cool": 0.35, "warm": 0.65, "hot": 0.97}[state] + float(p.rng.uniform(-0.03, 0.03))
    top, bottom = cy - half, cy + half - 7
    p.panel((cx - 4, top - 1, cx + 4, bottom + 4), ink)
    p.panel((cx - 2, top + 1, cx + 2, bottom + 4), np.full(3, 250.0, np.float32))
    red = art.shade("red", p.rng)
    p.panel(around(cx, cy + half - 3, 10, 8), red)
    p.panel((cx - 2, bottom - level * (bottom - top - 1), cx + 2, bottom + 5), red)
    for t in (0.2, 0.5, 0.8):
        p.line(cx + 6, bottom - t * (bottom - top), cx + 9, bottom - t * (bottom - top), ink, 1)


def _circuit(p: Painter, cx: float, cy: float, size: float, state: str) -> None:
    """A loop with lamp (top), battery (bottom) and switch (right); `state` names what is missing."""
    ink, half = _ink(p), size / 2 - 4
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
        p.panel(around(cx, cy - half, 8, 8), art.shade("yellow", p.rng))
    if state != "battery":
        p.line(cx - 3, cy + half - 5, cx - 3, cy + half + 4, ink, 2)
        p.line(cx + 3, cy + half - 2, cx + 3, cy + half + 2, ink, 3)


_DRAW = {"beaker": _beaker, "magnet": _magnet, "thermometer": _thermometer, "circuit": _circuit}
