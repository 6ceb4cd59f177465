"""Which pruner, which budget, for which model: docs/choosing.md and the advice of `gripvlm list`, from results/.

Written by python runs/methods_table.py, which reads this.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gpu_tables

from gripvlm.models.families import FAMILIES
from gripvlm.models.grids import unknown

ROOT = Path(__file__).resolve().parents[1]
GRID, INSIDE, SPEED = "lab-grid", "lab-grid-llm", "pruner-speed"
REFERENCES = ("full", "oracle")
KEPT = 0.125

Row = dict[str, Any]


def read(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "results" / f"{name}.json").read_text(encoding="utf-8"))


def head(spec: str) -> str:
    return spec.partition(":")[0].partition("(")[0]


def shares() -> dict[str, float]:
    """Pruner -> its own time as a share of the prefill of one image, by the first cell of the speed file."""
    cell = read(SPEED)["cells"][0]
    return {head(spec): row["ratio"][0] for spec, row in cell["pruners"].items() if row["ratio"]}


def full_of(rows: list[Row]) -> Row:
    return next(row for row in rows if row["pruner"] == "full")


def free(rows: list[Row], keep: float) -> list[Row]:
    """What was measured at a budget without any training, the best first."""
    mine = [row for row in rows if row["keep"] == keep and not row["trained"] and row["pruner"] not in REFERENCES]
    return sorted(mine, key=lambda row: -row["score"])


def grip_of(rows: list[Row], keep: float) -> Row:
    return next(row for row in rows if row["pruner"] == "grip" and row["keep"] == keep)


def enough(rows: list[Row], keep: float) -> Row | None:
    """The cheapest method without training whose interval reaches the full model's score; None where none does."""
    cost, least = shares(), full_of(rows)["score"]
    able = [row for row in free(rows, keep) if row["ci_high"] >= least and head(row["pruner"]) in cost]
    return min(able, key=lambda row: cost[head(row["pruner"])], default=None)


def budgets(rows: list[Row]) -> list[float]:
    return sorted({row["keep"] for row in rows if row["pruner"] == "grip"}, reverse=True)


def said(row: Row) -> str:
    return f"{100 * row['score']:.1f}"


def percent(value: float) -> str:
    return f"{100 * value:.2g} %"


def costs() -> list[dict[str, Any]]:
    """What Grip adds, as a share of the unpruned prefill, and what a question then takes, at 12.5 % of the tokens."""
    found = []
    for name in ("bench-cpu-lab", "bench-cpu-llava-0.5b"):
        result = read(name)
        row = next(
            one
            for one in result["rows"]
            if (one["pruner"], one["keep"], one["batch"]) == ("grip", KEPT, 1) and not one["failed"]
        )
        hardware, full = result["environment"]["hardware"], result["rows"][0]
        found.append(
            {
                "file": f"results/{name}.json",
                "model": result["model"]["name"],
                "parameters": result["model"]["parameters"],
                "tokens": row["visual_tokens"],
                "kept": row["kept"],
                "added": round(row["to_full"]["added"]["median"], 5),
                "whole": round(row["to_full"]["whole"]["median"], 4),
                "seconds": [round(one["seconds"]["first_token"]["median"], 4) for one in (full, row)],
                "kv_megabytes": [round(one["kv_bytes"] / 1e6, 3) for one in (full, row)],
                "hardware": f"{hardware['processor']}, {hardware['threads']} threads",
            }
        )
    return found


def cost_block() -> str:
    """README's numbers of time and memory."""
    lines = [
        "| model | visual tokens | first token, s | KV cache, MB | adds to the prefill |",
        "|---|---:|---:|---:|---:|",
    ]
    names = {"lab": "the lab's, {m:.1f} M weights", "random:llava-0.5b": "LLaVA with a 0.5 B language model"}
    for one in costs():
        cells = (
            names[one["model"]].format(m=one["parameters"] / 1e6),
            "{:g} -> {:g}".format(one["tokens"], one["kept"]),
            "{:.3g} -> {:.3g}".format(*one["seconds"]),
            "{:.3g} -> {:.3g}".format(*one["kv_megabytes"]),
            f"{100 * one['added']:.2g} %",
        )
        lines.append(f"| {' | '.join(cells)} |")
    where = costs()[0]["hardware"]
    files = ", ".join(f"`{one['file']}`" for one in costs())
    return "\n".join(
        [
            f"Unpruned -> `grip` at {100 * KEPT:g} % of the tokens, one picture, {where}, no accelerator (the larger",
            f"model with random weights, since only its shape matters here; {files}):",
            "",
            *lines,
            "",
            "The scorer is as large as the lab's toy language model, so there it buys little; of a 7 B model's",
            f"prefill it is {100 * share_of_7b():.2g} % by FLOPs, counted, not timed ([docs/speed.md](docs/speed.md)).",
            *gpu_tables.paragraph(),
        ]
    )


def readme(text: str) -> str:
    """README with the block of costs as the results have it."""
    begin, end = "<!-- cost:begin -->\n", "\n<!-- cost:end -->"
    before, rest = text.split(begin)
    return before + begin + cost_block() + end + rest.split(end)[1]


def share_of_7b() -> float:
    """The scorer's FLOPs as a share of a 7B model's prefill: counted, not timed."""
    return float(f"{read('grip-speed')['scorer_share_of_7b_prefill_flops']:.3g}")


