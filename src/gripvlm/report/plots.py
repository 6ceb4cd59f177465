"""Score against the share of visual tokens kept, one panel a task and one for the mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from gripvlm.errors import GripError
from gripvlm.report.tables import short, task_order, with_means
from gripvlm.utils import disk

__all__ = ["ALWAYS", "plot"]

ALWAYS = ("full", "random", "grid")
"""What a pruner is measured against, on every plot."""

# Okabe and Ito's colours, which colour-blind readers tell apart; markers differ as well.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#6B4C9A", "#8C6D1F")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_FIXED = {"random": ("#777777", "x", "--"), "grid": ("#777777", "+", ":"), "oracle": ("#000000", "h", "-")}


def plot(rows: Sequence[Mapping[str, Any]], path: str | Path) -> Path:
    """Draws the rows to a file whose ending says the format (png, svg, pdf).

    Intervals are vertical bars, the full model a line with its band, the model without the image a
    dotted line.

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
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise GripError("plots need matplotlib: pip install 'gripvlm[plot]'") from None
    tasks = task_order(rows)
    columns = min(4, len(tasks))
    lines = -(-len(tasks) // columns)
    figure = Figure(figsize=(3.3 * columns + 0.4, 2.9 * lines + 0.9), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(lines, columns, squeeze=False, sharey=True).flatten()
    styles = _styles(rows)
    for axis, task in zip(axes, tasks, strict=False):
        _panel(axis, [row for row in rows if row["task"] == task], styles)
        axis.set_title(short(task), fontsize=11, fontweight="bold" if task == "mean" else "normal", loc="left")
    for axis in axes[len(tasks) :]:
        axis.set_visible(False)
    for axis in axes[::columns]:
        axis.set_ylabel("score, %")
    figure.supxlabel("visual tokens kept, %", fontsize=10)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(6, len(labels)), frameon=False, fontsize=9)
    target, drawn = Path(path), BytesIO()
    figure.savefig(drawn, dpi=160, format=target.suffix.removeprefix(".") or "png")
    disk.write(target, drawn.getvalue())
    return target


def _styles(rows: Sequence[Mapping[str, Any]]) -> dict[str, tuple[str, str, str]]:
    """pruner -> (colour, marker, line style), baselines always the same."""
    names = [name for name in dict.fromkeys(row["pruner"] for row in rows) if name != "full"]
    free = [name for name in names if name not in _FIXED]
    found = {name: (_COLOURS[i % 8], _MARKERS[(i + i // 8) % 8], "-") for i, name in enumerate(free)}
    return {name: _FIXED.get(name) or found[name] for name in names}


def _panel(axis: Any, rows: Sequence[Mapping[str, Any]], styles: Mapping[str, tuple[str, str, str]]) -> None:
    full = next((row for row in rows if row["pruner"] == "full"), None)
    if full is not None:
        axis.axhline(100 * full["score"], color="black", linewidth=1.2, label="full", zorder=1)
        if full["ci_low"] is not None:
            axis.axhspan(100 * full["ci_low"], 100 * full["ci_high"], color="black", alpha=0.08, linewidth=0)
        if full.get("blind") is not None:
            axis.axhline(100 * full["blind"], color="black", linewidth=1, linestyle=(0, (1, 3)), label="no image")
    for place, (name, (colour, marker, line)) in enumerate(styles.items()):
        points = sorted((row for row in rows if row["pruner"] == name), key=lambda row: row["keep_fraction"])
        if not points:
            continue
        nudge = 1.0 + 0.018 * (place - len(styles) / 2)  # so that intervals at one budget stay apart
        x = [100 * row["keep_fraction"] * nudge for row in points]
        y = [100 * row["score"] for row in points]
        known = [row["ci_low"] is not None for row in points]
        low = [100 * (row["score"] - row["ci_low"]) if k else 0.0 for row, k in zip(points, known, strict=True)]
        high = [100 * (row["ci_high"] - row["score"]) if k else 0.0 for row, k in zip(points, known, strict=True)]
        spread = [[max(0.0, value) for value in side] for side in (low, high)]
        options = {"color": colour, "marker": marker, "linestyle": line, "markersize": 5, "linewidth": 1.3}
        axis.errorbar(x, y, yerr=spread, elinewidth=0.8, capsize=1.5, label=name, **options)
    axis.set_xscale("log")
    ticks = sorted({round(100 * row["keep_fraction"], 1) for row in rows if row["pruner"] != "full"})
    apart = [tick for i, tick in enumerate(ticks) if i == 0 or tick / ticks[i - 1] > 1.25]
    axis.set_xticks(apart, [f"{tick:g}" for tick in apart])
    axis.minorticks_off()
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
