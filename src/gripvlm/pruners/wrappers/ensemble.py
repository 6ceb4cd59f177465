"""Ensemble: several pruners vote with their rankings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gripvlm.errors import PrunerError
from gripvlm.pruners.base import top_k
from gripvlm.pruners.wrapper_base import Wrapper
from gripvlm.types import Selection, VisualTokens

__all__ = ["Ensemble", "mid_ranks"]


def mid_ranks(scores: Tensor) -> Tensor:
    """[n] ranks, 0 for the lowest of [n] scores; equal scores share the mean of their ranks."""
    _, group, size = scores.unique(return_inverse=True, return_counts=True)  # ascending
    first = size.cumsum(0) - size
    return (first + (size - 1) / 2)[group]


@dataclass(frozen=True)
class Ensemble(Wrapper):
    """Rank average (Borda count): score_i = sum_m w_m rank_m(i) / sum_m w_m, the k highest are kept.

    1. A pruner that only chooses gives its chosen rows one shared rank and all others another.
    2. Merges are dropped.

    Attributes:
        inner: two or more pruners, names or specs; on a command line `ensemble(norm,divprune)`.
        weights: one positive number a pruner; equal by default.
    """

    name: ClassVar[str] = "ensemble"
    source: ClassVar[str] = "wrapper: rank average"

    weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        from gripvlm.pruners.registry import get_pruner

        given = self.inner if isinstance(self.inner, (tuple, list)) else (self.inner,)
        object.__setattr__(self, "inner", tuple(get_pruner(one) for one in given))
        weights = tuple(self.weights) if self.weights is not None else (1.0,) * len(given)
        if len(weights) != len(given) or not all(weight > 0 for weight in weights):
            raise PrunerError(f"ensemble: {len(given)} pruners need {len(given)} positive weights, got {self.weights}")
        object.__setattr__(self, "weights", weights)
        self._refuse_layers()

    def select(self, tokens: VisualTokens) -> Selection:
        assert self.weights is not None  # set when made
        total = torch.zeros(tokens.n, dtype=torch.float64)
        for inner, weight in zip(self.inners, self.weights, strict=True):
            choice = inner.select(tokens)
            votes = choice.scores if choice.scores is not None else choice.mask()
            total += weight * mid_ranks(votes.float().cpu()).double()
        scores = (total / sum(self.weights)).to(tokens.features.device, torch.float32)
        return Selection(top_k(scores, tokens.keep), tokens.n, scores)
