"""One panel of lines as SVG: a logarithmic or linear axis of cost, a score in percent, intervals, reference lines."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["Axis", "Line", "Mark", "Style", "key", "nice", "panel"]

INK, SOFT, RULE = "#1b1f24", "#57606a", "#e3e7eb"
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 30, 44
FONT = "system-ui, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"


@dataclass(frozen=True)
class Style:
    """How one method looks; colour, marker and dashes all differ, so that no one of them is needed."""

    colour: str
    marker: str
    dash: str = ""
    width: float = 1.8


@dataclass(frozen=True)
class Mark:
    """A point: cost, score, its interval if known, and what a pointer over it says."""

    x: float
    y: float
    low: float | None
    high: float | None
    says: str


@dataclass(frozen=True)
class Line:
    """A method's points in order of cost; `style` None for those that only make the crowd."""

    name: str
    marks: Sequence[Mark]
    style: Style | None


@dataclass(frozen=True)
class Axis:
    """From `low` to `high`, with ticks [(place, text)]."""

    low: float
    high: float
    ticks: Sequence[tuple[float, str]]
    title: str
    log: bool = False

    def at(self, value: float) -> float:
        """0 to 1 along the axis."""
        low, high, now = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return (now - low) / (high - low) if high > low else 0.5


def nice(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from at most `low` to at least `high`."""
    span = max(high - low, 1e-9)
    step = 10 ** math.floor(math.log10(span / count))
    step = next(step * m for m in (1, 2, 2.5, 5, 10) if span / (step * m) <= count)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 10) for i in range(first, max(last, first + 1) + 1)]


def panel(
    title: str,
    lines: Sequence[Line],
    x: Axis,
    y: Axis,
    full: Mark | None = None,
    blind: float | None = None,
    size: tuple[int, int] = (360, 280),
) -> str:
    """One SVG. The full model is a line with its band, at its own place a square where x is a time; no image is dotted.

    Args:
        full: `x` inside the axis gives it a marker there too.
    """
    width, height = size
    inner, deep = width - LEFT - RIGHT, height - TOP - BOTTOM

    def px(value: float) -> float:
        return LEFT + inner * x.at(value)

    def py(value: float) -> float:
        return TOP + deep * (1 - y.at(value))

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(title, quote=True)}: {escape(y.title, quote=True)} over {escape(x.title, quote=True)}" '
        f'font-family="{FONT}" font-size="12" fill="{INK}">',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
        _text(LEFT, 17, title, size=14, weight=600),
        _text(width - RIGHT, 17, y.title, "end", colour=SOFT),
    ]
    for place, text in y.ticks:
        parts.append(f'<path d="M{LEFT} {py(place):.1f}H{width - RIGHT}" stroke="{RULE}"/>')
        parts.append(_text(LEFT - 6, py(place) + 4, text, "end", colour=SOFT))
    for place, text in x.ticks:
        parts.append(f'<path d="M{px(place):.1f} {TOP}V{TOP + deep}" stroke="{RULE}"/>')
        parts.append(_text(px(place), TOP + deep + 16, text, "middle", colour=SOFT))
    parts.append(_text(LEFT + inner / 2, height - 8, x.title, "middle", colour=SOFT))
    if full is not None:
        if full.low is not None and full.high is not None:
            up, down = py(min(full.high, y.high)), py(max(full.low, y.low))
            parts.append(
                f'<rect x="{LEFT}" y="{up:.1f}" width="{inner}" height="{down - up:.1f}" fill="#000" opacity=".09"/>'
            )
        parts.append(
            f'<path d="M{LEFT} {py(full.y):.1f}H{width - RIGHT}" stroke="#000" stroke-width="1.4">'
            f"<title>{escape(full.says)}</title></path>"
        )
    if blind is not None:
        parts.append(
            f'<path d="M{LEFT} {py(blind):.1f}H{width - RIGHT}" stroke="#000" stroke-dasharray="1 4" '
            f'stroke-width="1.4" stroke-linecap="round"><title>no image: {100 * blind:.1f} %</title></path>'
        )
    for line in sorted(lines, key=lambda line: line.style is not None):
        parts.append(_line(line, px, py, y))
    if full is not None and x.low <= full.x <= x.high and not x.log:
        parts.append(_marker("square", px(full.x), py(full.y), "#000", full.says, 5))
    return "".join([*parts, "</svg>"])


def key(style: Style | None, dotted: bool = False) -> str:
    """The sample of a line that stands in the legend."""
    colour = "#b6bec7" if style is None else style.colour
    dash = "1 4" if dotted else style.dash if style is not None else ""
    drawn = f'<path d="M1 7H33" stroke="{colour}" stroke-width="1.8" stroke-dasharray="{dash}"/>'
    marker = "" if style is None or not style.marker else _marker(style.marker, 17, 7, colour, "", 4)
    return f'<svg viewBox="0 0 34 14" aria-hidden="true">{drawn}{marker}</svg>'


def _line(line: Line, px: Callable[[float], float], py: Callable[[float], float], y: Axis) -> str:
    inside = [mark for mark in line.marks if y.low <= mark.y <= y.high]
    path = " ".join(f"{'L' if i else 'M'}{px(m.x):.1f} {py(m.y):.1f}" for i, m in enumerate(inside))
    if line.style is None:
        dots = "".join(_marker("circle", px(m.x), py(m.y), "#b6bec7", m.says, 1.7) for m in inside)
        return f'<path d="{path}" fill="none" stroke="#ccd3da" stroke-width="1"/>{dots}'
    style = line.style
    parts = [
        f'<path d="{path}" fill="none" stroke="{style.colour}" stroke-width="{style.width}" '
        f'stroke-dasharray="{style.dash}" stroke-linejoin="round"/>'
    ]
    for m in inside:
        if m.low is not None and m.high is not None:
            low, high = py(max(m.low, y.low)), py(min(m.high, y.high))
            parts.append(f'<path d="M{px(m.x):.1f} {low:.1f}V{high:.1f}" stroke="{style.colour}" opacity=".75"/>')
        parts.append(_marker(style.marker, px(m.x), py(m.y), style.colour, m.says, 4))
    return "".join(parts)


def _marker(kind: str, x: float, y: float, colour: str, says: str, r: float) -> str:
    title = f"<title>{escape(says)}</title>" if says else ""
    if kind == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r}" fill="{colour}">{title}</circle>'
    if kind in ("cross", "plus"):
        d = r * 0.9
        arms = (
            f"M{x - d:.1f} {y - d:.1f}l{2 * d} {2 * d}m0 {-2 * d}l{-2 * d} {2 * d}"
            if kind == "cross"
            else (f"M{x - r:.1f} {y:.1f}h{2 * r}M{x:.1f} {y - r:.1f}v{2 * r}")
        )
        return f'<path d="{arms}" stroke="{colour}" stroke-width="2" fill="none">{title}</path>'
    corners = {
        "square": ((-1, -1), (1, -1), (1, 1), (-1, 1)),
        "triangle": ((0, -1.25), (1.15, 0.9), (-1.15, 0.9)),
        "down": ((0, 1.25), (1.15, -0.9), (-1.15, -0.9)),
        "diamond": ((0, -1.35), (1.35, 0), (0, 1.35), (-1.35, 0)),
        "hexagon": ((-0.6, -1.1), (0.6, -1.1), (1.2, 0), (0.6, 1.1), (-0.6, 1.1), (-1.2, 0)),
        "star": (
            (0, -1.5),
            (0.4, -0.4),
            (1.5, -0.4),
            (0.6, 0.3),
            (0.9, 1.4),
            (0, 0.75),
            (-0.9, 1.4),
            (-0.6, 0.3),
            (-1.5, -0.4),
            (-0.4, -0.4),
        ),
    }[kind]
    points = " ".join(f"{x + r * 0.9 * a:.1f},{y + r * 0.9 * b:.1f}" for a, b in corners)
    return f'<polygon points="{points}" fill="{colour}">{title}</polygon>'


def _text(
    x: float, y: float, text: str, anchor: str = "start", size: int = 12, weight: int = 400, colour: str = INK
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" font-weight="{weight}" '
        f'fill="{colour}">{escape(text)}</text>'
    )
