"""HiPrune: objects from a middle block with their surroundings, the rest from the deep block."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gripvlm.pruners.base import Pruner, top_k
from gripvlm.pruners.ops.attention import received_attention
from gripvlm.pruners.ops.ranking import descending, fill_best
from gripvlm.types import Selection, VisualTokens


@dataclass(frozen=True)
class HiPrune(Pruner):
    """Hierarchical attention (arXiv 2508.00553): anchors, buffers and registers.

    Attention is what a token receives, the mean over heads and queries, that of CLS among them. Anchors: the
    round(alpha k / 5) tokens with the most in block `middle`; buffers: the tokens before and after each in the
    raster and a row above and below it, also where these lie at the other end of the next row; what would lie
    outside the raster is its first or last token. Registers: the rest of k, by attention in block `deep`.

    1. Where five tokens an anchor are more than k, as alpha far above 0.1 allows, there are k // 5 anchors:
       the authors' code stops.
    2. The authors count blocks from 1 and call theirs 9 for CLIP's 24 and 16 for Qwen2.5-VL.

    Attributes:
        alpha: share of anchors and buffers, in [0, 1]; halves are rounded to even, as by Python.
        middle: block of the tower, from 0; 8 of CLIP's 24, 15 for Qwen2.5-VL. Another tower needs another.
        deep: -2, the block before the last, whose output LLaVA reads; -1 for Qwen2.5-VL.
    """

    name = "hiprune"
    needs = frozenset({"vision_attention", "grid"})
    source = "HiPrune, arXiv 2508.00553 (ACL Findings 2026)"

    alpha: float = 0.1
    middle: int = 8
    deep: int = -2

    def __post_init__(self) -> None:
        self.require(0 <= self.alpha <= 1, "alpha=0.1, in [0, 1]")

    @property
    def vision_layers(self) -> tuple[int, ...]:  # type: ignore[override]
        return (self.middle, self.deep)

    def select(self, tokens: VisualTokens) -> Selection:
        assert tokens.grid is not None
        deep, k = received_attention(tokens, self.deep), tokens.keep
        # At most k // 5, as each anchor takes four neighbours along.
        anchors = top_k(received_attention(tokens, self.middle), min(k // 5, round(k * self.alpha / 5)))
        kept = torch.zeros_like(deep, dtype=torch.bool)
        # Clamped, not wrapped or dropped: as the authors' code treats neighbours outside of the raster.
        for step in (0, -1, 1, -tokens.grid[1], tokens.grid[1]):
            kept[(anchors + step).clamp(0, tokens.n - 1)] = True
        fill_best(kept, descending(deep), k - int(kept.sum()))
        return Selection(kept.nonzero().flatten(), tokens.n, deep)
