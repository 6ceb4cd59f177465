"""Tables of REPORT.md.

python -m experiments.grip_claim.analyze
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from statistics import mean

from experiments import results as common
from experiments.grip_claim.tune import tuned
from experiments.results import Result, percent, points, probability, share, table
from experiments.run import settings_of
from experiments.tables import fill
from gripvlm.eval.stats import holm

HERE = Path(__file__).parent
STUDY = "grip_claim"
STATISTIC = "0.25,0.125,0.06,0.03"
"""Budgets; the statistic is the mean over them of the probability of the right answer, over families and questions."""
OURS = "grpo"
PLANNED = ("soft_topk", "visionselector", "simple", "diffprune", "imitation")
"""Opponents of the claim; differences with others are shown, and are not tests."""
IDEAS = ("few_draws", "probes", "budget_moves", "greedy", "virtual_draws", "bands", "seeing")
OTHER_SCORERS = ("grpo_one_round", "soft_topk_one_round", "grpo_blind", "distill_no_budget")
"""They differ in more than the training."""
SCRATCH = ("grpo_scratch", "soft_topk_scratch")
"""Without a warm-up: a comparison of its own."""
NOTHING = "No results yet."


def results() -> dict[str, list[Result]]:
    return common.load(f"{STUDY}/results") if (HERE / "results" / "questions.json").exists() else {}


def statistic(result: Result) -> float:
    """Mean over families of the mean over their questions."""
    return mean(float(values.mean()) for values in probability(result, STATISTIC).values())


def differences(name: str, ours: str = OURS) -> list[tuple[int, float]]:
    """(seed, `ours` minus the variant) for each run that both have."""
    pairs = common.common_seeds(results()[ours], results()[name])
    return [(first.content["seed"], statistic(first) - statistic(second)) for first, second in pairs]


def scores() -> str:
    rows = []
    for name, runs in results().items():
        cells = [percent(mean(map(statistic, runs)))]
        cells += [percent(common.average(runs, budget)) for budget in STATISTIC.split(",")]
        rows.append([f"`{name}`", str(len(runs)), *cells])
    head = ["variant", "runs", "answer's probability", *(f"right at {share(b)}" for b in STATISTIC.split(","))]
    return table(head, rows) if rows else NOTHING


def contrasts() -> str:
    """`OURS` minus every other way of training that has the same runs."""
    from scipy.stats import ttest_1samp

    names = [name for name in results() if OURS in results() and name not in (OURS, *IDEAS, *OTHER_SCORERS, *SCRATCH)]
    found = {name: each for name in names if (each := differences(name))}
    planned = [name for name in PLANNED if len(found.get(name, ())) > 2]
    p = [float(ttest_1samp([value for _, value in found[name]], 0).pvalue) for name in planned]
    # Those that have not run count as not shown, so that the correction stays that of all five.
    corrected = dict(zip(planned, holm(p + [1.0] * (len(PLANNED) - len(p))), strict=False))
    warm_ups, rows = settings_of(STUDY, OURS)["warm_ups"], []
    for name, each in found.items():
        by_warm_up = defaultdict(list)
        for seed, value in each:
            by_warm_up[seed % warm_ups].append(value)
        pairs = common.common_seeds(results()[OURS], results()[name])
        pictures = common.over_pictures([a for a, _ in pairs], STATISTIC, [b for _, b in pairs], probability)
        rows.append(
            [
                f"`{name}`",
                str(len(each)),
                points(common.t_interval([value for _, value in each])) if len(each) > 2 else "",
                points(pictures),
                f"{corrected[name]:.3f}" if name in corrected else "",
                " ".join(f"{100 * mean(values):+.1f}" for _, values in sorted(by_warm_up.items())),
            ]
        )
    head = [f"`{OURS}` minus", "runs", "over runs", "over pictures", "p (Holm)", "of each warm-up"]
    return table(head, rows) if rows else NOTHING


def scratch() -> str:
    """`OURS` minus soft top-k where both start from random weights, run by run."""
    if not all(name in results() for name in SCRATCH):
        return NOTHING
    ours, other = SCRATCH
    found = [value for _, value in differences(other, ours)]
    pairs = common.common_seeds(results()[ours], results()[other])
    pictures = common.over_pictures([a for a, _ in pairs], STATISTIC, [b for _, b in pairs], probability)
    over_runs = points(common.t_interval(found)) if len(found) > 2 else ""
    each = " ".join(f"{100 * value:+.1f}" for value in found)
    head = [f"`{ours}` minus", "runs", "over runs", "over pictures", "of each run"]
    return table(head, [[f"`{other}`", str(len(found)), over_runs, points(pictures), each]])


def rollouts() -> str:
    """What each idea takes to the validation objective that `OURS` ends with, run by run."""
    rows = []
    for name in (OURS, *IDEAS):
        pairs = common.common_seeds(results().get(name, []), results().get(OURS, []))
        if not pairs:
            continue
        if name == OURS:  # what the others are compared with
            spent, ends = (mean(each(first) for first, _ in pairs) for each in (rollouts_of, last))
            rows.append([f"`{name}`", str(len(pairs)), f"{spent:.0f}", f"{ends:.4f}", "", ""])
            continue
        shares = [reached(first, second) for first, second in pairs]
        there = [each for each in shares if each is not None]
        ends = mean(last(first) for first, _ in pairs)
        needed = f"{percent(mean(there))} %" if there else ""
        spent = mean(rollouts_of(first) for first, _ in pairs)
        rows.append([f"`{name}`", str(len(pairs)), f"{spent:.0f}", f"{ends:.4f}", f"{len(there)}", needed])
    head = ["", "runs", "rollouts", "validation at the end", "runs that reach it", "at this share of its rollouts"]
    return table(head, rows) if rows else NOTHING


def rollouts_of(result: Result) -> float:
    return float(result.content["training"]["rollouts"])


def last(result: Result) -> float:
    """The validation objective at the end of the training."""
    found = result.content["training"]["val"]
    return found[max(found, key=int)]["objective"]


def reached(first: Result, second: Result) -> float | None:
    """The first's rollouts when it first reaches the second's last objective, over all of the second's; None: never."""
    about = first.content["training"]
    steps = [int(step) for step, each in about["val"].items() if each["objective"] >= last(second)]
    spent = about["rollouts"] / about["steps"]
    return min(steps) * spent / second.content["training"]["rollouts"] if steps else None


