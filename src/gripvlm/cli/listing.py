"""`gripvlm list`: pruners with their measurements, tasks, and recommendations.

Everything comes from measured.json, so that the command need not import PyTorch, which takes seconds. A script writes
the file from results, and a test compares it with the code. Only pruners of other packages are imported.
"""

from __future__ import annotations

import json
from importlib.metadata import entry_points
from importlib.resources import files
from typing import Any

from rich.console import Console

from gripvlm.cli.commands import console
from gripvlm.utils.terminal import filled

COLUMNS = {"pruner": 14, "drops": 6, "attention": 10, "question": 9, "lab score": 13, "time": 8}
"""Heading -> width; they fit into 60 columns."""
STAGES = {"input": "input", "llm": "LLM", "vision": "tower", "pixels": "pixels"}
PLUGINS = "gripvlm.pruners"


def measured() -> dict[str, Any]:
    """measured.json."""
    return json.loads(files("gripvlm.cli").joinpath("measured.json").read_text(encoding="utf-8"))


def list_command() -> None:
    """Pruners: where each drops, what it reads, scores and costs; which to take; and the tasks."""
    known, screen = measured(), console()
    screen.print(_line(list(COLUMNS)), style="bold", soft_wrap=True)
    for name, row in known["pruners"].items():
        screen.print(_line([name, *_cells(row)]), soft_wrap=True)
        _print(screen, _details(name, row), "dim", "    ")
    screen.print()
    _print(screen, _legend(known))
    screen.print("\nWhich one?", style="bold")
    for sentence in known["advice"]:
        _print(screen, sentence)
    screen.print()
    _print(screen, "type options as name:option=value, such as random:seed=3, and wrappers as mmr(norm)")
    _print(
        screen,
        "in `eval` also: downsample (a smaller picture), oracle (keeps the evidence of each lab question); full and no "
        "image are always measured",
    )
    _print(screen, f"tasks: {', '.join(known['tasks'])}, hf:REPO, jsonl:PATH")
    # Entry points are read without an import of their modules.
    others = {point.name for point in entry_points(group=PLUGINS)} - known["pruners"].keys()
    if others:
        _print_others(screen, others)


def _print_others(screen: Console, names: set[str]) -> None:
    from gripvlm.pruners import list_pruners

    _print(screen, "of other packages:", "bold")
    for pruner in list_pruners():
        if pruner.fault:
            _print(screen, pruner.fault)
        elif pruner.name in names:
            options = f"; options {', '.join(map(str, pruner.options))}" if pruner.options else ""
            _print(screen, f"{pruner.name}: {pruner.source or pruner.stage}{options}")


def _print(screen: Console, text: str, style: str = "", indent: str = "") -> None:
    # soft_wrap: the text is filled already, and rich would break it again
    screen.print(filled(text, indent), style=style, markup=False, soft_wrap=True)


def _line(cells: list[str]) -> str:
    return "".join(f"{cell:<{width}}" for cell, width in zip(cells, COLUMNS.values(), strict=True)).rstrip()


def _cells(row: dict[str, Any]) -> list[str]:
    reads = ["inner" if row["wraps"] else "yes" if row[what] else "no" for what in ("attention", "question")]
    score = f"{100 * row['score']:.1f} ({100 * row['keep']:g}%)" if "score" in row else "-"
    time = f"{100 * row['prefill_share']:.2g}%" if "prefill_share" in row else "-"
    return [STAGES[row["stage"]], *reads, score, time]


def _details(name: str, row: dict[str, Any]) -> str:
    """Its source, what else it needs, its options, and the spec with which its score was measured."""
    spec = row.get("measured_as", name)
    parts = (
        row["source"],
        "trained for one model" if row["trained"] else "",
        "needs rasters" if row["grid"] else "",
        f"options {', '.join(row['options'])}" if row["options"] else "",
        f"score of {spec}" if spec != name else "",
    )
    return "; ".join(filter(None, parts))


def _legend(known: dict[str, Any]) -> str:
    prefill, sources = known["prefill"], ", ".join(known["files"])
    return (
        "drops: before the LLM (input), inside the LLM, or inside the vision tower. attention: reads the "
        "vision tower's. question: reads it, and selects again for each question. inner: as the pruner in parentheses. "
        f"lab score: mean over {known['questions']} of the lab's questions in percent, at the share of the tokens in "
        "brackets; experiments/grip_shipped has scores of the whole test sample, which differ a little, and the lab's "
        f"small model ranks pruners its own way. time: of the pruner alone, as a share of the prefill of one image of "
        f"{prefill['tokens']} tokens by a language model of {prefill['parameters'] / 1e9:.1f} B weights on "
        f"{prefill['device']}. -: not measured. From {sources}; for your model type `gripvlm eval` and `gripvlm bench`."
    )
