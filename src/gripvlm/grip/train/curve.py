"""The learning curve of a run, from its metrics file."""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path
from statistics import fmean

from gripvlm.utils import disk

__all__ = ["draw_curve"]


def draw_curve(metrics: Path, target: Path) -> Path | None:
    """Validation and training against steps, with the step that is kept; None without matplotlib or metrics.

    Rows: answers right at each budget; what decides which step is kept, the mean over budgets; the training reward or
    loss, each value and means of blocks.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        return None
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()] if metrics.exists() else []
    if not lines:
        return None
    stages = list(dict.fromkeys(line["stage"] for line in lines))
    figure = Figure(figsize=(4.2 * len(stages) + 1, 8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(3, len(stages), squeeze=False, sharex="col")
    for column, stage in enumerate(stages):
        right, kept, trained = axes[:, column]
        mine = [line for line in lines if line["stage"] == stage]
        judged = [(line["step"], line["val"]) for line in mine if "val" in line]
        right.set(title=stage, ylabel="validation: answers right (%)")
        if judged:
            steps = [step for step, _ in judged]
            for name in [key for key in judged[0][1] if key.startswith("exact@")]:
                keep = f"{100 * float(name.removeprefix('exact@')):g} %"
                right.plot(steps, [100 * found[name] for _, found in judged], marker=".", label=keep)
            kept.plot(steps, [found["objective"] for _, found in judged], marker=".")
            best, found = max(judged, key=lambda pair: pair[1]["objective"])
            kept.plot([best], [found["objective"]], "o", mfc="none", ms=11, label=f"kept: step {best}")
            kept.legend(fontsize=8)
        kept.set(ylabel="validation: mean reward")
        key = "reward" if any("reward" in line for line in mine) else "loss"
        values = [(line["step"], line[key]) for line in mine if key in line]
        size = max(1, len(values) // 25)
        blocks = [values[i : i + size] for i in range(0, len(values), size)]
        trained.plot(*zip(*values, strict=True), lw=0.5, alpha=0.4) if values else None
        trained.plot([fmean(x for x, _ in b) for b in blocks], [fmean(y for _, y in b) for b in blocks], color="C0")
        trained.set(xlabel="step", ylabel=f"training: {key}")
        trained.xaxis.set_major_locator(MaxNLocator(integer=True))
        for row in axes[:, column]:
            row.grid(alpha=0.3)
    if handles := axes[0][-1].get_legend_handles_labels()[0]:
        figure.legend(handles=handles, title="tokens kept", fontsize=8, loc="outside right upper")
    drawn = BytesIO()
    figure.savefig(drawn, dpi=130, format="png")
    disk.write(target, drawn.getvalue())
    return target
