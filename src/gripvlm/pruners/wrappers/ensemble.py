"""Ensemble: several pruners vote with their rankings."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gripvlm.pruners.base import Wrapper, top_k
from gripvlm.types import Selection, VisualTokens


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

    name = "ensemble"
    source = "wrapper: rank average"
    many = True

    weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        count = len(self.inner)
        valid = self.weights is None or (len(self.weights) == count and all(weight > 0 for weight in self.weights))
        self.require(valid, f"weights=({', '.join(['1'] * count)}), one above 0 for each of the {count} pruners")

    def select(self, tokens: VisualTokens) -> Selection:
        weights = self.weights or (1.0,) * len(self.inner)
        # In float64: equal sums of ranks must stay equal, as ties go to the lower index.
        total = torch.zeros(tokens.n, dtype=torch.float64)
        for inner, weight in zip(self.inners, weights, strict=True):
            choice = inner.select(tokens)
            # A set without scores: its rows share the upper rank, all others the lower one.
            votes = choice.scores if choice.scores is not None else choice.mask()
            total += weight * mid_ranks(votes.float().cpu()).double()
        scores = (total / sum(weights)).to(tokens.features.device, torch.float32)
        return Selection(top_k(scores, tokens.keep), tokens.n, scores)
