"""Tables of REPORT.md.

python -m experiments.grip_cost.analyze
"""

from __future__ import annotations

from experiments.results import read_json, table
from experiments.tables import fill

PAGE = "experiments/grip_cost/REPORT.md"


def cost() -> str:
    rows = []
    for row in read_json("grip_cost/results/cpu.json")["rows"]:
        shares = (row["of_prefill_flops"], row["of_prefill_seconds"], row["of_pruned_prefill_flops"])
        name = f"{row['prompt']}: {row['scorer']}"
        rows.append([name, f"{row['gflops']:.1f}", *(f"{100 * share:.3f}" for share in shares)])
    head = ["", "GFLOPs", "of the full prefill, % of FLOPs", "% of time", "of the pruned prefill, % of FLOPs"]
    return table(head, rows)


def tables() -> dict[str, dict[str, str]]:
    return {PAGE: {"cost": cost()}}


if __name__ == "__main__":
    for page, each in tables().items():
        fill(page, each)
