"""Score over the share of visual tokens kept, or over time, as an SVG."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from io import BytesIO
from typing import Any, NamedTuple

from gripvlm.errors import GripError
from gripvlm.report.tables import MEAN, Row, short

ALWAYS = ("full", "random", "grid")
"""What a pruner is measured against, on every plot."""
COSTS = {"keep_fraction": "visual tokens kept, %", "ratio": "time a question / the full model's"}
"""What a score may be drawn over: a column of the rows, and the words below the axis."""

# Okabe and Ito's colours, which colour-blind readers tell apart; markers differ as well.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_MARKERS = ("o", "s", "^", "D", "v", "P")
COLOURED = len(_COLOURS)
"""Methods that stand out; a seventh colour would not be told apart."""


class Style(NamedTuple):
    """How one method looks; colour, marker and dashes all differ, so that no one of them is needed."""

    color: str
    marker: str
    linestyle: str = "-"


_FIXED = {"random": Style("#777777", "x", "--"), "grid": Style("#777777", "+", ":"), "oracle": Style("#000000", "h")}
_FIXED |= {"downsample": Style("#777777", "1", "-.")}
_OTHER = Style("#c3cad1", ".")
HEIGHT = 4.2
"""Of a plot, in inches, with a legend of two columns."""
HALF_WIDE = 24
"""Characters of a name that fit into half of a plot's width."""


def styles_of(methods: Iterable[str]) -> dict[str, Style]:
    """Method -> style, the references always the same; all after the first `COLOURED` share a light grey."""
    styles: dict[str, Style] = {}
    free = 0
    for name in dict.fromkeys(methods):
        if name in _FIXED:
            styles[name] = _FIXED[name]
        elif free < COLOURED:
            styles[name] = Style(_COLOURS[free], _MARKERS[free])
            free += 1
        else:
            styles[name] = _OTHER
    return styles


def draw(rows: Sequence[Row], styles: Mapping[str, Style], cost: str) -> bytes:
    """An SVG of one task. Intervals are bars, the full model a line with its band.

    Args:
        rows: of `full` and of the methods that have a style.
        cost: what scores are drawn over, a key of `COSTS`.

    Raises:
        GripError: matplotlib is missing.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise GripError("plots need matplotlib: pip install 'gripvlm[plot]'") from None
    task = rows[0]["task"]
    figure = Figure(figsize=(3.9, HEIGHT), layout="constrained")
    # a canvas of its own: pyplot would keep every figure, and may look for a display
    FigureCanvasAgg(figure)
    axis = figure.add_subplot()
    _fill(axis, rows, styles, cost)
    axis.set_title(short(task), fontsize=11, fontweight="bold" if task == MEAN else "normal", loc="left")
    axis.set_ylabel("score, %")
    axis.set_xlabel(COSTS[cost])
    handles, labels = axis.get_legend_handles_labels()
    legend = dict(zip(labels, handles, strict=True))  # one entry for all that are grey
    columns = 2 if max(map(len, legend)) <= HALF_WIDE else 1  # longer names would be cut off at the sides
    figure.set_figheight(HEIGHT + 0.16 * (len(legend) if columns == 1 else 0))
    figure.legend(legend.values(), legend.keys(), loc="outside upper center", ncols=columns, frameon=False, fontsize=8)
    buffer = BytesIO()
    # text stays text and ids do not change from run to run: small files, and no difference where nothing differs
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "gripvlm"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _fill(axis: Any, rows: Sequence[Row], styles: Mapping[str, Style], cost: str) -> None:
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    for full in (row for row in rows if row["pruner"] == "full"):
        axis.axhline(100 * full["score"], color="black", linewidth=1.2, label="full", zorder=1)
        if full["ci_low"] is not None:
            axis.axhspan(100 * full["ci_low"], 100 * full["ci_high"], color="black", alpha=0.08, linewidth=0)
        if full.get("blind") is not None:
            axis.axhline(100 * full["blind"], color="black", linewidth=1, linestyle=(0, (1, 3)), label="no image")
        if cost == "ratio":
            axis.plot([1.0], [100 * full["score"]], "ks", markersize=5)
    for place, (name, style) in enumerate(styles.items()):
        points = sorted((row for row in rows if row["pruner"] == name), key=lambda row: row[cost])
        # shares in percent, a little apart so that intervals at one budget are; times differ by themselves
        scale = 1.0 if cost == "ratio" else 100.0 if style is _OTHER else 100 + 1.8 * (place - len(styles) / 2)
        if points:
            _curve(axis, name, [scale * row[cost] for row in points], points, style)
    if cost == "keep_fraction":
        # budgets go by factors
        axis.set_xscale("log")
        ticks: list[float] = []
        for share in sorted({round(100 * row[cost], 1) for row in rows if row["pruner"] != "full"}):
            # closer labels would overlap
            if not ticks or share / ticks[-1] > 1.25:
                ticks.append(share)
        axis.set_xticks(ticks, [f"{share:g}" for share in ticks])
        axis.minorticks_off()


def _curve(axis: Any, name: str, x: list[float], rows: Sequence[Row], style: Style) -> None:
    y = [100 * row["score"] for row in rows]
    if style is _OTHER:
        axis.plot(x, y, linewidth=0.8, markersize=3, label="other methods", zorder=1, **style._asdict())
        return
    # too few pictures give no interval, and a score need not lie within its own: a bar has no negative length
    lows = [row["score"] if row["ci_low"] is None else row["ci_low"] for row in rows]
    highs = [row["score"] if row["ci_high"] is None else row["ci_high"] for row in rows]
    below = [max(0.0, value - 100 * low) for value, low in zip(y, lows, strict=True)]
    above = [max(0.0, 100 * high - value) for value, high in zip(y, highs, strict=True)]
    size = {"elinewidth": 0.8, "capsize": 1.5, "markersize": 5, "linewidth": 1.3}
    axis.errorbar(x, y, [below, above], label=name, **size, **style._asdict())
