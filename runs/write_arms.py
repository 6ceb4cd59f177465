"""docs/grip-study.md, its plot and docs/grip-families.md from results/grip-arms-*.json: every number is generated."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean, stdev

from answers import Answers, Scored, difference, points, read
from arms import BUDGET, CALMER, MAIN, OTHERS, PLOTTED, TOLD, UNASKED
from write_results import header, line, percent

from gripvlm.report import plot

ROOT = Path(__file__).parent.parent
SEEDS = tuple(sorted({int(file.stem.split("-")[2]) for file in (ROOT / "results").glob("grip-arms-[0-9]*.json")}))
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""The 97.5 % quantiles of Student's t with 1, 2, ... degrees of freedom."""


class Study:
    """All answers of all seeds; an arm's score of a question is its mean over the seeds asked for."""

    def __init__(self) -> None:
        names = {s: sorted(f.stem for f in (ROOT / "results").glob(f"grip-arms-{s}*.json")) for s in SEEDS}
        self.results = {
            name: json.loads((ROOT / "results" / f"{name}.json").read_text())
            for mine in names.values()
            for name in mine
        }
        self.answers = {seed: together(mine) for seed, mine in names.items()}
        self.others = read("grip") | read("grip-shipped")
        first = next(iter(self.answers.values()))
        self.tasks = list(dict.fromkeys(task for task, _, _ in first))
        self.keeps = list(dict.fromkeys(keep for _, arm, keep in first if arm == "grpo"))
        self.asked = {task: list(first[task, "grpo", self.keeps[0]]) for task in self.tasks}
        self.seeds = {
            arm: [seed for seed, a in self.answers.items() if (self.tasks[0], arm, self.keeps[0]) in a] for arm in TOLD
        }
        self.arms = [arm for arm, seeds in self.seeds.items() if seeds]

    def of(self, arm: str, keep: str, task: str, seeds: list[int]) -> Scored:
        """Question -> (score, image): the mean over seeds for an arm, the one answer of another pruner."""
        if arm in self.arms:
            many = [self.answers[seed][task, arm, keep] for seed in seeds]
            return {i: (sum(one[i][0] for one in many) / len(many), many[0][i][1]) for i in self.asked[task]}
        return {i: self.others[task, arm, "1.0" if arm == "full" else keep][i] for i in self.asked[task]}

    def mean(self, arm: str, keep: str, seed: int) -> float:
        values = [[score for score, _ in self.of(arm, keep, task, [seed]).values()] for task in self.tasks]
        return sum(sum(scores) / len(scores) for scores in values) / len(values)

    def minus(self, a: str, b: str | None, keep: str) -> tuple[float, float, float]:
        """Mean over families of a - b (of a alone without b) over the seeds of both, and its interval over pictures."""
        seeds = [seed for seed in self.seeds.get(a, SEEDS) if seed in self.seeds.get(b or a, SEEDS)]
        others = (self.of(b, keep, task, seeds) if b else None for task in self.tasks)
        return difference(list(zip((self.of(a, keep, task, seeds) for task in self.tasks), others, strict=True)))

    def family(self, name: str, keep: str, task: str) -> tuple[float, float, float]:
        """Mean of one family and of the arm's seeds, and its interval over pictures."""
        return difference([(self.of(name, keep, task, self.seeds.get(name, [])), None)])

    def each(self, a: str, b: str, keep: str) -> list[float]:
        """a - b for each training seed that both have."""
        seeds = [seed for seed in self.seeds.get(a, SEEDS) if seed in self.seeds.get(b, SEEDS)]
        return [self.mean(a, keep, seed) - self.mean(b, keep, seed) for seed in seeds]

    def cell(self, a: str, b: str, keep: str) -> str:
        """The difference, its interval, and, in brackets, that of each training seed."""
        said, each = points(*self.minus(a, b, keep)), self.each(a, b, keep)
        return f"{said} ({' '.join(f'{100 * value:+.1f}' for value in each)})" if len(each) > 1 else said

    def over_seeds(self, a: str, b: str, keep: str) -> str:
        """The difference and the 95 % t-interval of its mean over training seeds, these pictures given."""
        each = self.each(a, b, keep)
        if max(each) - min(each) < 1e-6:
            return f"{100 * each[0]:+.1f}, each"
        half = STUDENT[len(each) - 2] * stdev(each) / len(each) ** 0.5
        return points(mean(each), mean(each) - half, mean(each) + half)


