"""Tables of REPORT.md.

python -m experiments.lab_dense.analyze
"""

from __future__ import annotations

from statistics import mean

from experiments.results import (
    BUDGETS,
    STUDIES,
    Result,
    average,
    load,
    over_pictures,
    percent,
    points,
    score_table,
    share,
    table,
)
from experiments.tables import fill

STUDY = "lab_dense"
SCORER = "grip:scorer=lab-dense"
ONE_ROUND = "warm-up, one round"
SIMPLE = ("random", "grid", "pool", "norm", "mmr_norm")
ADMITTED_AT = "0.06"
"""Where the simple pruners have to be far below the oracle; written down beforehand was 12.5 %."""


def admission() -> dict[str, list[Result]]:
    return load(f"{STUDY}/results/admission")


def judge(family: str, budget: str) -> list[str]:
    """Why the family is out: each rule that it breaks, with the numbers. Empty where it is in.

    budget: where the simple pruners have to be far below the oracle.
    """
    found, reasons = admission(), []
    full = found["full"][0].score("1.0", family)
    content = found["full"][0].content
    guess = max(content["blind"][family], content["majority"][family])
    if full < 0.8:
        reasons.append(f"full {percent(full)} < 80")
    if full - guess < 0.3:
        reasons.append(f"guessing {percent(guess)}")
    limits = {"0.25": 0.02, "0.125": 0.02, "0.06": 0.04}
    losses = {budget: full - average(found["oracle"], budget, family) for budget in limits}
    if any(losses[budget] > within for budget, within in limits.items()):
        reasons.append(f"`oracle` {percent(max(losses.values()))} below full")
    ahead = average(found["oracle"], budget, family) - nearest(family, budget)[1]
    if ahead < 0.08:
        reasons.append(f"`{nearest(family, budget)[0]}` {percent(ahead)} below `oracle`")
    return reasons


def nearest(family: str, budget: str) -> tuple[str, float]:
    """The best of the simple pruners, and its score."""
    return max(((name, average(admission()[name], budget, family)) for name in SIMPLE), key=lambda pair: pair[1])


def families() -> list[str]:
    return [*admission()["full"][0].questions]


def admitted(budget: str = ADMITTED_AT) -> list[str]:
    return [family for family in families() if not judge(family, budget)]


def admission_table() -> str:
    found = admission()
    content = found["full"][0].content
    rows = []
    for family in families():
        cells = [str(len(found["full"][0].questions[family])), percent(found["full"][0].score("1.0", family))]
        cells += [percent(content[name][family]) for name in ("blind", "majority")]
        cells += [percent(average(found["oracle"], budget, family)) for budget in ("0.25", "0.125", "0.06")]
        for budget in ("0.125", ADMITTED_AT):
            name, score = nearest(family, budget)
            cells.append(f"`{name}` {percent(score)}")
        rows.append([family, *cells, "; ".join(judge(family, ADMITTED_AT)) or "in"])
    head = ["", "questions", "all tokens", "no image", "commonest answer", "`oracle` 25 %", "12.5 %", "6 %"]
    return table([*head, "best simple 12.5 %", "6 %", "in, or why not"], rows)


def grid() -> dict[str, list[Result]]:
    """Pruner as it was named -> its seeds, on the test sample; empty before it was measured."""
    if not (STUDIES / STUDY / "results" / "input").exists():
        return {}
    found = {seeds[0].content["pruner"]: seeds for seeds in load(f"{STUDY}/results/input").values()}
    before = load(f"{STUDY}/results/one_round").values()  # the scorer that had the name before
    return found | {seeds[0].content["pruner"].replace(SCORER, ONE_ROUND): seeds for seeds in before}


def smaller() -> dict[str, list[Result]]:
    """`full` and `downsample`, on fewer questions of the same sample."""
    return load(f"{STUDY}/results/downsample")


def smaller_table() -> str:
    """What a smaller picture leaves, beside all tokens of the whole picture."""
    found, budgets = smaller(), ("0.125", "0.06", "0.03")
    content = found["full"][0].content
    rows = [["all tokens", *[percent(found["full"][0].score("1.0"))] * len(budgets)]]
    rows += [["`downsample`", *(percent(average(found["downsample"], budget)) for budget in budgets)]]
    for label, name in (("no image", "blind"), ("commonest answer", "majority")):
        rows.append([label, *[percent(mean(content[name][family] for family in found["full"][0].questions))] * 3])
    return table(["", *map(share, budgets)], rows)


def first_lab() -> dict[str, list[Result]]:
    """The same of the first lab; its scorers as they came out of the supervised stage."""
    return {seeds[0].content["variant"]: seeds for seeds in load("grip_shipped/results").values()}


APART = {"warm-up, one round": ("distill", ONE_ROUND)}
APART |= {
    name: (name.replace("(", "_").strip(")"), name) for name in ("mmr(norm)", "divprune", "cdpruner", "norm", "random")
}


def apart_table() -> str:
    """How many points each is below the oracle, on the first lab and on this one."""
    budgets, rows = ("0.25", "0.125", "0.06"), []
    labs = first_lab(), grid()
    for label, names in APART.items():
        cells = [
            points(over_pictures(found["oracle"], budget, found[name]))
            for found, name in zip(labs, names, strict=True)
            for budget in budgets
        ]
        rows.append([label, *cells])
    head = [f"{lab}, {share(budget)}" for lab in ("first lab", "lab-dense") for budget in budgets]
    return table(["below the oracle", *head], rows)


def rules_table() -> str:
    """The same scores, and other rules for what they choose, less the highest ones."""
    budgets, found = ("0.25", "0.125", "0.06", "0.03", "0.015"), grid()
    rows = [
        [f"`{name}`", *(points(over_pictures(found[name], budget, found[ONE_ROUND])) for budget in budgets)]
        for name in (f"mmr({ONE_ROUND})", f"gumbel({ONE_ROUND})", SCORER, "oracle", "grid")
    ]
    return table([f"less `{ONE_ROUND}`", *map(share, budgets)], rows)


def large_table() -> str:
    """Right answers to the larger sample, and the scorer beside the limits that are set for it."""
    found = {seeds[0].content["pruner"]: seeds for seeds in load(f"{STUDY}/results/large").values()}
    return score_table(found, BUDGETS, "0.125")


def limits_table() -> str:
    """Points that the scorer is above or below others, on the larger sample."""
    budgets, found = ("0.25", "0.125", "0.06", "0.03", "0.015"), load(f"{STUDY}/results/large")
    scorer, rows = found["grip_scorer_lab-dense"], []
    for name in ("full", "oracle", "grid", "mmr_norm"):
        label = "all tokens" if name == "full" else f"`{found[name][0].content['pruner']}`"
        rows.append([label, *(points(over_pictures(scorer, budget, found[name])) for budget in budgets)])
    return table([f"`{SCORER}` less", *map(share, budgets)], rows)


def tables() -> dict[str, dict[str, str]]:
    page = {"admission": admission_table()}
    if grid():
        page |= {
            "grid": score_table(grid(), BUDGETS, "0.125"),
            "apart": apart_table(),
            "rules": rules_table(),
            "smaller": smaller_table(),
            "large": large_table(),
            "limits": limits_table(),
        }
    return {f"experiments/{STUDY}/REPORT.md": page}


if __name__ == "__main__":
    for path, page in tables().items():
        fill(path, page)
