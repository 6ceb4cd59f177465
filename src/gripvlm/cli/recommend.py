"""`gripvlm recommend`: what to start with for a model, a budget and a kind of picture, with the results behind it.

The numbers come from recommended.json, which `python -m experiments.choosing.analyze` writes from results.
"""

from __future__ import annotations

import json
import math
from importlib.resources import files
from statistics import mean
from typing import Annotated, Any

import typer
from rich.console import Console

from gripvlm.budget import Budget
from gripvlm.cli.commands import Model, console
from gripvlm.errors import GripError
from gripvlm.utils.spec import did_you_mean
from gripvlm.utils.terminal import filled

ANY = "any"
REFERENCES = ("downsample", "random", "grid")
"""What a pruner has to beat to be worth its time."""
SHOWN, ENOUGH = 3, 0.95


def recommended() -> dict[str, Any]:
    """recommended.json."""
    return json.loads(files("gripvlm.cli").joinpath("recommended.json").read_text(encoding="utf-8"))


def recommend_command(
    model: Model = "lab",
    keep: Annotated[str, typer.Option("--keep", "-k", help="A share of the visual tokens, such as 10% or 0.1.")] = "10%",
    kind: Annotated[str, typer.Option(help="Of picture: any, things, diagrams, text or crowded.")] = ANY,
) -> None:
    """What to start with for a model and a budget, and where pruning hurts."""
    known, asked = recommended(), Budget(keep).plain
    if not isinstance(asked, float):
        raise GripError(f"--keep {keep}: type a share of the visual tokens, such as 10% (how many tokens that is depends "
                        "on the picture)")
    if kind not in (ANY, *known["kinds"]):
        hint = did_you_mean(kind, known["kinds"], count=1, cutoff=0.5)
        raise GripError(f"--kind {kind}: {hint}type one of {', '.join((ANY, *known['kinds']))}")

    from gripvlm.models.families import FAMILIES
    from gripvlm.models.grids import unknown
    from gripvlm.models.loading import model_type

    family = FAMILIES[model_type(model)]
    lacks = {
        "grid": family.grid is unknown,
        "attention": family.vision is None,
        "size": family.row_pixels is None,
    }
    show(console(), known, model, family.model_type, lacks, asked, kind)


def serves(pruner: str, row: dict[str, Any], lacks: dict[str, bool]) -> bool:
    """Whether a model that lacks some of these can run the pruner."""
    if pruner == "downsample":
        return not lacks["size"]
    return not any(row[what] and lacks[what] for what in ("grid", "attention"))


def nearest(budgets: list[str], asked: float) -> str:
    """The measured budget nearest to the one asked for, by its logarithm: budgets go by factors."""
    return min(budgets, key=lambda budget: abs(math.log(float(budget) / asked)))


def show(
    screen: Console, known: dict[str, Any], model: str, family: str, lacks: dict[str, bool], asked: float, kind: str
) -> None:
    """Prints the recommendation."""
    kinds = known["kinds"] if kind == ANY else {kind: known["kinds"][kind]}
    budgets = list(next(iter(kinds.values()))["scores"])
    budget = nearest(budgets, asked)
    usable = {name: row for name, row in known["pruners"].items() if serves(name, row, lacks)}
    scores = {
        name: [one["scores"][budget].get(name) for one in kinds.values()]
        for name in usable
        if all(name in one["scores"][budget] for one in kinds.values())
    }
    ranked = sorted(scores, key=lambda name: -mean(scores[name]))
    untrained = [name for name in ranked if not usable[name]["trained"]]
    best = [name for name in untrained if name not in REFERENCES][:SHOWN]

    def say(text: str, indent: str = "", style: str = "") -> None:
        screen.print(filled(text, indent), style=style, markup=False, soft_wrap=True)

    def line(name: str) -> None:
        cells = "  ".join(f"{100 * value:.0f} {what}" for what, value in zip(kinds, scores[name], strict=True))
        cost = usable[name].get("prefill_share")
        reads = "reads the question" if usable[name]["question"] else ""
        parts = [cells, "" if cost is None else f"{100 * cost:.2g}% of a prefill", reads]
        say(f"{name}: {'; '.join(filter(None, parts))}", "  ")

    say(f"{model} ({family}) at {100 * asked:g}% of its visual tokens", style="bold")
    say(_setting(kinds, budget))
    screen.print("\nStart with, untrained", style="bold")
    for name in best:
        line(name)
    screen.print("Beside them, as what they have to beat", style="bold")
    for name in (name for name in REFERENCES if name in scores):
        line(name)
    if lacks["size"]:
        say(f"(downsample: the size of a picture does not set how many tokens {family} makes of it)", "  ")
    if "grip" in scores:
        screen.print("If you can train for your model (gripvlm train; the labs' scorers were)", style="bold")
        line("grip")
    screen.print("\nHow far down", style="bold")
    for name, one in kinds.items():
        say(_how_far(name, one, usable), "  ")
    hurt = [name for name, values in zip(kinds, zip(*(scores[b] for b in best), strict=True), strict=True) if max(values) < ENOUGH]
    screen.print("Where pruning hurts", style="bold")
    if hurt:
        say(f"At this budget the pruners above lose more than 5% on: {', '.join(hurt)}.", "  ")
    say(
        "Fine detail goes first: text, and pictures in which everything counts. Documents, charts and boxes (grounding) "
        "were not measured here; papers find that they lose most (docs/choosing.md): keep half or more there, or do not "
        "prune.",
        "  ",
    )
    names = ",".join((*best, *(name for name in REFERENCES if name in scores)))
    say("\nThese two models rank pruners their own way. On your own questions:")
    say(f'gripvlm eval --model {model} --tasks jsonl:my.jsonl --keep {100 * asked:g}% --pruners "{names}"', "  ")
    say(f"Results: {', '.join(dict.fromkeys(one['report'] for one in known['kinds'].values()))}")


def _setting(kinds: dict[str, Any], budget: str) -> str:
    asks = "; ".join(f"{name}: {one['asks']}, {one['questions']} questions" for name, one in kinds.items())
    return (
        f"Right answers as % of those with all tokens, at {100 * float(budget):g}%, the measured budget nearest to "
        f"yours, on the labs' two small models ({asks}). Differences of a few % are within the intervals."
    )


def _how_far(name: str, kind: dict[str, Any], usable: dict[str, Any]) -> str:
    """The smallest budgets that keep 95 % of the score, untrained and trained."""
    parts = []
    for trained in (False, True):
        found = [
            (budget, best)
            for budget, scores in kind["scores"].items()
            if (best := max((s, p) for p, s in scores.items() if p in usable and usable[p]["trained"] == trained))[0]
            >= ENOUGH
        ]
        what = "grip" if trained else "untrained"
        if found:
            budget, (_, pruner) = found[-1]
            parts.append(f"{what} to {100 * float(budget):g}%" + ("" if trained else f" ({pruner})"))
        else:
            parts.append(f"{what} at none of the budgets")
    return f"{name}: 95% of the score is kept {', '.join(parts)}"
