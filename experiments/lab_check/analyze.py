"""Tables of REPORT.md, and scores.csv.

python -m experiments.lab_check.analyze
"""

from __future__ import annotations

from pathlib import Path

from experiments.results import Result, load, percent, read_json, share, table, write_csv
from experiments.tables import fill

HERE = Path(__file__).parent
STUDY = "lab_check"
BUDGETS = ("0.5", "0.25", "0.1", "0.05", "0.025")
PRUNERS = ("oracle", "divprune", "grid", "norm", "pool", "random")


def results() -> dict[str, list[Result]]:
    return load(f"{STUDY}/results")


def families() -> str:
    """Is the picture needed, and is the evidence enough? The unpruned model beside guesses, and pruners at 10 %."""
    found = {name: seeds[0] for name, seeds in results().items()}
    full, pruners = found["full"].content, ("oracle", "norm", "grid", "random")
    rows = []
    for family in (*found["full"].questions, "mean"):
        guesses = [full["scores"]["1.0"][family], full["blind"][family], full["majority"][family]]
        rows.append([family, *map(percent, guesses), *(percent(found[name].score("0.1", family)) for name in pruners)])
    return table(["", "all tokens", "no image", "commonest answer", *(f"`{name}` 10 %" for name in pruners)], rows)


def scores() -> str:
    rows = [[f"`{name}`", *(percent(results()[name][0].score(budget)) for budget in BUDGETS)] for name in PRUNERS]
    return table(["", *map(share, BUDGETS)], rows)


def dropping() -> str:
    """Two language models trained equally long on one vision tower."""
    means = {}
    for name in ("with", "without"):
        content = read_json(f"{STUDY}/results/reader_{name}_dropping.json")
        means[name] = {(row["pruner"], row["keep"]): row for row in content["means"]}
    rows = []
    for (pruner, keep), row in means["with"].items():
        pair = (row, means["without"][pruner, keep])
        cells = [f"{percent(r['score'])} [{percent(r['ci_low'])}, {percent(r['ci_high'])}]" for r in pair]
        rows.append([f"`{pruner}` {share(keep)}", *cells])
    return table(["", "with dropping", "without"], rows)


def tables() -> dict[str, dict[str, str]]:
    page = {"families": families(), "scores": scores(), "dropping": dropping()}
    return {f"experiments/{STUDY}/REPORT.md": page}


if __name__ == "__main__":
    write_csv(HERE / "scores.csv", results())
    for path, page in tables().items():
        fill(path, page)
