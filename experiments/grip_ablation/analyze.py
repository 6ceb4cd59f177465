"""Tables of REPORT.md, scores.csv and scores.png.

python -m experiments.grip_ablation.analyze
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from experiments import results as common
from experiments.results import BUDGETS, Result, average, percent, points, read_json, share, table
from experiments.tables import fill

HERE = Path(__file__).parent
STUDY = "grip_ablation"
BLIND_BEST = "blind_scale_by_budget_2_iters"
MAIN = ("distill", "grpo", "no_distill", "label_free", "diffprune", "soft_topk_lr_1e-4", BLIND_BEST)
LINES = {"grpo": "C3-", "distill": "k--", "no_distill": "C1-", BLIND_BEST: "C0-", "blind_distill": "C7--"}
DOTS = ("distill", "grpo", "conditional_bernoulli.last_step", "label_free.last_step", "no_distill")
DOTS += ("diffprune.last_step", "soft_topk.last_step", "straight_through.last_step", "perturbed_topk.last_step")
CHANGED = ("2_iters", "4_iters", "lr_2x", "G4x4q", "ema", "antithetic", "band", "self_critical", "scale_by_budget")
CHANGES = [(name, "grpo") for name in (*CHANGED, "dr_grpo", "dr_grpo_scale_by_budget")]
CHANGES += [("value_credit", "conditional_bernoulli")]
BLIND = (
    (BLIND_BEST, "blind_distill"),
    (BLIND_BEST, "blind_grpo"),
    ("blind_grpo", "blind_distill"),
    ("blind_scale_by_budget", "blind_grpo"),
)
ONE_SCORER = (("three_budgets", "fixed_keep_3"), ("three_budgets", "fixed_keep_12"), ("grpo", "fixed_budget_6pct"))
MASKS = {"soft_last": "under the mask", "hard": "with the k tokens", "live_last": "spread, per k", "swap_hard": "swaps"}


def results() -> dict[str, list[Result]]:
    return common.load(f"{STUDY}/results")


def difference(first: str, second: str, budget: str) -> str:
    """Over the seeds of both: the mean with its interval over pictures, then each seed in parentheses."""
    pairs = common.common_seeds(results()[first], results()[second])
    estimate = points(common.over_pictures([a for a, _ in pairs], budget, [b for _, b in pairs]))
    seeds = " ".join(f"{100 * (a.score(budget) - b.score(budget)):+.1f}" for a, b in pairs)
    return f"{estimate} ({seeds})" if len(pairs) > 1 else estimate


def main_scores() -> str:
    """Six variants, six budgets."""
    rows = []
    for name in MAIN:
        seeds = results()[name]
        rows.append([f"`{name}`", str(len(seeds)), *(percent(average(seeds, budget)) for budget in BUDGETS)])
    return table(["variant", "seeds", *map(share, BUDGETS)], rows)


def grpo_minus() -> str:
    """GRPO minus every variant with three seeds or more: over training seeds."""
    rows = []
    for name in results():
        pairs = common.common_seeds(results()["grpo"], results()[name])
        if name == "grpo" or name.startswith("blind") or len(pairs) < 3:
            continue
        cells = [points(common.over_seeds(pairs, budget)) for budget in ("0.03", "0.015")]
        each = " ".join(f"{100 * (a.score('0.015') - b.score('0.015')):+.1f}" for a, b in pairs)
        rows.append([f"`{name}`", str(len(pairs)), *cells, each])
    return table(["`grpo` minus", "seeds", "3 %", "1.5 %", "each seed, 1.5 %"], rows)


def pairs_of(pairs: Sequence[tuple[str, str]], budgets: Sequence[str]) -> str:
    rows = [[f"`{a}` - `{b}`", *(difference(a, b, budget) for budget in budgets)] for a, b in pairs]
    return table(["", *map(share, budgets)], rows)


def soft_masks() -> str:
    """What relaxed training learns, at each variant's last step: results/soft_masks.json."""
    found = read_json(f"{STUDY}/results/soft_masks.json")["variants"]
    rows = [
        [f"`{name}`", share(budget), *(f"{mean(by_budget[budget][key]):.2f}" for key in MASKS)]
        for name, by_budget in found.items()
        for budget in ("0.125", "0.015")
    ]
    return table(["variant", "keep", *MASKS.values()], rows)


def headroom() -> str:
    """Probability of the right answer on validation questions: results/headroom.json."""
    found = read_json(f"{STUDY}/results/headroom.json")["scorers"]
    budgets = ("0.25", "0.125", "0.015")
    rows = [
        [f"`{name}`", *(f"{by.get(f'reward@{budget}', by.get('reward')):.3f}" for budget in budgets)]
        for name, by in found.items()
    ]
    return table(["tokens chosen by", *map(share, budgets)], rows)


def tables() -> dict[str, dict[str, str]]:
    page = {
        "scores": main_scores(),
        "grpo_minus": grpo_minus(),
        "single_changes": pairs_of(CHANGES, ("0.03", "0.015")),
        "blind": pairs_of(BLIND, ("0.25", "0.125", "0.06", "0.015")),
        "one_scorer": pairs_of(ONE_SCORER, ("0.125", "0.03", "0.015")),
        "soft_masks": soft_masks(),
        "headroom": headroom(),
    }
    return {f"experiments/{STUDY}/REPORT.md": page}


def draw() -> None:
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained", width_ratios=(3, 2))
    common.plot_by_budget(left, results(), LINES)
    for place, name in enumerate(reversed(DOTS)):
        seeds = [100 * result.score("0.015") for result in results()[name]]
        right.plot(seeds, [place] * len(seeds), "C0.", alpha=0.6)
        right.plot(mean(seeds), place, "k|", ms=12)
    right.set(xlabel="right answers at 1.5 %", yticks=range(len(DOTS)))
    right.set_yticklabels(reversed(DOTS), fontsize=8)
    right.grid(alpha=0.3)
    figure.savefig(HERE / "scores.png", dpi=90, metadata={"Software": None})
    plt.close(figure)


if __name__ == "__main__":
    common.write_csv(HERE / "scores.csv", results())
    draw()
    for path, page in tables().items():
        fill(path, page)
