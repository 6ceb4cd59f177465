"""Tables of REPORT.md.

python -m experiments.tower_prune.analyze
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from experiments.results import load, over_pictures, percent, points, read_json, share, table
from experiments.tables import fill

HERE = Path(__file__).parent
STUDY = "tower_prune"
MODELS = {
    "llava-0.5b": "CLIP-L/14-336 and Qwen2-0.5B",
}

TOKENS = 256
"""Of a picture of the lab."""


def ratio(row: Mapping[str, Any], full: Mapping[str, Any], phase: str) -> str:
    """Median and extremes, turn by turn, of this setting's time / the unpruned model's."""
    by_turn = {run["turn"]: run[phase] for run in full["runs"]}
    found = [run[phase] / by_turn[run["turn"]] for run in row["runs"] if run["turn"] in by_turn]
    return f"{median(found):.2f} [{min(found):.2f}, {max(found):.2f}]"


def end_to_end() -> str:
    """Each setting's CPU time and FLOPs as a share of the unpruned model's."""
    rows = []
    for name, what in MODELS.items():
        content = read_json(f"{STUDY}/results/cpu_{name}.json")
        full = content["rows"][0]
        for row in content["rows"][1:]:
            setting = f"`{row['pruner']}`" if row["pruner"] else row["setting"]
            flops = row["runs"][0]["flops"] / full["runs"][0]["flops"]
            cells = [ratio(row, full, phase) for phase in ("vision", "prefill", "whole")]
            rows.append([f"{what}: {setting}", *cells, f"{flops:.2f}"])
    return table(["", "vision encoder", "prefill", "end to end", "FLOPs"], rows)


def lab() -> str:
    """Right answers on the lab, and what the tower kept."""
    rows = []
    content = read_json(f"{STUDY}/results/lab.json")
    for row in content["means"]:
        interval = f"{percent(row['ci_low'])} to {percent(row['ci_high'])}"
        cells = [f"{row.get('tower_tokens', TOKENS):.0f}", f"{row['tokens']:.0f}", percent(row["score"]), interval]
        rows.append([f"`{row['pruner']}`", *cells])
    return table(["", "tokens in the tower", "in the language model", "right answers, %", "95 %"], rows)


TWO_STAGES = {
    "grip": "scorer behind the tower alone",
    "two_stages_50": "trained, 50 % in the tower",
    "mmr_50": "`mmr(norm)`, 50 % in the tower",
    "two_stages_25": "trained, 25 % in the tower",
    "mmr_25": "`mmr(norm)`, 25 % in the tower",
}


def two_stages() -> str:
    """Right answers on `lab-dense` with a trained and an untrained choice inside the tower."""
    found, budgets = load(f"{STUDY}/results/two_stages"), ("0.125", "0.06")
    rows = [["all tokens", *[percent(found["full"][0].score("1.0"))] * 2, "", ""]]
    for name, label in TWO_STAGES.items():
        cells = [percent(found[name][0].score(budget)) for budget in budgets]
        differences = [points(over_pictures(found[name], budget, found["grip"])) for budget in budgets]
        rows.append([label, *cells, *(differences if name != "grip" else ("", ""))])
    for kept in ("50", "25"):
        pair = found[f"two_stages_{kept}"], found[f"mmr_{kept}"]
        differences = [points(over_pictures(pair[0], budget, pair[1])) for budget in budgets]
        rows.append([f"trained less `mmr(norm)`, {kept} % in the tower", "", "", *differences])
    return table(["", *map(share, budgets), *(f"difference, {share(budget)}" for budget in budgets)], rows)


def tables() -> dict[str, dict[str, str]]:
    """Page -> its tables."""
    page = {"end_to_end": end_to_end(), "lab": lab(), "two_stages": two_stages()}
    return {f"experiments/{STUDY}/REPORT.md": page}


if __name__ == "__main__":
    for page, made in tables().items():
        fill(page, made)