def together(names: list[str]) -> Answers:
    """The answers of several files about one seed."""
    found: Answers = {}
    for name in names:
        more = read(name)
        if twice := {arm for _, arm, _ in found.keys() & more.keys()} - {"full", "blind"}:
            raise SystemExit(f"{name} has arms that another file of its seed has too: {', '.join(sorted(twice))}")
        found |= more
    return found


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [line(head), line(["---", *["---:"] * (len(head) - 1)]), *map(line, rows), ""]


def shares(keeps: list[str]) -> list[str]:
    return [f"{100 * float(keep):g} %" for keep in keeps]


def scores(study: Study) -> list[str]:
    rows = []
    for name in ("full", "oracle", *study.arms, *OTHERS):
        cells = []
        for keep in study.keeps:
            share, low, high = study.minus(name, None, keep)
            cell = f"{percent(share)} [{100 * low:.0f}-{100 * high:.0f}]"
            if name in study.arms:
                cell += " (" + " ".join(percent(study.mean(name, keep, seed)) for seed in study.seeds[name]) + ")"
            cells.append(cell)
        rows.append([f"`{name}`", *cells])
    return table(["arm", *shares(study.keeps)], rows)


def families(study: Study) -> list[str]:
    """docs/grip-families.md's tables, and the plot beside the study."""
    names = [name for name in ("full", "oracle", *MAIN, *OTHERS) if name not in TOLD or name in study.arms]
    page, rows = [], []
    for task in (*study.tasks, "mean"):
        cells = []
        for name in names:
            found = []
            for keep in study.keeps:
                share, low, high = study.minus(name, None, keep) if task == "mean" else study.family(name, keep, task)
                found.append(f"{percent(share)} [{100 * low:.0f}-{100 * high:.0f}]")
                row = {"task": task, "pruner": name, "score": share, "ci_low": low, "ci_high": high}
                if name in PLOTTED and (name != "full" or keep == study.keeps[0]):
                    rows.append(row | {"keep_fraction": 1.0 if name == "full" else float(keep)})
            cells.append([f"`{name}`", *found])
        page += [f"## {task}", "", *table(["arm", *shares(study.keeps)], cells)]
    plot(rows, ROOT / "docs" / "grip-study.png")
    return page


def judge(run: dict) -> str:
    """What decided which step was kept. Rewards that a run maximised without naming it are told by their sign."""
    unnamed = "log_prob" if next(iter(run["val"].values()))["objective"] < 0 else "probability"
    return run["settings"].get("val_reward", run["settings"].get("reward", unnamed))


def minutes(train: dict) -> list[str]:
    """A row an arm, in the order of TOLD, whose texts refer to those above them."""
    if strange := train["arms"].keys() - TOLD.keys():
        raise SystemExit(f"runs/arms.py does not say what {', '.join(sorted(strange))} is")
    rows = []
    for name in [arm for arm in TOLD if arm in train["arms"]]:
        runs = train["arms"][name]
        clock = [run["minutes"] for run in runs.values()]
        rollouts = {run["rollouts"] for run in runs.values()}
        steps = {run["steps"] for run in runs.values()}
        judges = {judge(run) for run in runs.values()}
        best = [f"{seed}: {run['best']}" for seed, run in runs.items()]
        rows.append(
            [
                f"`{name}`",
                TOLD[name],
                "/".join(map(str, sorted(steps))),
                "/".join(map(str, sorted(rollouts))),
                f"{min(clock):.1f}-{max(clock):.1f}",
                "/".join(sorted(judges)),
                ", ".join(best),
            ]
        )
    return table(["arm", "what", "steps", "subsets tried", "minutes", "judged by", "seed: step kept"], rows)


