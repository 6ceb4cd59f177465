"""Keep every visual token: the reference that all others are measured against."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gripvlm.errors import BudgetError
from gripvlm.pruners.base import Pruner
from gripvlm.types import Selection, VisualTokens


@dataclass(frozen=True)
class KeepAll(Pruner):
    """Keep every visual token: the logits are those of the untouched model, bit for bit.

    `keep` can be left away. Any budget below n is refused, since it could not be met.
    `full`, as tables call it, is another name of it.

    Raises:
        BudgetError: a budget below n.
    """

    name = "keep_all"
    needs = frozenset()
    source = "no pruning"
    default_keep = 1.0

    def select(self, tokens: VisualTokens) -> Selection:
        if tokens.keep < tokens.n:
            raise self.refused(f"a budget of {tokens.keep} of {tokens.n}")
        return Selection(torch.arange(tokens.n, device=tokens.features.device), tokens.n, sound=True)

    def refused(self, budget: str) -> BudgetError:
        """The error for a budget that would drop tokens."""
        return BudgetError(
            f"pruner {self.name!r} keeps every visual token, so {budget} cannot be met: leave keep out (or pass "
            "1.0), or choose a pruner that drops tokens, such as divprune"
        )


@dataclass(frozen=True)
class Full(KeepAll):
    """`keep_all` under the name that results give it."""

    name = "full"
    source = "no pruning: alias of keep_all"
