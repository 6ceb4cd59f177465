"""Tables of REPORT.md and of docs/recipes.md.

python -m experiments.dry_run.analyze
"""

from __future__ import annotations

from experiments.results import read_json, table
from experiments.tables import fill

PAGE = "experiments/dry_run/REPORT.md"
STAGES = ("distill", "grpo", "validation")


def steps() -> str:
    rows = []
    for name, label in (("lab", "lab-dense"), ("shape", "0.5B")):
        for row in read_json(f"dry_run/results/{name}.json")["rows"]:
            head = f"{label}, {100 * row['share']:g} % of the tokens: {row['stage']}"
            seconds = [f"{row[key]:.1f}" for key in ("told", "taken")]
            rows.append([head, *seconds, f"{row['taken'] / row['told']:.2f}"])
    return table(["", "said, s a step", "taken, s a step", "taken / said"], rows)


def recipes() -> str:
    told = read_json("dry_run/results/recipes.json")["recipes"]
    rows = [["visual tokens of the largest picture", *(str(each["sizes"]["visual"]) for each in told.values())]]
    rows.append(["the model's weights, GiB", *(f"{each['memory']['weights'] / 2**30:.1f}" for each in told.values())])
    rows.append(["at most at once, GiB", *(f"{each['peak'] / 2**30:.1f}" for each in told.values())])
    for stage in STAGES:
        rows.append([f"{stage}, h", *(f"{each['hours'][stage]:.1f}" for each in told.values())])
    rows.append(["together, h", *(f"{sum(each['hours'].values()):.1f}" for each in told.values())])
    return table(["", *told], rows)


def tables() -> dict[str, dict[str, str]]:
    return {PAGE: {"steps": steps()}, "docs/recipes.md": {"expected": recipes()}}


if __name__ == "__main__":
    for page, each in tables().items():
        fill(page, each)
