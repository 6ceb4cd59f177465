"""`gripvlm list`: pruners with what was measured of them, tasks, and what to take.

All of it is in measured.json, which `python -m experiments.lab_grid.measured` writes and a test compares with the
code: a list that is read in a moment must not import PyTorch. Only pruners of other packages are loaded, where there
are any.
"""

from __future__ import annotations

import json
import textwrap
from importlib.metadata import entry_points
from importlib.resources import files
from typing import Any

from gripvlm.cli.commands import console

__all__ = ["list_command"]

WIDTHS = (14, 7, 11, 10, 14, 8)
HEADS = ("pruner", "drops", "attention", "question", "lab score", "time")
PLACES = {"input": "input", "llm": "LLM", "vision": "tower"}
PLUGINS = "gripvlm.pruners"


def list_command() -> None:
    """Pruners: where each drops, what it reads, scores and costs; which to take; and the tasks."""
    known = json.loads(files("gripvlm.cli").joinpath("measured.json").read_text(encoding="utf-8"))
    screen = console()
    wide = max(40, screen.width)

    def say(text: str, style: str = "", indent: str = "") -> None:
        told = textwrap.fill(
            text, wide, initial_indent=indent, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
        )
        screen.print(told, style=style, markup=False, soft_wrap=True)

    screen.print(_line(HEADS), style="bold", soft_wrap=True)
    for name, row in known["pruners"].items():
        screen.print(_line((name, *_cells(row))), soft_wrap=True)
        say(_told(name, row), "dim", "    ")
    screen.print()
    prefill, from_ = known["prefill"], ", ".join(known["files"])
    say(
        "drops: before the LLM (input), inside the LLM, or by merging in the vision tower. attention: reads the "
        "vision tower's. question: sees it, so that it chooses anew for each. inner: as the pruner in parentheses. "
        f"lab score: mean over {known['questions']} of the lab's questions in percent, at the share of the tokens in "
        "brackets; README's scores are of the whole test sample and differ a little, and the lab's small model ranks "
        f"pruners its own way. time: of the pruner alone, as a share of the prefill of one image of "
        f"{prefill['tokens']} tokens by a language model of {prefill['parameters'] / 1e9:.1f} B weights on "
        f"{prefill['device']}. "
        f"-: not measured. From {from_}; for your model type `gripvlm eval` and `gripvlm bench`."
    )
    screen.print("\nWhich one?", style="bold")
    for sentence in known["advice"]:
        say(sentence)
    screen.print()
    say("options are typed as name:option=value, such as random:seed=3; wrappers around others: mmr(norm)")
    say("in `eval` also: oracle (each lab question's own evidence); full and no image are always there")
    say(f"tasks: {', '.join(known['tasks'])}, hf:REPO, jsonl:PATH")
    if others := {point.name for point in entry_points(group=PLUGINS)} - known["pruners"].keys():
        from gripvlm.pruners import list_pruners

        say("of other packages:", "bold")
        for one in list_pruners():
            if one.fault:
                say(one.fault)
            elif one.name in others:
                options = ", ".join(str(option) for option in one.options)
                say(f"{one.name}: {one.source or one.stage}" + (f"; options {options}" if options else ""))


def _line(cells: tuple[str, ...]) -> str:
    return "".join(f"{cell:<{width}}" for cell, width in zip(cells, WIDTHS, strict=True)).rstrip()


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    reads = ["inner" if row["wraps"] else "yes" if row[what] else "no" for what in ("attention", "question")]
    score = f"{100 * row['score']:.1f} ({100 * row['keep']:g}%)" if "score" in row else "-"
    time = f"{100 * row['prefill_share']:.2g}%" if "prefill_share" in row else "-"
    return PLACES[row["stage"]], *reads, score, time


def _told(name: str, row: dict[str, Any]) -> str:
    """Where it comes from, what else it needs, its options, and as what its score was measured."""
    spec = row.get("measured_as", name)
    parts = (
        row["source"],
        "trained for one model" if row["trained"] else "",
        "needs a plain raster" if row["grid"] else "",
        f"options {', '.join(row['options'])}" if row["options"] else "",
        f"score of {spec}" if spec != name else "",
    )
    return "; ".join(filter(None, parts))
