"""`gripvlm list`: pruners with what was measured of them, and tasks."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from gripvlm.cli.commands import console

if TYPE_CHECKING:
    from gripvlm.pruners.options import Option
    from gripvlm.pruners.registry import PrunerRow

__all__ = ["list_command"]

WIDTHS = (13, 8, 12, 7)  # of the columns before the source


def list_command() -> None:
    """Pruners: what each needs, scores and costs, and where it comes from; and the tasks."""
    from gripvlm.pruners import list_pruners
    from gripvlm.tasks import task_names

    measured = json.loads(files("gripvlm.cli").joinpath("measured.json").read_text(encoding="utf-8"))
    screen = console()
    screen.print(_line("pruner", "drops at", "lab score", "time", "source"), style="bold")
    for row in list_pruners():
        if row.fault:
            screen.print(row.fault, markup=False)
            continue
        found = measured["pruners"].get(row.name, {})
        screen.print(_line(row.name, row.stage, _score(found), _time(found), row.source))
        if told := _told(row, found):
            screen.print(Padding(Text(told, style="dim"), (0, 0, 0, 4)))
    prefill, where = measured["prefill"], ", ".join(f"results/{name}.json" for name in measured["files"])
    screen.print(
        "\nlab score: mean over the lab's tasks in percent, at the share of the tokens in brackets; the lab's small "
        "model ranks pruners its own way. time: of the pruner alone, as a share of the prefill of one image of "
        f"{prefill['tokens']} tokens by a language model of {prefill['parameters'] / 1e9:.1f} B weights on "
        f"{prefill['device']}. -: not measured. From {where}; for your model type `gripvlm eval` and `gripvlm bench`."
    )
    screen.print("options are typed as name:option=value, such as random:seed=3; wrappers around others: mmr(norm)")
    screen.print("in `eval` also: oracle (each lab question's own evidence); full and no image are always there")
    screen.print(f"tasks: {', '.join(task_names())}, hf:REPO, jsonl:PATH")


def _line(*cells: str) -> Table:
    """One line of the list, whose last cell takes what is left of the width."""
    line = Table.grid(padding=(0, 2, 0, 0), expand=True)
    for width in WIDTHS:
        line.add_column(min_width=width, no_wrap=True)
    line.add_column(ratio=1)
    line.add_row(*map(Text, cells))
    return line


def _score(found: dict[str, Any]) -> str:
    return f"{100 * found['score']:.1f} ({100 * found['keep']:g}%)" if "score" in found else "-"


def _time(found: dict[str, Any]) -> str:
    return f"{100 * found['prefill_share']:.2g}%" if "prefill_share" in found else "-"


def _told(row: PrunerRow, found: dict[str, Any]) -> str:
    """What it needs, whether it is trained, its options, and as what its score was measured."""
    wraps = [option for option in row.options if option.kind is Any and option.required]  # typed in parentheses
    options = ", ".join(_option(option) for option in row.options if option not in wraps)
    spec = found.get("measured_as", row.name)
    parts = (
        "needs " + ", ".join(dict.fromkeys([*row.needs, *row.layer_needs])) if row.needs or row.layer_needs else "",
        "trained" if row.trained else "",
        f"options {options}" if options else "",
        f"score of {spec}" if spec != row.name else "",
    )
    return "; ".join(filter(None, parts))


def _option(option: Option) -> str:
    return str(option) if option.typeable else f"{option.name}: from Python"
