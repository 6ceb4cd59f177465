"""src/gripvlm/cli/recommended.json, what `gripvlm recommend` knows, and a table of docs/choosing.md.

python -m experiments.choosing.analyze
"""

from __future__ import annotations

import json
from statistics import mean
from typing import Any

from experiments.lab_dense import analyze as dense
from experiments.lab_grid import analyze as lab
from experiments.results import BUDGETS, ROOT, Result, average, share, table
from experiments.tables import fill
from gripvlm.pruners import get_pruner

TARGET = ROOT / "src" / "gripvlm" / "cli" / "recommended.json"
KINDS = {
    "things": ("lab", ("existence", "perception", "science"), "few things: is it there, its colour, size, place"),
    "diagrams": ("lab", ("diagram",), "labels and arrows between things"),
    "text": ("lab", ("reading", "text"), "short words and numbers, read letter by letter"),
    "crowded": ("lab-dense", None, "many small things, all of which count"),
}
"""Kind of picture -> the lab, its families of questions (None: all), and what they ask."""
REPORTS = {"lab": "experiments/lab_grid/REPORT.md", "lab-dense": "experiments/lab_dense/REPORT.md"}
LEFT_OUT = ("full", "oracle", "grip:scorer=lab-blind", "grip:scorer=lab-dense-blind")
ENOUGH = 0.95
NOTES = {"hawk": "measured with weights of that model's heads; measure yours first: python -m gripvlm.eval.heads"}
"""Pruner -> what its score depends on that its name does not say."""


def results(name: str) -> dict[str, list[Result]]:
    """Pruner -> its seeds. Options that suit a lab's small tower are left out, and both labs' scorers are `grip`."""
    found = lab.results("input") if name == "lab" else dense.grid()
    found = {spec: seeds for spec, seeds in found.items() if spec not in LEFT_OUT and dense.ONE_ROUND not in spec}
    kept = {spec.replace(":scorer=lab-dense", ""): seeds for spec, seeds in found.items()}
    return {spec.partition(":")[0]: seeds for spec, seeds in kept.items()}


def is_trained(spec: str) -> bool:
    """Grip, alone or inside a wrapper."""
    return "grip" in spec


def full(name: str) -> Result:
    return (lab.results("input") if name == "lab" else dense.grid())["full"][0]


def families(kind: str) -> tuple[str, ...]:
    name, chosen, _ = KINDS[kind]
    return chosen or tuple(full(name).questions)


def kept_scores(kind: str, budget: str) -> dict[str, float]:
    """Pruner -> its mean score over the kind's families as a share of the unpruned model's on the same questions."""
    found = {}
    # On lab-dense smaller pictures were measured on fewer questions, at fewer budgets.
    parts = [(full(KINDS[kind][0]), results(KINDS[kind][0]))]
    if KINDS[kind][0] == "lab-dense":
        parts.append((dense.smaller()["full"][0], {"downsample": dense.smaller()["downsample"]}))
    for whole, measured in parts:
        all_tokens = mean(whole.score("1.0", family) for family in families(kind))
        for spec, seeds in measured.items():
            if budget in seeds[0].budgets:
                kept = mean(average(seeds, budget, family) for family in families(kind))
                found[spec] = round(kept / all_tokens, 4)
    return found


def described(spec: str) -> dict[str, Any]:
    """What a pruner reads; grip is trained, and its options do not change what it needs of a model."""
    if spec == "downsample" or is_trained(spec):
        return {"grid": False, "attention": False, "question": is_trained(spec), "trained": is_trained(spec)}
    needs = get_pruner(spec).needs
    attention = bool(needs & {"vision_attention", "vision_given", "patches"})
    return {"grid": "grid" in needs, "attention": attention, "question": "question" in needs, "trained": False}


def recommended() -> dict[str, Any]:
    shares, kinds = lab.prefill_shares(), {}
    for kind, (name, _, asks) in KINDS.items():
        kinds[kind] = {
            "asks": asks,
            "model": name,
            "report": REPORTS[name],
            "families": list(families(kind)),
            "questions": sum(len(full(name).questions[family]) for family in families(kind)),
            "scores": {budget: kept_scores(kind, budget) for budget in BUDGETS},
        }
    specs = dict.fromkeys(spec for kind in kinds.values() for scores in kind["scores"].values() for spec in scores)
    pruners = {
        # A wrapper was timed around an untrained pruner.
        spec: described(spec)
        | ({"note": NOTES[spec]} if spec in NOTES else {})
        | ({"prefill_share": shares[lab.name_of(spec)]} if lab.name_of(spec) in shares and "(grip" not in spec else {})
        for spec in specs
    }
    return {"written_by": "python -m experiments.choosing.analyze", "kinds": kinds, "pruners": pruners}


def by_kind() -> str:
    """The smallest budget that keeps 95 % of the score, by kind, and what is left at 12.5 %."""
    rows = []
    for kind, (name, _, asks) in KINDS.items():
        cells = [f"`{name}`: {asks}"]
        for trained in (True, False):
            best = {
                budget: max(
                    (score, spec) for spec, score in kept_scores(kind, budget).items() if is_trained(spec) == trained
                )
                for budget in BUDGETS
            }
            enough = [budget for budget in BUDGETS if best[budget][0] >= ENOUGH]
            if not enough:
                cells.append("none")
            else:
                cells.append(f"{share(enough[-1])} (`{best[enough[-1]][1]}`)")
        at = kept_scores(kind, "0.125")
        cells += [f"{100 * at[spec]:.0f}" for spec in ("downsample", "grid", "random")]
        rows.append([kind, *cells])
    head = ["kind", "asks", "best trained", "best untrained", "`downsample` at 12.5 %", "`grid`", "`random`"]
    return table(head, rows)


def tables() -> dict[str, dict[str, str]]:
    return {"docs/choosing.md": {"by_kind": by_kind()}}


if __name__ == "__main__":
    TARGET.write_text(json.dumps(recommended(), indent=1) + "\n", encoding="utf-8")
    print(TARGET)
    for path, page in tables().items():
        fill(path, page)
