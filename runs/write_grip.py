"""docs/grip-results.md and docs/grip.png from results/grip.json: every number in them is generated."""

from __future__ import annotations

import json
from pathlib import Path

from answers import Answers, difference, points, read
from write_results import header, line, percent

from gripvlm import get_pruner
from gripvlm.report import markdown, plot

ROOT = Path(__file__).parent.parent
BLIND, BLIND_BEFORE = "grip:scorer=lab-blind", "blind, before"
EARLIER = "second_leg"
"""What `grip` is called in results that were measured with the scorer that shipped before."""
RANDOM = "random:llava-0.5b"
BEGIN, END = "<!-- grip:begin -->", "<!-- grip:end -->"


def paired(scored: Answers, a: str, b: str, keep: str) -> str:
    """Mean over families of a - b in points."""
    tasks = dict.fromkeys(task for task, _, _ in scored)
    return points(*difference([(scored[t, a, keep], scored[t, b, "1.0" if b == "full" else keep]) for t in tasks]))


def times(runs: list[dict], keeps: list[str]) -> list[str]:
    """Each run's times as a share of the answer of its own unpruned model."""
    lines = [line(["", *(f"{100 * float(keep):g} %" for keep in keeps)]), line(["---", *["---:"] * len(keeps)])]
    for run in runs:
        full = next(row["seconds_total"] for row in run["means"] if row["pruner"] == "full")
        for name in dict.fromkeys(row["pruner"] for row in run["means"] if row["pruner"] != "full"):
            cells = []
            for row in (row for row in run["means"] if row["pruner"] == name):
                cells.append(f"{100 * row['seconds_total'] / full:.0f} ({100 * row['seconds_pruner'] / full:.0f})")
            lines.append(line([f"`{name}`", *cells]))
    return lines


def speeds(speed: dict) -> list[str]:
    """Each model's rollouts and steps a second, over the limit and over the loop."""

    def said(ratio: dict[str, float], unit: float, digits: int, sign: str) -> str:
        median, low, high = (f"{unit * ratio[name]:.{digits}f}" for name in ("median", "low", "high"))
        return f"{median}{sign} ({low} to {high})"

    lines = []
    for name, model in speed["models"].items():
        for kept, one in model["by_kept"].items():
            shares = [said(one["share_of_limit"][what], 100, 0, " %") for what in ("rollouts", "step")]
            ratios = [said(one["to_re_encoding"][what], 1, 1, "") for what in ("rollouts", "step")]
            lines.append(line([f"`{name}`", f"{kept} of {model['visual_tokens']}", *shares, *ratios]))
    return lines


