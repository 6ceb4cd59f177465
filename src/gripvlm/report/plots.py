"""Score over the share of visual tokens kept, or over time: one panel a task and one for the mean, by matplotlib."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

from gripvlm.errors import GripError
from gripvlm.report.tables import MEAN, Row, short, task_order, with_means
from gripvlm.utils import disk

__all__ = ["ALWAYS", "Mark", "Panel", "Style", "draw", "plot", "styles_of"]

ALWAYS = ("full", "random", "grid")
"""What a pruner is measured against, on every plot."""

# Okabe and Ito's colours, which colour-blind readers tell apart; markers differ as well.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#6B4C9A", "#8C6D1F")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


class Style(NamedTuple):
    """How one method looks; colour, marker and dashes all differ, so that no one of them is needed."""

    colour: str
    marker: str
    line: str = "-"


_FIXED = {"random": Style("#777777", "x", "--"), "grid": Style("#777777", "+", ":"), "oracle": Style("#000000", "h")}
_OTHER = Style("#c3cad1", ".")


class Mark(NamedTuple):
    """A point: its cost (share of tokens, or time), its score, and the ends of the interval where there is one."""

    x: float
    score: float
    low: float | None = None
    high: float | None = None


@dataclass
class Panel:
    """One pair of axes.

    Attributes:
        title: above it.
        curves: method -> its points.
        full: the full model, a line with its band.
        blind: the score without the image, a dotted line.
    """

    title: str
    curves: dict[str, list[Mark]] = field(default_factory=dict)
    full: Mark | None = None
    blind: float | None = None


def plot(rows: Sequence[Row], path: str | Path) -> Path:
    """Draws the rows to a file whose ending says the format (png, svg, pdf).

    Args:
        rows: `result["rows"] + result["means"]`, with `full`, `random` and `grid` among them.

    Raises:
        GripError: those baselines are missing, or matplotlib is.
    """
    rows = with_means(rows)
    missing = [name for name in ALWAYS if not any(row["pruner"].partition(":")[0] == name for row in rows)]
    if missing:
        raise GripError(
            f"a plot always shows {', '.join(ALWAYS)}, but {', '.join(missing)} is missing: add it to --pruners"
        )
    panels = []
    for task in task_order(rows):
        panel = Panel(short(task))
        for row in (row for row in rows if row["task"] == task):
            mark = Mark(row["keep_fraction"], row["score"], row["ci_low"], row["ci_high"])
            if row["pruner"] == "full":
                panel.full, panel.blind = mark, row.get("blind")
            else:
                panel.curves.setdefault(row["pruner"], []).append(mark)
        panels.append(panel)
    target = Path(path)
    styles = styles_of(row["pruner"] for row in rows if row["pruner"] != "full")
    disk.write(target, draw(panels, styles, target.suffix.removeprefix(".") or "png"))
    return target


def styles_of(methods: Iterable[str], coloured: int | None = None) -> dict[str, Style]:
    """Method -> style, the references always the same; beyond so many `coloured` ones the others share a light grey."""
    styles: dict[str, Style] = {}
    free = 0
    for name in dict.fromkeys(methods):
        if name in _FIXED:
            styles[name] = _FIXED[name]
        elif coloured is not None and free >= coloured:
            styles[name] = _OTHER
        else:
            # the markers shift by one each round, so that the ninth method is not the first's twin
            styles[name] = Style(_COLOURS[free % 8], _MARKERS[(free + free // 8) % 8])
            free += 1
    return styles


def draw(
    panels: Sequence[Panel], styles: Mapping[str, Style], kind: str, *, time: bool = False, legend: bool = True
) -> bytes:
    """The panels as one picture.

    Args:
        styles: of every method in the panels.
        kind: png, svg or pdf.
        time: the cost is time as a share of the full model's, not the share of tokens.

    Raises:
        GripError: matplotlib is missing.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise GripError("plots need matplotlib: pip install 'gripvlm[plot]'") from None
    columns = min(4, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(3.3 * columns + 0.6, 2.9 * lines + (0.9 if legend else 0.4)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(lines, columns, squeeze=False, sharey=True).flatten()
    for axis, panel in zip(axes, panels, strict=False):
        _draw_panel(axis, panel, styles, time)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    for axis in axes[::columns]:
        axis.set_ylabel("score, %")
    figure.supxlabel("time a question / the full model's" if time else "visual tokens kept, %", fontsize=10)
    if legend:
        by_label: dict[str, Any] = {}  # one entry for all that are grey
        for axis in axes:
            by_label |= {label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
        across = min(3 * columns if columns < 2 else 6, len(by_label))
        figure.legend(
            by_label.values(), by_label.keys(), loc="outside upper center", ncols=across, frameon=False, fontsize=9
        )
    file = BytesIO()
    # text stays text and ids do not change from run to run: small files, and no difference where nothing differs
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "gripvlm"}):
        figure.savefig(file, dpi=160, format=kind, metadata={"Date": None} if kind == "svg" else None)
    return file.getvalue()


def _draw_panel(axis: Any, panel: Panel, styles: Mapping[str, Style], time: bool) -> None:
    axis.set_title(
        panel.title, fontsize=11, fontweight="bold" if panel.title.startswith(MEAN) else "normal", loc="left"
    )
    if panel.full is not None:
        axis.axhline(100 * panel.full.score, color="black", linewidth=1.2, label="full", zorder=1)
        if panel.full.low is not None and panel.full.high is not None:
            axis.axhspan(100 * panel.full.low, 100 * panel.full.high, color="black", alpha=0.08, linewidth=0)
        if time:
            axis.plot([1.0], [100 * panel.full.score], "ks", markersize=5)
    if panel.blind is not None:
        axis.axhline(100 * panel.blind, color="black", linewidth=1, linestyle=(0, (1, 3)), label="no image")
    drawn = sorted((name for name in styles if name in panel.curves), key=lambda name: styles[name] is _OTHER)
    for place, name in enumerate(drawn):
        # shares in percent, a little apart so that intervals at one budget are; times differ by themselves
        nudge = 0.0 if styles[name] is _OTHER else 0.018 * (place - len(drawn) / 2)
        scale = 1.0 if time else 100 * (1.0 + nudge)
        _draw_curve(axis, name, sorted(panel.curves[name], key=lambda mark: mark.x), styles[name], scale)
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    if not time:
        axis.set_xscale("log")
        shares = sorted({round(100 * mark.x, 1) for marks in panel.curves.values() for mark in marks})
        apart: list[float] = []
        for share in shares:
            if not apart or share / apart[-1] > 1.25:
                apart.append(share)
        axis.set_xticks(apart, [f"{share:g}" for share in apart])
        axis.minorticks_off()


def _draw_curve(axis: Any, name: str, marks: Sequence[Mark], style: Style, scale: float) -> None:
    x, y = [scale * mark.x for mark in marks], [100 * mark.score for mark in marks]
    options = {"color": style.colour, "marker": style.marker, "linestyle": style.line}
    if style is _OTHER:
        axis.plot(x, y, linewidth=0.8, markersize=3, label="other methods", zorder=1, **options)
        return
    below = [0.0 if mark.low is None else max(0.0, 100 * (mark.score - mark.low)) for mark in marks]
    above = [0.0 if mark.high is None else max(0.0, 100 * (mark.high - mark.score)) for mark in marks]
    axis.errorbar(x, y, [below, above], elinewidth=0.8, capsize=1.5, markersize=5, linewidth=1.3, label=name, **options)
