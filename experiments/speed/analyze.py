"""Tables of REPORT.md and README.md, and first_token.png.

python -m experiments.speed.analyze
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from experiments.results import load, percent, read_json, share, table
from experiments.speed.time_to_score import to_score
from experiments.tables import fill

HERE = Path(__file__).parent
STUDY = "speed"
BENCH = {
    "lab, CPU": "speed/results/cpu_lab.json",
    "0.5 B, CPU": "speed/results/cpu_llava-0.5b.json",
    "0.5 B, CPU, batch 4": "speed/results/cpu_llava-0.5b_batch4.json",
    "LLaVA 7 B, H200": "gpu/results/h200_bench-llava-1.5-7b.json",
    "Qwen2.5-VL 7 B, H200": "gpu/results/h200_bench-qwen2.5-vl-7b.json",
}
NEAR = (0.125, 0.11)
"""Budgets that are shown: an eighth of the tokens on the CPU, a ninth on the GPU."""


def spread(value: dict[str, float], scale: float = 1.0, digits: int = 2) -> str:
    """Median and quartiles: `0.44 [0.43, 0.45]`."""
    middle, low, high = (f"{scale * value[name]:.{digits}f}" for name in ("median", "low", "high"))
    return f"{middle} [{low}, {high}]"


def end_to_end(files: Sequence[str], pruners: Sequence[str], budgets: Sequence[float] = NEAR) -> str:
    """Pruned runs and their limit as a share of the unpruned model's time in the same turn."""
    rows = []
    for name in files:
        for row in read_json(BENCH[name])["rows"]:
            repeated = "batch 4" in name and row["batch"] == 1  # another file has it, with more turns
            if row["keep"] not in budgets or row["failed"] or repeated or (row["pruner"] or "limit") not in pruners:
                continue
            ratio = row["to_full"]
            added = "-" if row["kind"] == "limit" else spread(ratio["added"], 100, 1)
            what = f"{name.partition(', batch')[0]}, batch {row['batch']}: {row['pruner'] or 'limit'}"
            tokens = f"{row['kept']:.0f} of {row['visual_tokens']:.0f}"
            rows.append([what, tokens, *(spread(ratio[phase]) for phase in ("prefill", "first_token", "whole")), added])
    return table(["", "tokens", "prefill", "first token", "end to end", "added, %"], rows)


def overhead() -> str:
    """Milliseconds a sample outside encoder, pruner and prefill, in two versions of gripvlm."""
    turns = [read_json(f"{STUDY}/results/overhead_{name}.json")["turns"] for name in ("before", "after")]
    rows = []
    for batch, pruners in turns[0][0].items():
        for pruner in pruners:
            old, new = ([turn[batch][pruner] for turn in version] for version in turns)
            old, new = ([turn["overhead"] + turn["other"] for turn in version] for version in (old, new))
            ratios = [after / before for before, after in zip(old, new, strict=True)]
            cells = (f"{median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]",)
            rows.append([f"`{pruner}`, batch {batch}", f"{median(old):.2f}", f"{median(new):.2f}", *cells])
    return table(["", "before, ms", "after, ms", "after / before"], rows)


def equal_accuracy() -> str:
    """Score and time of each pruner on the lab's test split, both beside the unpruned model's."""
    found = load(f"{STUDY}/results/equal_accuracy")
    full = found["full"][0]
    rows = [["all tokens", "100 %", percent(full.score("1.0")), "1.00", "-"]]
    for name, (result,) in found.items():
        for budget in result.budgets if name != "full" else ():
            seconds, whole = result.content["seconds"][budget], result.content["seconds_unpruned"]
            cells = (share(budget), percent(result.score(budget)), f"{seconds['total'] / whole:.2f}")
            rows.append([f"`{result.content['pruner']}`", *cells, f"{seconds['vision'] / whole:.2f}"])
    return table(["", "tokens", "right answers, %", "time", "of it vision encoder"], rows)


def time_to_score() -> str:
    """Shares of the unpruned model's time until a score is reached, with 95 % of the draws of pictures."""

    def cell(values: Sequence[float], digits: int = 2) -> str:
        middle, low, high = (f"{value:.{digits}f}" for value in values)
        return f"{middle} [{low}, {high}]"

    rows = [
        [row["shape"], f"{100 * row['below']:g} points", *(cell(row[name]) for name in ("grip", "free", "ratio"))]
        for row in to_score()
    ]
    return table(["times of", "below all tokens", "`grip`", "training-free", "ratio"], rows)