def main() -> None:
    study = Study()
    train = json.loads((ROOT / "results" / "grip-arms-train.json").read_text())
    keeps, arms = study.keeps, study.arms
    n = sum(map(len, study.asked.values()))
    against = [name for name in (*arms, *OTHERS) if name != "grpo" and "blind" not in name]
    page = [
        "# How to train a scorer: the study",
        "",
        "Generated by `runs/write_arms.py` from `results/grip-arms-*.json` (numbered by training seed, with every",
        "answer), `grip-arms-train.json` and `grip.json`. Made by `bash runs/grip_arms.sh` and",
        f"`bash runs/grip_arms_table.sh`. Lab evidence ([lab.md](lab.md)): {n} questions of the test split, as many",
        "training seeds as an arm has numbers in brackets below, never a statement about a larger model. What the",
        "methods are: [grip.md](grip.md).",
        "",
        "## Arms",
        "",
        *minutes(train),
        "Minutes are of one core of a machine that did other work besides; least and greatest of the seeds. The step",
        "that is kept is the best of those validated (0, 150, 240; a warm-up 0, 150, 300, 400; longer runs on to 600),",
        "on other pictures, by what `judged by` says: where step 0 was kept, the arm *is* the warm-up for that seed,",
        "and equal numbers below are one number. `X_last` is `X` as it was at its last step, whatever was validated",
        "(`ARM_last=FOLDER@last` for `runs/grip_study.py`).",
        "",
        "## Scores",
        "",
        "Mean of six families, % right; [95 % interval over pictures of the mean of the seeds]; (each seed). `full`:",
        "all tokens; `oracle`: each question's own evidence, which no pruner could know; `told_6`: see below.",
        "",
        *scores(study),
        "By family, with intervals: [grip-families.md](grip-families.md).",
        "",
        "![Score against share of tokens kept, by family](grip-study.png)",
        "",
        "## Differences",
        "",
        "`grpo` minus each, in points, question by question, mean of the seeds that both have, [95 % interval over",
        "pictures], (each seed). The interval is of these training runs: what another seed would give is not in it;",
        "the brackets tell, and the table after this one. On one seed rely for nothing.",
        "",
        *table(["", *shares(keeps)], [[f"`{b}`", *(study.cell("grpo", b, keep) for keep in keeps)] for b in against]),
    ]
    several = [("grpo", b) for b in against if b in study.seeds] + [pair for pair in UNASKED if {*pair} <= {*arms}]
    several = [(a, b) for a, b in several if len(study.each(a, b, keeps[0])) > 2]
    page += [
        "### Would other training seeds say the same?",
        "",
        "Arms with three training seeds or more: the mean difference and the 95 % t-interval of that mean over seeds,",
        "on these pictures; how many seeds. What an interval here leaves open, no number of test questions settles. Of",
        "so many intervals one in twenty misses by chance: read rows, not cells.",
        "",
        *table(
            ["", "seeds", *shares(keeps)],
            [
                [f"`{a}` - `{b}`", str(len(study.each(a, b, keeps[0]))), *(study.over_seeds(a, b, k) for k in keeps)]
                for a, b in several
            ],
        ),
    ]
    asked = [("three_budgets", "only_3", "0.03"), ("three_budgets", "only_12", "0.125")]
    rows = [[f"`{a}` - `{b}`", f"{100 * float(k):g} %", study.cell(a, b, k)] for a, b, k in asked if {a, b} <= {*arms}]
    if rows:
        page += [
            "## One checkpoint against specialists",
            "",
            "`three_budgets` has seen 25, 6 and 1.5 % only; each specialist only the budget at which it is compared.",
            "",
            *table(["", "at", "points"], rows),
        ]
    rows = [[f"`{b}`", *(study.cell(b, "grpo", keep) for keep in keeps)] for b in CALMER if b in arms]
    if rows:
        page += [
            "## What a rollout is worth",
            "",
            "Each idea minus plain GRPO of the same policy at the same number of rollouts. `twice` and `four_times`",
            "take more optimiser steps, `faster` is their control; `fours` encodes more pictures.",
            "",
            *table(
                ["", *shares(keeps)],
                [
                    [f"`{b}` - `{a}`", *(study.cell(b, a, k) for k in keeps)]
                    for b, a in CALMER.items()
                    if {a, b} <= {*arms}
                ],
            ),
        ]
    pairs = [pair for pair in UNASKED if {*pair} <= {*arms, *OTHERS, "full"}]
    if pairs:
        page += [
            "## Without the question",
            "",
            "A scorer that does not read the question chooses once an image, and the choice can be kept. Its warm-up",
            "is far from the full model where tokens are few, so there is more for GRPO to win. Seed 0 has the scorers",
            "of `runs/train_grip.sh` and the one that shipped before, alike but for how often they were judged, and on",
            "how many questions.",
            "",
            *table(["", *shares(keeps)], [[f"`{a}` - `{b}`", *(study.cell(a, b, k) for k in keeps)] for a, b in pairs]),
        ]
    pairs = [pair for pair in BUDGET if {*pair} <= {*arms}]
    if pairs:
        page += [
            "## Does the budget as an input matter?",
            "",
            "`told_6` is the trained scorer itself, told 6 % whatever the budget is.",
            "`no_budget` is never told it." if "no_budget" in arms else "No scorer was trained without it.",
            "",
            *table(["", *shares(keeps)], [[f"`{a}` - `{b}`", *(study.cell(a, b, k) for k in keeps)] for a, b in pairs]),
        ]
    page += relaxed()
    page += ["## Files", "", header(next(iter(study.results.values()))), "", "All, the first among them:", ""]
    page += [f"- `results/{name}.json`: {short(result)}" for name, result in study.results.items()]
    (ROOT / "docs" / "grip-study.md").write_text("\n".join(page).rstrip() + "\n")
    page = [
        "# How to train a scorer: by family",
        "",
        "Generated by `runs/write_arms.py`; what the arms are and how they were made: [grip-study.md](grip-study.md).",
        f"{n} questions, % right; mean of the arm's training seeds, [95 % interval over pictures].",
        "",
        *families(study),
    ]
    (ROOT / "docs" / "grip-families.md").write_text("\n".join(page).rstrip() + "\n")


