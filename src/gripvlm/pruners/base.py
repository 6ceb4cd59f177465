"""The base classes of pruners, and ranking.

Tensors only: nothing in this folder knows transformers or any model family.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from gripvlm.errors import PrunerError
from gripvlm.types import Selection, VisualTokens
from gripvlm.utils.batching import onto

__all__ = [
    "NEEDS",
    "Pruner",
    "ScorePruner",
    "top_k",
    "top_k_of_each",
]

NEEDS = frozenset({"features", "grid", "question", "key", "vision_attention", "vision_given", "patches", "groups"})
"""Everything a pruner may name in `needs`; what it does not name may be None, 0 or empty."""


def top_k(scores: Tensor, k: int) -> Tensor:
    """[k] indices of the k largest of [n] scores, ascending; among equals the lower index wins."""
    order = torch.sort(scores, descending=True, stable=True).indices
    return order[:k].sort().values


def top_k_of_each(scores: Tensor, counts: Sequence[int]) -> list[Tensor]:
    """`top_k` of each row of [B, n] scores, with a count of its own, in two sorts for all rows."""
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices
    ranks = torch.arange(scores.shape[1], device=scores.device)
    dropped = torch.ones_like(order).scatter_(-1, order, (ranks >= onto(list(counts), scores.device)[:, None]).long())
    places = torch.sort(dropped, dim=-1, stable=True).indices
    return [row[:count] for row, count in zip(places, counts, strict=True)]


class Pruner(ABC):
    """Chooses k of n visual tokens, one image at a time.

    Subclasses are frozen dataclasses, one a file, and state their class attributes:

    name: the registry name, snake_case.
    needs: which fields of `VisualTokens` they read (see `NEEDS`).
    vision_layers: blocks of the vision tower whose attention they read (with "vision_attention" in
        `needs`); negative numbers count from the last. LLaVA's features come out of -2.
    stage: where rows are dropped; "input" means before the language model's first layer, "llm" inside
        it (see `LLMPruner`), "vision" inside the vision tower (see `TowerPruner`).
    source: the paper, in one line.
    trained: whether it has weights that were trained for pruning.
    default_keep: the budget when `keep` is left away; None means that `keep` must be given.
    """

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset({"features"})
    vision_layers: ClassVar[tuple[int, ...]] = ()
    stage: ClassVar[str] = "input"
    source: ClassVar[str] = ""
    trained: ClassVar[bool] = False
    default_keep: ClassVar[float | None] = None

    def check(self, model: Any) -> None:  # noqa: B027
        """Raises a `GripError` where this pruner cannot serve `model`. Called when it is attached."""

    @abstractmethod
    def select(self, tokens: VisualTokens) -> Selection:
        """Exactly `tokens.keep` rows of `tokens`. The caller checks the result, for all pruners."""

    def allocate_budget(self, sample: Sequence[VisualTokens]) -> Sequence[int]:
        """The rows to keep of each of a prompt's images; their sum is that of the budgets asked for.

        By default what was asked for. Pruners that split a budget among images or tiles override it.
        """
        return [tokens.keep for tokens in sample]

    def select_batch(self, images: Sequence[VisualTokens]) -> list[Selection]:
        """`select` for all images of a batch; override it where they are faster together."""
        return [self.select(tokens) for tokens in images]


class ScorePruner(Pruner):
    """A pruner that ranks: implement `score`, and the k highest are kept."""

    @abstractmethod
    def score(self, tokens: VisualTokens) -> Tensor:
        """[n] floats, higher is kept. Ties go to the lower index."""

    def select(self, tokens: VisualTokens) -> Selection:
        scores = self.score(tokens)
        if not isinstance(scores, Tensor) or scores.shape != (tokens.n,):
            got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise PrunerError(f"pruner {self.name!r}: score() must return a tensor ({tokens.n},), got {got}")
        return Selection(top_k(scores, tokens.keep), tokens.n, scores, sound=True)