def main() -> None:
    result = json.loads((ROOT / "results" / "grip.json").read_text())
    more = json.loads((ROOT / "results" / "grip-shipped.json").read_text())
    blind = json.loads((ROOT / "results" / "grip-blind.json").read_text())
    for other in (more, blind):
        assert result["header"]["weights"] == other["header"]["weights"], "two runs of different models"
    for name, one in (("grip", more), (BLIND, blind)):
        (own,) = {row["pruner_config"]["weights"] for row in one["means"] if row["pruner"] == name}
        assert own == get_pruner(name).weights, f"{name} ships with other weights than those that were measured"
    again = {row["pruner"] for row in blind["means"]} - {"full"}
    for part in ("rows", "means"):  # those that shipped before
        result[part] = [row for row in result[part] if row["pruner"] not in again]
    whole = json.loads(json.dumps(result))  # with its own rows only
    shipped = get_pruner("grip").weights
    named = {"grip": {}, "grip-shipped": {}}
    for name, one in (("grip", result), ("grip", whole), ("grip-shipped", more)):
        for row in (*one["rows"], *one["means"]):
            if row["pruner"] == "grip" and row["pruner_config"]["weights"] != shipped:
                named[name]["grip"] = row["pruner"] = EARLIER
    for part in ("rows", "means"):
        result[part] += [row for row in (*more[part], *blind[part]) if row["pruner"] != "full"]
    scored = read("grip", named["grip"]) | read("grip-shipped", named["grip-shipped"]) | read("grip-blind")
    arms = list(dict.fromkeys(pruner for _, pruner, _ in scored))
    keeps = list(dict.fromkeys(keep for _, pruner, keep in scored if pruner == "grip"))
    others = [name for name in arms if name not in ("grip", "blind")]
    lines = [line(["Grip minus", *(f"{100 * float(keep):g} %" for keep in keeps)])]
    lines.append(line(["---", *["---:"] * len(keeps)]))
    lines += [line([f"`{name}`", *(paired(scored, "grip", name, keep) for keep in keeps)]) for name in others]
    earlier = {(task, BLIND_BEFORE, keep): one for (task, name, keep), one in read("grip").items() if name == BLIND}
    free = scored | earlier
    without = [line([f"`{BLIND}` minus", *(f"{100 * float(keep):g} %" for keep in keeps)])]
    without.append(line(["---", *["---:"] * len(keeps)]))
    for name in ("full", "warmup_blind", BLIND_BEFORE, "mmr(norm)", "cdpruner", "divprune", "norm", "grid", "random"):
        without.append(line([f"`{name}`", *(paired(free, BLIND, name, keep) for keep in keeps)]))
    rows = [*result["rows"], *result["means"]]
    plot([row for row in rows if row["pruner"] not in (EARLIER, "first_leg")], ROOT / "docs" / "grip.png")
    full = next(row for row in result["means"] if row["pruner"] == "full")
    page = [
        "# Grip on the lab",
        "",
        "Generated by `runs/write_grip.py` from `results/grip.json`, `grip-shipped.json` and `grip-blind.json`;",
        "answers: `results/grip*.samples.jsonl.gz`. Lab evidence ([lab.md](lab.md)), one training seed, not one of",
        "larger models. How Grip works and is trained: [grip.md](grip.md). `warmup` is the scorer before GRPO,",
        "`first_leg` and `second_leg` are two runs of GRPO from there in a row; `grip`, which ships, is the mean of",
        "their weights. `warmup_blind` is to `grip:scorer=lab-blind` what `warmup` is to `first_leg`.",
        "",
        "## Differences",
        "",
        "Points of accuracy, mean of six families, question by question on the same pictures, with a 95 % interval",
        f"from a bootstrap over pictures. The unpruned model has {percent(full['score'])} %; `full` is compared with",
        "its whole image at every budget; `oracle` keeps each question's own evidence, which no pruner could know.",
        "",
        *lines,
        "",
        "Without the question (one choice serves all questions about an image), and so like most heuristics;",
        f"`{BLIND_BEFORE}` is the scorer that shipped before, from the same warm-up by plain GRPO:",
        "",
        *without,
        "",
        "## Scores",
        "",
        markdown(rows).partition("\n\n")[0],
        "",
        "![Score against share of tokens kept](grip.png)",
        "",
        header(result),
        "",
        "And for the pruners that were added later: " + header(more),
        "",
        "And for those that do not read the question: " + header(blind),
    ]
    page += [
        "",
        "## What is kept",
        "",
        "Six questions about two pictures, four budgets, four pruners (`runs/grip_pictures.py`): dimmed patches were",
        "dropped, the answer stands below, green where it is right. The question visibly moves what Grip keeps.",
        "",
        "![Tokens kept for six questions](grip-tokens.png)",
    ]
    speed = json.loads((ROOT / "results" / "grip-speed.json").read_text())
    page += [
        "",
        "## Cost",
        "",
        "Rollouts in training (`runs/grip_speed.py`, `results/grip-speed.json`): times taken in turns in one run,",
        f"{speed['group']} subsets a question; medians, with the quartiles of the turns. The limit is the frozen",
        "language model's forward alone over the same rows and lengths, with everything it reads made beforehand; the",
        "loop prunes and encodes anew for each subset. A step is all that training does: encoding, the scorer, the",
        "draws, the rollouts, the loss and its gradient.",
        f"`{RANDOM}` has random weights in the shape of CLIP-L/14-336 and Qwen2-0.5B.",
        "",
        line(["model", "tokens kept", "rollouts / limit", "step / limit", "rollouts / loop", "step / loop"]),
        line(["---", *["---:"] * 5]),
        *speeds(speed),
        "",
        f"By FLOPs, a scorer of {speed['scorer_parameters_at_4096'] / 1e6:.1f} M parameters for a model of width 4096",
        f"costs {100 * speed['scorer_share_of_7b_prefill_flops']:.2f} % of a 7B prefill (576 visual, 64 text tokens).",
        "",
        "On the lab model itself, whose language model is hardly larger than the scorer, its share is large. Time of",
        "an answer, and of the pruner alone, in percent of the unpruned model's answer in the same run (the runs'",
        "clocks differ, so milliseconds are not shown side by side):",
        "",
        *times([whole, more, blind], keeps),
    ]
    means = {(row["pruner"], str(row["keep"])): row["score"] for row in result["means"]}
    short = [line(["", *(f"{100 * float(keep):g} %" for keep in keeps)]), line(["---", *["---:"] * len(keeps)])]
    for name in ("grip", "warmup", "mmr(norm)", "cdpruner", "divprune", "norm", "grid", "random", "oracle"):
        short.append(line([f"`{name}`", *(percent(means[name, keep]) for keep in keeps)]))
    readme = (ROOT / "README.md").read_text()
    before, rest = readme.split(BEGIN)
    block = ["", f"Mean of six families, % right, by share of tokens kept; all tokens: {percent(full['score'])}."]
    which = "the whole test sample; `gripvlm list` shows scores of fewer, which differ a little."
    block += [f"{full['n']} questions, {which}", ""]
    (ROOT / "README.md").write_text(before + BEGIN + "\n".join([*block, *short, ""]) + END + rest.split(END)[1])
    (ROOT / "docs" / "grip-results.md").write_text("\n".join(page).rstrip() + "\n")


if __name__ == "__main__":
    main()
