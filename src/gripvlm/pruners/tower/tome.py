"""ToMe: merge the most similar tokens in every block of the vision tower."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gripvlm.errors import BudgetError
from gripvlm.pruners.base import TowerPruner
from gripvlm.pruners.ops.merging import soft_matching


@dataclass(frozen=True)
class ToMe(TowerPruner):
    """Token merging (arXiv 2210.09461, sections 3 and 4.2) inside the vision tower.

    Between attention and MLP of every block, tokens at even places each have one edge, to the token at an odd
    place with the most similar key (cosine, keys averaged over heads); the r strongest edges are merged into
    means weighted by size. Attention is proportional: softmax(q k^T / sqrt(d) + log s), s the tokens in each.

    1. r follows from `keep`: the smallest r for which the blocks merge n - keep tokens in all. Once that many are
       merged the later blocks merge none, so k is exact.
    2. The paper's other schedule, falling from 2r to 0, is not here.
    3. After each block tokens go back to raster order, so even and odd alternate along it; the code puts the odd
       ones behind the even ones that are left. A merged token stands where its odd one stood.
    4. Only blocks whose output the projector reads count; a block merges at most half of its tokens.
    5. The CLS token, where there is one, is never merged, and neither is the patch that stands in its place where a
       model drops the first row of a tower without one.
    6. Projected is each merged token once; what the projector makes of it is the kept row.

    Attributes:
        proportional: False attends to merged tokens as to any other.
    """

    name = "tome"
    source = "ToMe, arXiv 2210.09461 (ICLR 2023)"

    proportional: bool = True

    def plan(self, tokens: int, left: int, blocks: int, fixed: int) -> list[int]:
        merges: list[int] = [0] * blocks
        # The smallest r that merges enough spreads the loss most evenly over the blocks.
        for r in range(tokens + 1):
            merges = self._merges(r, tokens, left, blocks, fixed)
            if sum(merges) == tokens - left:
                return merges
        least = tokens - sum(self._merges(tokens, tokens, 1, blocks, fixed)) - fixed
        raise BudgetError(
            f"{left - fixed} of {tokens - fixed} visual tokens is less than pruner 'tome' can reach: each of the "
            f"tower's {blocks} blocks that count can merge half of its tokens at most; pass keep={least} or more"
        )

    def _merges(self, r: int, tokens: int, left: int, blocks: int, fixed: int) -> list[int]:
        """What each block merges at a rate of r, as far as there are pairs and tokens to lose."""
        merges = []
        for _ in range(blocks):
            merges.append(max(0, min(r, (tokens - fixed) // 2, tokens - left)))
            tokens -= merges[-1]
        return merges

    def match(self, keys: Tensor, merges: int, fixed: int) -> tuple[Tensor, Tensor]:
        return soft_matching(keys, merges, fixed)