def short(result: dict) -> str:
    """Arms and commit of a run."""
    arms = ", ".join(dict.fromkeys(row["pruner"] for row in result["means"] if row["pruner"] != "full"))
    git = result["header"]["git"]
    dirty = ", with changes that were not committed" if git["dirty"] else ""
    return f"{arms}; commit `{git['commit'][:10]}`{dirty}."


def relaxed() -> list[str]:
    """What the relaxations believe of themselves, and what is true."""
    file = ROOT / "results" / "grip-relaxed.json"
    if not file.exists():
        return []
    found = json.loads(file.read_text())
    names = ("soft_first", "soft_last", "hard", "live_first", "live_last", "swap_first", "swap_hard")
    rows = []
    for arm, at in found["arms"].items():
        for keep, one in at.items():
            cells = [sum(one[name]) / len(one[name]) for name in names]
            rows.append([f"`{arm}`", f"{100 * float(keep):g} %", *(f"{value:.2f}" for value in cells)])
    first, last = found["taus"]
    return [
        "## Are the relaxations stuck?",
        "",
        f"On {found['questions']} validation questions (`runs/grip_relaxed.py`, `results/grip-relaxed.json`), mean of",
        f"the seeds, each arm at its {found.get('weights', 'step that was kept')}: the answer's probability under the",
        "soft mask of training at its first and last temperature",
        f"({first:g}, {last:g}) and under the k tokens that inference keeps; how many tokens have a slope there (mask",
        "between 0.05 and 0.95), as a multiple of k; and how often the gradient with respect to the mask tells whether",
        "exchanging a kept token for a dropped one helps (a coin: 0.50), at the first soft mask and at the hard one.",
        "",
        *table(
            [
                "arm",
                "keep",
                "soft, first",
                "soft, last",
                "hard",
                "live, first",
                "live, last",
                "swap, first",
                "swap, hard",
            ],
            rows,
        ),
        *(f"{text}" for text in STUCK),
        "",
    ]


STUCK = [
    "Swaps that change the answer's log-probability by less than 0.02 are left out; the probability is the whole",
    "answer's. Read off: not stuck. The gradient is no blind guide; it tells most of those swaps right, if less so at",
    "the smallest budgets. But the mask and the choice part: at 1.5 % `soft_probability` answers better under its last",
    "soft mask than the warm-up does, and worse with the k tokens that are kept in the end; `soft` is as good under",
    "the mask and worse with the k. Both have learnt to spread it: about two tokens for each that may be kept have a",
    "slope at the last temperature, where the warm-up and GRPO have half a one. `straight`, which is trained on the",
    "hard choice with the mask's gradient, spreads it as well and loses as much. `perturbed` loses under either. At",
    "12.5 % and above masks are spread too, but it costs nothing there (but for `perturbed`).",
]
"""What was read off that table, in words."""


if __name__ == "__main__":
    main()
