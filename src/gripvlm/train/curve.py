"""The learning curve of a run, from its metrics file."""

from __future__ import annotations

import json
from pathlib import Path

__all__ = ["draw_curve"]


def draw_curve(metrics: Path, target: Path) -> Path | None:
    """Validation score at each budget against steps, and the training reward; None without matplotlib or metrics."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()] if metrics.exists() else []
    if not lines:
        return None
    stages = list(dict.fromkeys(line["stage"] for line in lines))
    figure = Figure(figsize=(4.6 * len(stages), 6.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(stages), squeeze=False)
    for column, stage in enumerate(stages):
        mine = [line for line in lines if line["stage"] == stage]
        judged = [line for line in mine if "val" in line]
        for name in [key for key in judged[0]["val"] if key.startswith("exact@")] if judged else []:
            keep = 100 * float(name.removeprefix("exact@"))
            axes[0][column].plot(
                [line["step"] for line in judged], [100 * line["val"][name] for line in judged], label=f"{keep:g} %"
            )
        axes[0][column].set(title=f"{stage}: validation, hard top-k", ylabel="answers right (%)", ylim=(0, 100))
        if axes[0][column].lines:
            axes[0][column].legend(title="tokens kept", fontsize=8)
        key = "reward" if any("reward" in line for line in mine) else "loss"
        seen = [(line["step"], line[key]) for line in mine if key in line]
        size = max(1, len(seen) // 50)
        blocks = [seen[i : i + size] for i in range(0, len(seen), size)]
        axes[1][column].plot([b[-1][0] for b in blocks], [sum(y for _, y in b) / len(b) for b in blocks])
        axes[1][column].set(xlabel="step", ylabel=f"training {key}")
        for row in axes[:, column]:
            row.grid(alpha=0.3)
    figure.savefig(target, dpi=130)
    return target
