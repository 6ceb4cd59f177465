"""Tables of REPORT.md and docs/lab.md, and scores.csv.

python -m experiments.lab_dense.analyze
"""

from __future__ import annotations

from pathlib import Path

from experiments.results import Result, average, load, percent, share, table
from experiments.tables import fill

HERE = Path(__file__).parent
STUDY = "lab_dense"
SIMPLE = ("random", "grid", "pool", "norm", "mmr_norm")


def admission() -> dict[str, list[Result]]:
    return load(f"{STUDY}/results/admission")


def judge(family: str) -> list[str]:
    """Why the family is out: each rule that it breaks, with the numbers. Empty where it is in."""
    found, reasons = admission(), []
    full = found["full"][0].score("1.0", family)
    content = found["full"][0].content
    guess = max(content["blind"][family], content["majority"][family])
    if full < 0.8:
        reasons.append(f"full {percent(full)} < 80")
    if full - guess < 0.3:
        reasons.append(f"guessing {percent(guess)}")
    for budget, within in (("0.25", 0.02), ("0.125", 0.02), ("0.06", 0.04)):
        loss = full - average(found["oracle"], budget, family)
        if loss > within:
            reasons.append(f"oracle {percent(loss)} below full at {share(budget)}")
    oracle = average(found["oracle"], "0.125", family)
    for name in SIMPLE:
        if (gap := oracle - average(found[name], "0.125", family)) < 0.08:
            reasons.append(f"`{name}` only {percent(gap)} below oracle")
    return reasons


def families() -> list[str]:
    return [*admission()["full"][0].questions]


def admitted() -> list[str]:
    return [family for family in families() if not judge(family)]


def admission_table() -> str:
    found = admission()
    content = found["full"][0].content
    rows = []
    for family in families():
        cells = [percent(found["full"][0].score("1.0", family))]
        cells += [percent(content[name][family]) for name in ("blind", "majority")]
        cells += [percent(average(found["oracle"], budget, family)) for budget in ("0.25", "0.125", "0.06")]
        cells += [percent(average(found[name], "0.125", family)) for name in SIMPLE]
        rows.append([family, *cells, "; ".join(judge(family)) or "in"])
    head = ["", "all tokens", "no image", "commonest answer", "`oracle` 25 %", "12.5 %", "6 %"]
    return table([*head, *(f"`{name}` 12.5 %" for name in SIMPLE), "in, or why not"], rows)


def tables() -> dict[str, dict[str, str]]:
    return {f"experiments/{STUDY}/REPORT.md": {"admission": admission_table()}}


if __name__ == "__main__":
    for path, page in tables().items():
        fill(path, page)