def draws() -> str:
    """The probability of the right answer with a scorer's best set, and with draws from it."""
    content = common.read_json("grip_claim/results/draws.json")
    rows = [
        [f"`{run}`", "best set" if tau == "0.0" else f"drawn, temperature {tau}", *map(percent, found.values())]
        for run, by_tau in content["probability"].items()
        for tau, found in by_tau.items()
    ]
    budgets = next(iter(next(iter(content["probability"].values())).values()))
    return table(["scorer", "tokens", *map(share, budgets)], rows)


def rules() -> str:
    """The probability of the right answer with one warm-up's scores, by the rule that takes the best set."""
    rows = []
    for each in common.read_json("grip_claim/results/rules.json")["rules"]:
        values = list(each["probability"].values())
        what = {"both": "features and places"}.get(each["close"], each["close"])
        rounds = "one by one" if each["rounds"] == 256 else str(each["rounds"])
        rows.append([what, f"{each['lambda']:g}", rounds, *map(percent, values), percent(mean(values))])
    return table(["close are", "lambda", "rounds", *map(share, STATISTIC.split(",")), "mean"], rows)


def told() -> str:
    """What is kept and answered where the scorer reads another budget than it has."""
    found = common.read_json("grip_claim/results/told.json")["found"]
    rows = [
        [share(kept), *(f"{percent(each['probability'])} ({percent(each['shared'])})" for each in by_read.values())]
        for kept, by_read in found.items()
    ]
    return table(["kept", *(f"reads {share(read)}" for read in next(iter(found.values())))], rows)


def tuning() -> str:
    rows = []
    for name, runs in tuned().items():
        best = max(runs, key=lambda each: each["objective"])
        text = ", ".join(f"{key} {value}" for key, value in best["changes"].items())
        tried = " ".join(f"{each['objective']:.3f}" for each in runs)
        rows.append([f"`{name}`", str(len(runs)), tried, text])
    return table(["", "runs", "validation objective of each", "best"], rows) if rows else NOTHING


def tables() -> dict[str, dict[str, str]]:
    page = {
        "scores": scores(),
        "contrasts": contrasts(),
        "scratch": scratch(),
        "rollouts": rollouts(),
        "tuning": tuning(),
        "rules": rules(),
        "told": told(),
        "draws": draws(),
    }
    return {f"experiments/{STUDY}/REPORT.md": page}


if __name__ == "__main__":
    for path, page in tables().items():
        fill(path, page)
