"""`--pruners all`: every pruner that can serve a model at some budgets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gripvlm.budget import Budget
from gripvlm.engine.request import checked_pruner
from gripvlm.errors import GripError
from gripvlm.pruners import LLMPruner, list_pruners

__all__ = ["LEFT", "serving"]

LEFT = {
    "full": "always measured",
    "keep_all": "full by another name",
    "given": "needs scores of your own",
    "tome": "its smallest budget depends on the tower: type it by name",
}
"""Names that `all` does not stand for, and why; wrappers around other pruners are typed by name too."""
TOKENS = 576
"""Tokens of the image on which the schedules of pruners inside the language model are tried."""


def serving(model: Any, budgets: Sequence[Budget]) -> tuple[list[str], dict[str, str]]:
    """Names of pruners that this model can run at one of these budgets or more, and why each other one cannot."""
    names, left = [], dict(LEFT)
    layers = len(getattr(model.get_decoder(), "layers", ()))
    for row in list_pruners():
        if row.name in left:
            continue
        try:
            pruner = checked_pruner(row.name, model)
            if isinstance(pruner, LLMPruner):
                largest = max(budget.count(TOKENS) for budget in budgets)
                pruner.schedule(TOKENS, largest, layers)
        except GripError as why:
            left[row.name] = str(why)
        else:
            names.append(row.name)
    return names, left
