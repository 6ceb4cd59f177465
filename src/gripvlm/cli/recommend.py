"""`gripvlm recommend`: what to start with for a model, a budget and a kind of picture, with the results behind it.

The numbers come from recommended.json, which `python -m experiments.choosing.analyze` writes from results.
"""

from __future__ import annotations

import json
import math
import re
from importlib.resources import files
from statistics import mean
from typing import Annotated, Any

import typer
from rich.console import Console

from gripvlm.budget import Budget
from gripvlm.cli.commands import Model, console
from gripvlm.errors import BudgetError, GripError
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
    keep: Annotated[
        str, typer.Option("--keep", "-k", help="A share of the visual tokens, such as 10% or 0.1.")
    ] = "10%",
    kind: Annotated[str, typer.Option(help="Of picture: any, things, diagrams, text or crowded.")] = ANY,
) -> None:
    """What to start with for a model and a budget, and where pruning hurts."""
    known, asked = recommended(), _share(keep)
    if kind not in (ANY, *known["kinds"]):
        hint = did_you_mean(kind, known["kinds"], count=1, cutoff=0.5)
        raise GripError(f"--kind {kind}: {hint}type one of {', '.join((ANY, *known['kinds']))}")

    from gripvlm.models.families import FAMILIES
    from gripvlm.models.smaller import sets_tokens

    family = FAMILIES[_type(model)]
    lacks = {
        "grid": not family.has_rasters,
        "attention": family.vision is None,
        "size": not sets_tokens(family),
    }
    show(console(), known, model, family.model_type, lacks, asked, kind)


def _share(keep: str) -> float:
    """`--keep` as a share of the visual tokens."""
    try:
        share = Budget(keep).plain
    except BudgetError:
        share = None
    if isinstance(share, float):
        return share
    raise GripError(
        f"--keep {keep}: type a share of the visual tokens, above 0 and up to 100%, such as 10% (what share a "
        "count is depends on the picture)"
    )


def _type(model: str) -> str:
    """The type of a model; its name alone may not tell it, or its files may be out of reach."""
    from gripvlm.models.families import FAMILIES
    from gripvlm.models.loading import ModelError, model_type

    try:
        return model_type(model)
    except ModelError as error:
        last = re.sub(r"[-.]", "_", model.rstrip("/").rpartition("/")[2].lower())
        hint = did_you_mean(last, FAMILIES, count=2, cutoff=0.5) or f"types are {', '.join(FAMILIES)}"
        raise GripError(
            f"{str(error).rstrip('.')}. --model also takes a model's type, which needs neither files nor network: "
            f"{hint.strip()}"
        ) from error


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
    """Prints the recommendation: pruners by their mean over kinds of the score as a share of the unpruned model's.

    Args:
        known: recommended.json.
        model, family: as typed, and its type.
        lacks: what the family has not, "grid", "attention" (of the tower) and "size" (of a picture sets its tokens).
        asked: a share of the tokens.
        kind: of picture, or `ANY`.
    """
    kinds = known["kinds"] if kind == ANY else {kind: known["kinds"][kind]}
    budget = nearest(list(next(iter(kinds.values()))["scores"]), asked)
    pruners = {name: row for name, row in known["pruners"].items() if serves(name, row, lacks)}
    at_budget = {what: one["scores"][budget] for what, one in kinds.items()}
    everywhere = [name for name in pruners if all(name in scores for scores in at_budget.values())]
    ranked = sorted(everywhere, key=lambda name: -mean(scores[name] for scores in at_budget.values()))
    best = [name for name in ranked if not pruners[name]["trained"] and name not in REFERENCES][:SHOWN]
    trained = [name for name in ranked if pruners[name]["trained"]][:SHOWN]
    measured = set().union(*at_budget.values())
    references = [name for name in REFERENCES if name in measured & pruners.keys()]

    def say(text: str, indent: str = "  ", style: str = "") -> None:
        screen.print(filled(text, indent), style=style, markup=False, soft_wrap=True)

    def show_pruners(title: str, names: list[str]) -> None:
        say(title, "", "bold")
        for name in names:
            shares = ((what, scores[name]) for what, scores in at_budget.items() if name in scores)
            parts = ["  ".join(f"{100 * share:.0f} {what}" for what, share in shares)]
            if "prefill_share" in pruners[name]:
                parts.append(f"{100 * pruners[name]['prefill_share']:.2g}% of a prefill")
            parts += ["reads the question"] if pruners[name]["question"] else []
            parts += [pruners[name]["note"]] if "note" in pruners[name] else []
            say(f"{name}: {'; '.join(parts)}")

    say(f"{model} ({family}) at {100 * asked:g}% of its visual tokens", "", "bold")
    asks = "; ".join(f"{what}: {one['asks']}, {one['questions']} questions" for what, one in kinds.items())
    say(
        f"Right answers in % of those with all tokens, at {100 * float(budget):g}%, the measured budget nearest to "
        f"yours, by the small models of the labs ({asks}). Differences of a few % are within the intervals.",
        "",
    )
    show_pruners("Start with, untrained", best)
    show_pruners("Beside them, as what they have to beat", references)
    if lacks["size"]:
        say(f"(downsample: the size of a picture does not set how many tokens {family} makes of it)")
    else:
        say(
            "(downsample: the towers of the labs know one size of picture and fail at any other; for models that were "
            "trained on many sizes papers find it hard to beat, so measure it)"
        )
    show_pruners("If you can train for your model, as was done for the labs (gripvlm train)", trained)
    say("How far down", "", "bold")
    for what, one in kinds.items():
        say(f"{what}: {ENOUGH:.0%} of the score is kept {_how_far(one['scores'], pruners)}")
    say("Where pruning hurts", "", "bold")
    hurt = [what for what, scores in at_budget.items() if max(scores[name] for name in best) < ENOUGH]
    if hurt:
        say(f"At this budget the pruners above lose more than {1 - ENOUGH:.0%} on: {', '.join(hurt)}.")
    say(
        "Documents, charts and boxes (grounding) were not measured here. Papers find that text and places lose most "
        "(docs/choosing.md): measure those before you prune them."
    )
    say("Next, with questions of your own", "", "bold")
    name = "YOUR-MODEL" if model == family else model
    names = ",".join((*best, *references))
    say(f'gripvlm eval --model {name} --tasks jsonl:my.jsonl --keep {100 * asked:g}% --pruners "{names}"')
    say(f"Results: {', '.join(dict.fromkeys(one['report'] for one in known['kinds'].values()))}", "")


def _how_far(scores: dict[str, dict[str, float]], pruners: dict[str, Any]) -> str:
    """The smallest budget at which enough is left, untrained and trained."""
    parts = []
    for trained in (False, True):
        names = [name for name, row in pruners.items() if row["trained"] == trained]
        enough = ""
        for budget, found in scores.items():  # from the largest
            score, name = max(((found[name], name) for name in names if name in found), default=(0.0, ""))
            if score >= ENOUGH:
                enough = f"to {100 * float(budget):g}% ({name})"
        parts.append(f"{'trained' if trained else 'untrained'} {enough or 'at no budget'}")
    return ", ".join(parts)
