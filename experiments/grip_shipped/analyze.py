"""Tables of REPORT.md, and scores.png.

python -m experiments.grip_shipped.analyze
"""

from __future__ import annotations

from pathlib import Path

from experiments import results as common
from experiments.results import BUDGETS, Result, over_pictures, percent, points, read_json, share, table
from experiments.tables import fill

HERE = Path(__file__).parent
STUDY = "grip_shipped"
NAMES = {
    "lab": "`grip`",
    "lab_blind": "`grip:scorer=lab-blind`",
    "distill": "supervised stage",
    "mmr_norm": "`mmr(norm)`",
    "cdpruner": "`cdpruner`",
    "divprune": "`divprune`",
    "norm": "`norm`",
    "grid": "`grid`",
    "random": "`random`",
    "oracle": "`oracle`",
}
LINES = {"lab": "o-", "lab_blind": "s-", "cdpruner": "^-", "mmr_norm": "v-", "divprune": "D-", "norm": "P-"}
LINES |= {"grid": "<-", "random": "x-"}
LAB_MINUS = ("full", "oracle", "distill", "grpo_1", "grpo_2", "lab_blind", "cdpruner", "mmr_norm", "divprune")
BLIND_MINUS = ("full", "blind_distill", "lab_blind.plain_grpo", "cdpruner", "mmr_norm", "divprune", "grid")


def results() -> dict[str, list[Result]]:
    return common.load(f"{STUDY}/results")


def scores() -> str:
    found = results()
    rows = [[text, *(percent(found[name][0].score(budget)) for budget in BUDGETS)] for name, text in NAMES.items()]
    return table(["", *map(share, BUDGETS)], rows)


def minus(first: str, others: tuple[str, ...]) -> str:
    """Question by question, with 95 % intervals over pictures."""
    found = results()
    rows = [
        [f"`{first}` - `{other}`", *(points(over_pictures(found[first], budget, found[other])) for budget in BUDGETS)]
        for other in others
    ]
    return table(["", *map(share, BUDGETS)], rows)


def validation() -> str:
    """Why the means of two runs ship, and which recipe was better for which scorer."""
    plain = read_json(f"{STUDY}/results/validation.json")["scorers"]
    scaled = read_json(f"{STUDY}/results/validation_scale_by_budget.json")["scorers"]
    runs = ("grpo_1", "grpo_2", "shipped")
    rows = [
        [
            f"`{name}`, {recipe}",
            *(f"{found[name][run]['objective']:.4f}" if run in found[name] else "-" for run in runs),
        ]
        for name in plain
        for recipe, found in (("plain GRPO", plain), ("scaled by budget, 2 iterations", scaled))
    ]
    return table(["", "first run", "second run", "mean of weights"], rows)


def tables() -> dict[str, dict[str, str]]:
    page = {
        "scores": scores(),
        "lab_minus": minus("lab", LAB_MINUS),
        "lab_blind_minus": minus("lab_blind", BLIND_MINUS),
        "validation": validation(),
    }
    return {f"experiments/{STUDY}/REPORT.md": page}


def draw() -> None:
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    axis.axhline(100 * results()["full"][0].score("1.0"), color="k", lw=1, label="all tokens")
    common.plot_by_budget(axis, results(), LINES)
    figure.savefig(HERE / "scores.png", dpi=90, metadata={"Software": None})
    plt.close(figure)


if __name__ == "__main__":
    common.write_csv(HERE / "scores.csv", results())
    draw()
    for path, page in tables().items():
        fill(path, page)
