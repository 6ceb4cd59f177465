"""docs/zoo.md and docs/zoo.png from results/lab-grid.json and lab-grid-llm.json: every number in them is generated."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from methods_table import CHANGED, unmeasured
from write_results import header

from gripvlm import get_pruner
from gripvlm.report import markdown, plot

ROOT = Path(__file__).parent.parent
BEST, ALWAYS, AT = 7, ("full", "oracle", "random", "grid"), 0.125
BASELINES = ("random", "grid")
Cells = dict[tuple[str, str, float], float]
"""(pruner, family, keep) -> score; the mean of seeds is under the pruner's bare name."""


def again(results: list[dict[str, Any]]) -> list[str]:
    """Puts what was measured again, since it changed, in the place of what it was; says which, and which was not."""
    lines, old = [], unmeasured()
    for name, one in zip(CHANGED, results, strict=True):
        path = ROOT / "results" / f"{name}-later.json"
        new = json.loads(path.read_text()) if path.exists() else {"rows": [], "means": []}
        names = [pruner for pruner in dict.fromkeys(row["pruner"] for row in new["means"]) if pruner != "full"]
        for part in ("rows", "means"):
            one[part] = [row for row in one[part] if row["pruner"] not in names]
            one[part] += [row for row in new[part] if row["pruner"] in names]
        if names:
            lines += [
                f"Measured again, since they changed: {', '.join(f'`{one}`' for one in names)}. {header(new)}",
                "",
            ]
    if old:
        named = ", ".join(f"`{one}`" for one in old)
        lines += [
            f"**Measured before they were made to do what their authors' code does** ([log.md](log.md)): {named}.",
            "`AGAIN=1 LIMIT=100 bash runs/lab_grid.sh` measures them again.",
            "",
        ]
    return lines


def cells(rows: list[dict[str, Any]]) -> Cells:
    found: dict[tuple[str, str, float], list[float]] = defaultdict(list)
    for row in rows:
        found[row["pruner"].partition(":seed=")[0], row["task"].removeprefix("lab/"), row["keep"]].append(row["score"])
    return {key: sum(scores) / len(scores) for key, scores in found.items()}


def sentence(name: str, scores: Cells) -> str:
    """Where a method wins most over the better of random and grid, and where it loses most to the full model."""
    keeps = sorted({keep for pruner, _, keep in scores if pruner == name}, reverse=True)
    families = list(dict.fromkeys(family for pruner, family, _ in scores if pruner == name and family != "mean"))

    def above(family: str, keep: float) -> float:
        return scores[name, family, keep] - max(scores[one, family, keep] for one in BASELINES)

    def points(value: float) -> str:
        return f"{100 * abs(value):.0f}"

    gains = {(family, keep): above(family, keep) for family in families for keep in keeps}
    means = {keep: above("mean", keep) for keep in keeps}
    wins = [keep for keep in keeps if means[keep] > 0]
    best, worst = max(gains, key=lambda at: gains[at]), min(gains, key=lambda at: gains[at])
    full = {family: scores["full", family, 1.0] for family in families}
    holds = [keep for keep in keeps if scores["full", "mean", 1.0] - scores[name, "mean", keep] <= 0.01]
    said = "At no budget above both `random` and `grid` on average"
    if wins:
        said = "Above `random` and `grid` on average at " + ", ".join(f"{100 * keep:g} %" for keep in wins)
    said += (
        f"; wins most on {best[0]} at {100 * best[1]:g} % (+{points(gains[best])} points)" if gains[best] > 0 else ""
    )
    if gains[worst] < 0:
        said += f"; falls furthest behind them on {worst[0]} at {100 * worst[1]:g} % (-{points(gains[worst])})"
    lost = max(families, key=lambda family: full[family] - scores[name, family, min(keeps)])
    least = min(keeps)
    said += f"; at {100 * least:g} % it has lost most on {lost} (-{points(full[lost] - scores[name, lost, least])})"
    if holds:
        said += f"; within a point of the full model down to {100 * min(holds):g} %"
    return f"- `{name}`: {said}."


def earlier(results: list[dict[str, Any]]) -> list[str]:
    """Which scorers ship with other weights than those that were measured here."""
    of = {row["pruner"]: row["pruner_config"].get("weights") for one in results for row in one["means"]}
    old = [name for name, weights in of.items() if name.startswith("grip") and weights != get_pruner(name).weights]
    if not old:
        return []
    names = ", ".join(f"`{name}`" for name in old)
    return [f"Another scorer ships since as {names}: [grip-results.md](grip-results.md).", ""]


def main() -> None:
    results = [json.loads((ROOT / "results" / f"{name}.json").read_text()) for name in CHANGED]
    mended = again(results)
    tables = [[*result["rows"], *result["means"]] for result in results]
    ranked = sorted((row["score"], row["pruner"]) for row in results[0]["means"] if row["keep"] == AT)
    best = [name for _, name in reversed(ranked) if name.partition(":seed=")[0] not in ("oracle", "random")][:BEST]
    named = [row | {"pruner": row["pruner"].removesuffix(":seed=0")} for row in tables[0]]
    plot([row for row in named if row["pruner"] in (*best, *ALWAYS)], ROOT / "docs" / "zoo.png")
    sentences = []
    for table in tables:
        scores = cells(table)
        names = dict.fromkeys(pruner for pruner, _, _ in scores)
        done = {line.split("`")[1] for line in sentences}
        sentences += [sentence(name, scores) for name in names if name not in ("full", "blind", *BASELINES, *done)]
    page = [
        "# Every pruner on the lab",
        "",
        "Generated by `runs/write_zoo.py` from `results/lab-grid*.json` (`LIMIT=100 bash runs/lab_grid.sh`). Lab",
        "evidence ([lab.md](lab.md)): a small model with 3 vision blocks and 5 language layers; methods that name a",
        "block or layer are told another one. What each computes, and our departures: [methods.md](methods.md). `grip`",
        "was trained for this model, the others were not trained at all. Paired differences, times and pictures:",
        "[lab-grid/report.md](lab-grid/report.md), of the first run alone.",
        "",
        *earlier(results),
        *mended,
        "## Where each wins and where it fails",
        "",
        "Written from the tables below, none by hand; a difference of a few points is within the intervals.",
        "",
        *sentences,
        "",
        "## At the input",
        "",
        markdown(tables[0]),
        f"The {BEST} best at {100 * AT:g} % of the tokens, with those that are always shown:",
        "",
        "![Score against share of tokens kept](zoo.png)",
        "",
        header(results[0]),
        "",
        "## Inside the tower and the language model",
        "",
        "`keep` is the average over layers. In five layers, one or more before the first cut, little can be saved.",
        "",
        markdown(tables[1]),
        header(results[1]),
    ]
    (ROOT / "docs" / "zoo.md").write_text("\n".join(page).rstrip() + "\n")


if __name__ == "__main__":
    main()