def rollouts() -> str:
    """Speed of scoring subsets in training, and of whole steps."""
    rows = []
    for name, model in read_json(f"{STUDY}/results/rollouts.json")["models"].items():
        for kept, found in model["by_kept"].items():
            limit = [spread(found["share_of_limit"][what], 100, 0) for what in ("rollouts", "step")]
            loop = [spread(found["to_re_encoding"][what], 1, 1) for what in ("rollouts", "step")]
            rows.append([f"{name}, {kept} of {model['visual_tokens']} tokens", *limit, *loop])
    head = ["", "rollouts, % of limit", "step, % of limit", "rollouts, x loop", "step, x loop"]
    return table(head, rows)


README = {
    "LLaVA 7 B, H200": {32: "LLaVA-1.5-7B's shape, NVIDIA H200", 1: "LLaVA-1.5-7B's shape, NVIDIA H200"},
    "Qwen2.5-VL 7 B, H200": {8: "Qwen2.5-VL-7B's shape, NVIDIA H200"},
    "0.5 B, CPU": {1: "LLaVA with a 0.5 B language model, AMD EPYC, 2 threads"},
    "lab, CPU": {1: "the lab's small model, AMD EPYC, 2 threads"},
}
"""Rows of README's table: file -> batch size -> what ran."""


def readme() -> str:
    """What `grip` changes at about a tenth of the tokens; its score where the weights are trained, on the lab."""
    scored = load("grip_shipped/results")
    right = [percent(scored[name][0].score(keep)) for name, keep in (("full", "1.0"), ("lab", "0.125"))]
    rows = []
    for name, batches in README.items():
        found = read_json(BENCH[name])["rows"]
        for batch, what in batches.items():
            full = next(row for row in found if row["batch"] == batch and row["kind"] == "full")
            asked = (batch, "grip")
            pruned = next(row for row in found if (row["batch"], row["pruner"]) == asked and row["keep"] in NEAR)
            milliseconds = [f"{1000 * row['seconds']['first_token']['median']:.0f}" for row in (full, pruned)]
            megabytes = [f"{row['kv_bytes'] / 1e6:.{1 if row['kv_bytes'] < 1e8 else 0}f}" for row in (full, pruned)]
            tokens = [f"{row['kept']:.0f}" for row in (full, pruned)]
            cells = [" -> ".join(pair) for pair in (tokens, milliseconds, megabytes)]
            answers = " -> ".join(right) + " %" if name.startswith("lab") else "random weights"
            rows.append([f"{what}, batch {batch}", *cells[:2], spread(pruned["to_full"]["whole"]), cells[2], answers])
    head = ["model, machine", "visual tokens", "first token, ms", "end to end", "KV cache, MB", "right answers"]
    return table(head, rows)


def tables() -> dict[str, dict[str, str]]:
    page = {
        "end_to_end": end_to_end([name for name in BENCH if "CPU" in name], ("limit", "norm", "grip")),
        "equal_accuracy": equal_accuracy(),
        "time_to_score": time_to_score(),
        "overhead": overhead(),
        "rollouts": rollouts(),
    }
    return {f"experiments/{STUDY}/REPORT.md": page, "README.md": {"measured": readme()}}


def draw() -> None:
    """Time to the first token as a share of the unpruned model's, at an eighth or a ninth of the tokens."""
    from matplotlib import pyplot as plt

    found: dict[str, dict[str, Any]] = {}
    for name, file in BENCH.items():
        for row in read_json(file)["rows"]:
            if row["keep"] in NEAR and not row["failed"] and "batch 4" not in name:
                where = found.setdefault(f"{name}, batch {row['batch']}", {})
                where[row["pruner"] or "limit"] = row["to_full"]["first_token"]
    figure, axis = plt.subplots(figsize=(7, 3.2), layout="constrained")
    for name, style in (("limit", "k|"), ("divprune", "C0s"), ("grip", "C3o")):
        for place, measured in enumerate(reversed(found.values())):
            ratio: dict[str, float] = measured[name]
            error = [[ratio["median"] - ratio["low"]], [ratio["high"] - ratio["median"]]]
            label = name if not place else None
            axis.errorbar(ratio["median"], place, xerr=error, fmt=style, ms=10 if name == "limit" else 5, label=label)
    axis.axvline(1, color="gray", lw=1, ls=":")
    axis.set(xlim=(0, 1.5), xlabel="time to the first token / unpruned", yticks=range(len(found)))
    axis.set_yticklabels(reversed(found), fontsize=8)
    axis.legend(fontsize=8, frameon=False, loc="lower right")
    figure.savefig(HERE / "first_token.png", dpi=90, metadata={"Software": None})
    plt.close(figure)


if __name__ == "__main__":
    draw()
    for path, page in tables().items():
        fill(path, page)
