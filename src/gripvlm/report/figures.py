"""The plots of a comparison: score over tokens kept, a panel a task and one for the mean, and score over time."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from gripvlm.eval.variants import ORACLE
from gripvlm.report.blocks import Block, Figures, Text
from gripvlm.report.points import Cell, Comparison, Point, keep_text
from gripvlm.report.svg import Axis, Line, Mark, Style, key, nice, panel
from gripvlm.report.tables import short

__all__ = ["ALWAYS", "highlighted", "plots", "score_text"]

ALWAYS = ("random", "grid")
"""With the full model on every plot where they were measured; the page says where they were not."""

# Okabe and Ito's colours, which colour-blind readers tell apart; markers differ as well.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = ("circle", "square", "triangle", "diamond", "down", "star")
_FIXED = {
    "random": Style("#5c6670", "cross", "5 3"),
    "grid": Style("#5c6670", "plus", "1 3"),
    ORACLE: Style("#000000", "hexagon", "7 2 1 2", 1.3),
}
FULL_LINE = Style("#000000", "square")
_CROWD = "other methods"


def highlighted(comparison: Comparison, count: int = len(_COLOURS)) -> dict[str, Style]:
    """Method -> style: the best by mean score over the usual budgets, and those that are always there."""
    methods = list(dict.fromkeys(p.method for p in comparison.points if not p.full))
    usual = usual_budgets([frozenset(p.keep for p in comparison.points if p.method == m) for m in methods])
    height = {m: _height(comparison, m, usual) for m in methods}
    free = sorted((m for m in methods if m not in _FIXED), key=lambda m: -height[m])[:count]
    styles = {m: Style(_COLOURS[i], _MARKERS[i]) for i, m in enumerate(free)}
    return styles | {m: style for m, style in _FIXED.items() if m in methods}


def _height(comparison: Comparison, method: str, usual: Collection[int | float | str]) -> float:
    """Its mean score, summed over the budgets that most methods have; what it lacks counts as nothing."""
    mine = {p.keep: p.mean.value for p in comparison.points if p.method == method}
    return sum(mine.get(keep, 0.0) for keep in usual)


def score_text(cell: Cell) -> str:
    """`83.6 [82.0, 85.1]`, in percent."""
    text = f"{100 * cell.value:.1f}"
    return text if cell.low is None or cell.high is None else f"{text} [{100 * cell.low:.1f}, {100 * cell.high:.1f}]"


def _cell(point: Point, task: int | None) -> Cell:
    return point.mean if task is None else point.cells[task]


def _says(point: Point, task: int | None) -> str:
    share = f"{100 * point.kept:.1f} % kept, {point.tokens:g} tokens"
    text = f"{point.label}: {score_text(_cell(point, task))} %, {share}, time {point.ratio:.2f} of full"
    return f"{text}\n{point.command}"


def _lines(comparison: Comparison, styles: dict[str, Style], task: int | None, time: bool) -> list[Line]:
    lines = []
    for method in dict.fromkeys(p.method for p in comparison.points if not p.full):
        mine = sorted((p for p in comparison.points if p.method == method), key=lambda p: p.kept)
        marks = []
        for point in mine:
            cell = _cell(point, task)
            marks.append(Mark(point.ratio if time else point.kept, cell.value, cell.low, cell.high, _says(point, task)))
        lines.append(Line(method, marks, styles.get(method)))
    return lines


def _legend(comparison: Comparison, styles: dict[str, Style]) -> list[tuple[str, str]]:
    legend = [(key(FULL_LINE), "full"), *((key(style), name) for name, style in styles.items())]
    if {p.method for p in comparison.points if not p.full} - styles.keys():
        legend.append((key(None), _CROWD))
    if comparison.blind is not None:
        legend.append((key(Style("#000000", ""), dotted=True), "no image"))
    return legend


def _scores(low: float, high: float) -> Axis:
    ticks = nice(low, high)
    top = min(ticks[-1], 1.0) if high <= 1 else ticks[-1]
    return Axis(ticks[0], max(top, high), [(t, f"{100 * t:g}") for t in ticks if t <= max(top, high)], "score, %")


def _range(cells: Sequence[Cell]) -> tuple[float, float]:
    low = min(c.value if c.low is None else c.low for c in cells)
    high = max(c.value if c.high is None else c.high for c in cells)
    return max(0.0, low) if low >= 0 else low, high


def plots(comparison: Comparison, name: str) -> list[Block]:
    """The mean score over tokens and over time, the frontiers in words, and a panel a task where there are several."""
    styles = highlighted(comparison)
    several = len(comparison.tasks) > 1
    mean = _over_tokens(comparison, styles, None, "mean over tasks" if several else short(comparison.tasks[0]))
    drawn = [(f"{name}-mean", mean), (f"{name}-time", _over_time(comparison, styles))]
    blocks: list[Block] = [
        Figures(drawn, _legend(comparison, styles), wide=True),
        Text(frontier_text(comparison, False)),
    ]
    if len(comparison.results) == 1:
        blocks.append(Text(frontier_text(comparison, True)))
    if several:
        names = [short(task) for task in comparison.tasks]
        panels = [(f"{name}-{task}", _over_tokens(comparison, styles, i, task)) for i, task in enumerate(names)]
        blocks.append(Figures(panels, ()))
    return blocks


def _over_tokens(comparison: Comparison, styles: dict[str, Style], task: int | None, title: str) -> str:
    """Score over the share of tokens kept, on a logarithmic axis."""
    shares = sorted({p.kept for p in comparison.points if not p.full})
    apart: list[float] = []
    for share in shares:
        if not apart or share / apart[-1] > 1.3:
            apart.append(share)
    ticks = [(share, f"{100 * share:.2g}") for share in apart]
    x = Axis(shares[0] / 1.15, max(shares[-1], 0.5) * 1.15, ticks, "visual tokens kept, %", True)
    blind = None if comparison.blind is None else comparison.blind[-1 if task is None else task]
    cells = [_cell(p, task) for p in comparison.points]
    low, high = _range([*cells, *([] if blind is None else [Cell(blind)])])
    full = next(p for p in comparison.points if p.full)
    whole = _cell(full, task)
    mark = Mark(full.kept, whole.value, whole.low, whole.high, _says(full, task))
    return panel(title, _lines(comparison, styles, task, False), x, _scores(low, high), mark, blind)


def _over_time(comparison: Comparison, styles: dict[str, Style]) -> str:
    """The mean score over the measured time, as a share of the full model's in the same run."""
    ratios = [p.ratio for p in comparison.points]
    ticks = nice(min(0.9, *ratios), max(1.0, *ratios))
    x = Axis(ticks[0], ticks[-1], [(t, f"{t:g}") for t in ticks], "time a question / the full model's")
    low, high = _range([*(p.mean for p in comparison.points), *(Cell(b) for b in (comparison.blind or ())[-1:])])
    full = next(p for p in comparison.points if p.full)
    mark = Mark(1.0, full.mean.value, full.mean.low, full.mean.high, _says(full, None))
    blind = None if comparison.blind is None else comparison.blind[-1]
    return panel("mean, and time", _lines(comparison, styles, None, True), x, _scores(low, high), mark, blind)


def pareto(cost: Sequence[float], score: Sequence[float]) -> list[int]:
    """Numbers of the points that no other beats: none costs at most as much and scores more, or less and as much."""
    found, best = [], float("-inf")
    for i in sorted(range(len(cost)), key=lambda i: (cost[i], -score[i])):
        if score[i] > best:
            found.append(i)
            best = score[i]
    return found


def usual_budgets(budgets: Collection[frozenset[int | float | str]]) -> frozenset[int | float | str]:
    """Of the methods' sets of budgets the commonest one; of several as common the largest."""
    return max(budgets, key=lambda keeps: (sum(keeps == one for one in budgets), len(keeps)))


def frontier_text(comparison: Comparison, time: bool) -> str:
    """The points that no other beats, in words, `oracle` apart."""
    able = [p for p in comparison.points if p.method != ORACLE]
    best = pareto([p.ratio if time else p.kept for p in able], [p.mean.value for p in able])
    said = ", ".join(f"`{able[i].method}`" + ("" if able[i].full else f" {keep_text(able[i].keep)}") for i in best)
    kind = "as fast" if time else "with as few tokens"
    return (
        f"The frontier of mean score and {'time' if time else 'tokens'} (no other is {kind} and as accurate): {said}."
    )