def advice() -> list[str]:
    """Sentences for the end of `gripvlm list`."""
    rows = read(GRID)["means"]
    full, found = full_of(rows), []
    for keep in budgets(rows):
        best, able, grip = free(rows, keep)[0], enough(rows, keep), grip_of(rows, keep)
        if able is not None:
            found.append(f"{100 * keep:g}%: {able['pruner']} ({said(able)}) is enough, and grip has {said(grip)}")
        else:
            found.append(
                f"{100 * keep:g}%: nothing untrained is enough (best: {best['pruner']}, {said(best)}); grip has "
                f"{said(grip)}"
            )
    asked = sum(row["n"] for row in read(GRID)["rows"] if row["pruner"] == "full")
    return [
        f"On the lab's model ({asked} questions, all tokens: {said(full)}), cheapest untrained pruner whose interval "
        "reaches that score:",
        *found,
        "grip must be trained for your model (gripvlm train). Pruners that read the vision tower's attention or drop "
        "inside the LLM do not serve every model. Which serves which, and at what cost: docs/choosing.md",
    ]


def page() -> str:
    """All of docs/choosing.md."""
    grid, inside = read(GRID), read(INSIDE)
    rows, cost = grid["means"], shares()
    asked = sum(row["n"] for row in grid["rows"] if row["pruner"] == "full")
    lines = [
        "# Which pruner, which budget, for which model",
        "",
        f"Written by `python runs/methods_table.py` from `results/{GRID}.json`, `{INSIDE}.json`, `{SPEED}.json`",
        "and the table of families. All scores are the lab's, a small model on rendered scenes: what fails there may",
        "not fail in a 7B model, and the reverse. Measure on yours with `gripvlm eval`, and see the methods' papers",
        "for their own numbers ([methods.md](methods.md) names them).",
        "",
        "## By budget",
        "",
        f"Mean over six families of questions, % right, {asked} questions; all tokens: {said(full_of(rows))}. `grip`",
        "was trained for this model. Enough: the cheapest untrained method whose 95 % interval reaches the score",
        "with all tokens.",
        "",
        "| keep | `grip` | best untrained | enough | its time, share of a prefill | `random` |",
        "| ---: | ---: | --- | --- | ---: | ---: |",
    ]
    for keep in budgets(rows):
        best, able = free(rows, keep)[0], enough(rows, keep)
        chance = [row["score"] for row in rows if head(row["pruner"]) == "random" and row["keep"] == keep]
        last = (f"`{able['pruner']}`", percent(cost[head(able["pruner"])])) if able is not None else ("none", "-")
        cells = (f"{100 * keep:g} %", said(grip_of(rows, keep)), f"`{best['pruner']}` {said(best)}", *last)
        lines.append(f"| {' | '.join(cells)} | {100 * sum(chance) / len(chance):.1f} |")
    deep = inside["means"]
    lines += [
        "",
        "Methods inside the language model and inside the vision tower, at equal cost (`keep` is the average over the",
        "layers, so few tokens are out of their reach):",
        "",
        "| keep | best inside | `grip` at the input | `random` |",
        "| ---: | --- | ---: | ---: |",
    ]
    for keep in sorted({row["keep"] for row in deep if row["pruner"] == "grip"}, reverse=True):
        best = next(row for row in free(deep, keep) if head(row["pruner"]) not in ("random", "grid"))
        chance = [row["score"] for row in deep if head(row["pruner"]) == "random" and row["keep"] == keep]
        lines.append(
            f"| {100 * keep:g} % | `{best['pruner']}` {said(best)} | {said(grip_of(deep, keep))} | "
            f"{100 * sum(chance) / len(chance):.1f} |"
        )
    lines += [
        "",
        "## By what you have",
        "",
        "- Questions of your own: train `grip` (`gripvlm train`), the only one here that keeps the score at small",
        "  budgets. Begin at 10 %.",
        "- No training: begin at 50 % with what the table calls enough, go down until `gripvlm eval` says stop, and",
        "  measure `random` and `grid` beside it: a method that does not beat them buys nothing.",
        "- Several questions about one picture: a pruner that does not read the question (`gripvlm list` says which)",
        "  chooses once, and `gripvlm.encode` encodes once.",
        '- Pictures of many sizes: a fraction, or at most a count (`keep="<=64"`). Several pictures or tiles in a',
        "  prompt: `split(...)` moves the budget to those that need it.",
        "- A prefill that is short already (a small model, small pictures): `gripvlm bench` says whether pruning buys",
        "  anything ([speed.md](speed.md)).",
        "",
        "## By model",
        "",
        "What a family supplies. A raster: `grid`, `pool`, `hiprune`, `mustdrop` and others need one. Attention: what",
        "reads the vision tower's (`visionzip`, `fastervlm`, `vispruner`, `hired`, ...). In the LLM: `fastv`,",
        "`pyramiddrop`, `sparsevlm`, ... Merging: `tome`. `gripvlm list` says what each pruner needs.",
        "",
        "| model type | raster | attention | in the LLM | merging |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, family in sorted(FAMILIES.items()):
        has = (family.grid is not unknown, family.vision is not None, bool(family.layers), bool(family.merges))
        lines.append(f"| `{name}` | {' | '.join('yes' if one else '-' for one in has)} |")
    return "\n".join([*lines, ""])
