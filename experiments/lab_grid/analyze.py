"""Tables of REPORT.md and docs/choosing.md, scores.csv, families.png, and what `gripvlm list` shows.

python -m experiments.lab_grid.analyze
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from experiments import results as common
from experiments.results import BUDGETS, Result, average, over_pictures, percent, read_json, share, table
from experiments.tables import fill

HERE = Path(__file__).parent
STUDY = "lab_grid"
INSIDE = ("0.5", "0.3")
AT = {"input": "0.125", "llm": "0.3", "vision": "0.3"}
"""Stage -> the budget whose score is shown for a pruner: where most methods' intervals lie apart."""


class Score(NamedTuple):
    """A pruner's mean over families at one budget: of all its seeds, with the interval of the first."""

    pruner: str
    budget: str
    score: float
    low: float
    high: float
    trained: bool


def results(stage: str) -> dict[str, list[Result]]:
    """Pruner as it was named -> its seeds. Runs from before a method was corrected are left out."""
    found = common.load(f"{STUDY}/results/{'input' if stage == 'input' else 'llm'}")
    return {seeds[0].content["pruner"]: seeds for name, seeds in found.items() if not name.endswith(".uncorrected")}


def scores(stage: str, budget: str) -> list[Score]:
    """The best first; without the unpruned model and the oracle."""
    rows = []
    for pruner, seeds in results(stage).items():
        if budget in seeds[0].budgets and pruner not in ("full", "oracle"):
            _, low, high = over_pictures(seeds[:1], budget)
            trained = seeds[0].content["trained"] or "(grip" in pruner  # or around one that is
            rows.append(Score(pruner, budget, average(seeds, budget), low, high, trained))
    return sorted(rows, key=lambda row: -row.score)


def name_of(spec: str) -> str:
    """The pruner that a spec names: `mmr(norm)` -> `mmr`."""
    return spec.partition(":")[0].partition("(")[0]


def lab_score(name: str, stage: str) -> Score | None:
    """The score shown for a pruner, of several specs the bare name's or an untrained one's; None where none is."""
    if name == "full":
        return Score("full", "1.0", *over_pictures(results("input")["full"], "1.0"), False)
    if stage not in AT:  # for towers that the lab does not have
        return None
    rows = [row for row in scores(stage, AT[stage]) if name_of(row.pruner) == name]
    return min(rows, key=lambda row: (row.pruner != name, row.trained), default=None)


def questions() -> int:
    return sum(map(len, results("input")["full"][0].questions.values()))


def full_score() -> float:
    return results("input")["full"][0].score("1.0")


def prefill_shares() -> dict[str, float]:
    """Pruner -> its own time as a share of the prefill of one image."""
    first = read_json("speed/results/pruners.json")["cells"][0]
    return {name_of(spec): row["ratio"][0] for spec, row in first["pruners"].items() if row["ratio"]}


def cheapest_enough(budget: str) -> Score | None:
    """The cheapest untrained pruner whose 95 % interval reaches the unpruned model's score; None where none does."""
    cost = prefill_shares()
    able = [row for row in scores("input", budget) if not row.trained and row.high >= full_score()]
    return min(
        (row for row in able if name_of(row.pruner) in cost), key=lambda row: cost[name_of(row.pruner)], default=None
    )


def by_budget() -> str:
    """docs/choosing.md: Grip, the best untrained pruner and the cheapest that is enough."""
    cost, rows = prefill_shares(), []
    for budget in BUDGETS:
        found = scores("input", budget)
        best = next(row for row in found if not row.trained)
        enough = cheapest_enough(budget)
        of = {row.pruner: percent(row.score) for row in found}
        last = (
            ("none", "-") if enough is None else (f"`{enough.pruner}`", f"{100 * cost[name_of(enough.pruner)]:.2g} %")
        )
        rows.append([share(budget), of["grip"], f"`{best.pruner}` {percent(best.score)}", *last, of["random"]])
    return table(["keep", "`grip`", "best untrained", "enough", "its time, share of a prefill", "`random`"], rows)


def inside() -> str:
    """docs/choosing.md: pruners inside the language model and the tower, at equal cost."""
    rows = []
    for budget in INSIDE:
        of = {row.pruner: row.score for row in scores("llm", budget)}
        best = max((name for name in of if name not in ("random", "grid", "grip")), key=lambda name: of[name])
        cells = (f"`{best}` {percent(of[best])}", percent(of["grip"]), percent(of["random"]))
        rows.append([share(budget), *cells])
    return table(["keep", "best inside", "`grip` at the input", "`random`"], rows)


def tables() -> dict[str, dict[str, str]]:
    page = {
        "input": common.score_table(results("input"), BUDGETS, "0.125"),
        "inside": common.score_table(results("llm"), INSIDE, "0.3"),
    }
    choosing = {"by_budget": by_budget(), "inside": inside()}
    return {f"experiments/{STUDY}/REPORT.md": page, "docs/choosing.md": choosing}


def draw() -> None:
    """Right answers by pruner and family of questions at 12.5 %, coloured by points over two baselines."""
    from matplotlib import pyplot as plt

    found, names = results("input"), [row.pruner for row in scores("input", "0.125")]
    families = list(found["full"][0].questions)
    values = [[100 * average(found[name], "0.125", family) for family in families] for name in names]
    base = [max(100 * average(found[name], "0.125", family) for name in ("random", "grid")) for family in families]
    above = [[value - plain for value, plain in zip(row, base, strict=True)] for row in values]
    figure, axis = plt.subplots(figsize=(6.5, 7.5), layout="constrained")
    image = axis.imshow(above, cmap="RdBu", vmin=-75, vmax=75, aspect="auto")
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            colour = "white" if abs(above[y][x]) > 50 else "black"
            axis.text(x, y, f"{value:.0f}", ha="center", va="center", fontsize=8, color=colour)
    axis.set_xticks(range(len(families)), families, fontsize=7)
    shown = [name if len(name) < 30 else name_of(name) for name in names]  # hawk's weights would fill half the picture
    axis.set_yticks(range(len(names)), shown, fontsize=8)
    axis.tick_params(top=True, labeltop=True, bottom=False, labelbottom=False)
    figure.colorbar(image, label="points above the better of random and grid", shrink=0.6)
    figure.savefig(HERE / "families.png", dpi=80, metadata={"Software": None})
    plt.close(figure)


if __name__ == "__main__":
    for stage in ("input", "llm"):
        common.write_csv(HERE / f"scores_{stage}.csv", common.load(f"{STUDY}/results/{stage}"))
    draw()
    for path, page in tables().items():
        fill(path, page)
