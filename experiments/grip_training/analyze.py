"""Tables of REPORT.md.

python -m experiments.grip_training.analyze
"""

from __future__ import annotations

from statistics import mean

from experiments.results import read_json, table
from experiments.tables import fill

PAGE = "experiments/grip_training/REPORT.md"


def gradients() -> str:
    found = read_json("grip_training/results/gradients.json")
    images, cosine = found["images"], found["perturbed_cosine"]
    rows = [
        [
            "gradient of eight equal images over that of one, ratios of subsets",
            f"{found['audit']['images']:.1f}",
            f"{images['sequence']:.3f}",
        ],
        ["the same, ratios of tokens", "", f"{images['token']:.3f}"],
        ["cosine of the perturbed gradient with its expectation", f"{cosine['4']:.2f}", f"{cosine['512']:.2f}"],
    ]
    for name, both in found["norms"].items():
        rows.append([f"norm of the gradient, {name}", *(f"{mean(both[when]):.2g}" for when in ("before", "now"))])
    return table(["", "before", "now"], rows)


def tower() -> str:
    rows = []
    for stage, spent in read_json("grip_training/results/tower.json")["shares"].items():
        part = [f"{100 * spent[each] / spent['step']:.0f} %" for each in ("tower", "read")]
        rows.append([stage, f"{spent['step']:.1f}", *part])
    return table(["", "a step, s", "vision tower", "reading pictures"], rows)


def tables() -> dict[str, dict[str, str]]:
    return {PAGE: {"gradients": gradients(), "tower": tower()}}


if __name__ == "__main__":
    for page, each in tables().items():
        fill(page, each)
