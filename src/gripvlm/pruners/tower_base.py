"""Pruners that merge tokens between the blocks of the vision tower: `TowerPruner`, and what it is asked.

Tensors only, as everywhere in this folder.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from torch import Tensor

from gripvlm.pruners.base import Pruner
from gripvlm.types import Merge, Selection, VisualTokens

__all__ = ["TowerPruner"]


class TowerPruner(Pruner):
    """Merges tokens inside the vision tower, so that its later blocks are shorter too.

    Subclasses are frozen dataclasses, as for `Pruner`. In each block, between attention and MLP, `match` says
    which tokens go into which; the caller makes the mean of each group, weighted by the tokens in it, and leaves
    it at the place of the token that the others went into. All images of a call lose the same number.

    proportional: whether the tower attends to merged tokens by their size (see `gripvlm.models.hooks.proportional`).
    """

    stage: ClassVar[str] = "vision"
    needs: ClassVar[frozenset[str]] = frozenset({"groups"})
    proportional: bool = True

    @abstractmethod
    def plan(self, tokens: int, left: int, blocks: int, fixed: int) -> list[int]:
        """How many tokens each of the blocks merges away, the same for every image.

        Args:
            tokens: those that enter the first block, special ones included.
            left: those that are to leave the last one.
            blocks: whose output counts.
            fixed: special tokens ahead (0 or 1), which stay as they are.

        Returns:
            [blocks] counts with sum tokens - left, each at most half of the free tokens that are there.

        Raises:
            BudgetError: so few cannot be reached; it says how few can.
        """

    @abstractmethod
    def match(self, keys: Tensor, merges: int, fixed: int) -> tuple[Tensor, Tensor]:
        """(source, destination), both [b, merges] places: tokens that go, and those they go into, which stay.

        Args:
            keys: [b, t, d_h] the block's keys, the mean over heads.
            merges: tokens to go.
            fixed: special tokens ahead, neither source nor destination.
        """

    def select(self, tokens: VisualTokens) -> Selection:
        """The rows that others went into, and those that stayed alone; each stands for its group."""
        assert tokens.groups is not None  # promised by `needs`
        indices, slot, size = tokens.groups.unique(return_inverse=True, return_counts=True)
        if indices.numel() == tokens.n:
            return Selection(indices, tokens.n)
        source = (size[slot] > 1).nonzero().flatten()
        return Selection(indices, tokens.n, merge=Merge(source, slot[source], size[slot[source]].float().reciprocal()))
