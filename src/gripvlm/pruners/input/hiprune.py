"""HiPrune: objects from a middle block with their surroundings, the rest from the deep block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from gripvlm.errors import PrunerError
from gripvlm.pruners.base import Pruner, top_k
from gripvlm.pruners.ops.saliency import received
from gripvlm.types import Selection, VisualTokens

__all__ = ["HiPrune"]


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
    3. Ties go to the lower index; raster order is restored.

    Attributes:
        alpha: share of anchors and buffers, in [0, 1]; halves are rounded to even, as by Python.
        middle: block of the tower, from 0; 8 of CLIP's 24, 15 for Qwen2.5-VL. Another tower needs another.
        deep: -2, the block before the last, whose output LLaVA reads; -1 for Qwen2.5-VL.
    """

    name: ClassVar[str] = "hiprune"
    needs: ClassVar[frozenset[str]] = frozenset({"vision_attention", "grid"})
    source: ClassVar[str] = "HiPrune, arXiv 2508.00553 (ACL Findings 2026)"

    alpha: float = 0.1
    middle: int = 8
    deep: int = -2

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise PrunerError(f"hiprune: alpha={self.alpha} must be in [0, 1]: type alpha=0.1")

    @property
    def vision_layers(self) -> tuple[int, ...]:  # type: ignore[override]
        return (self.middle, self.deep)

    def select(self, tokens: VisualTokens) -> Selection:
        assert tokens.grid is not None  # promised by `needs`
        deep, k = received(tokens, self.deep), tokens.keep
        anchors = top_k(received(tokens, self.middle), min(k // 5, round(k * self.alpha / 5)))
        kept = torch.zeros_like(deep, dtype=torch.bool)
        for step in (0, -1, 1, -tokens.grid[1], tokens.grid[1]):
            kept[(anchors + step).clamp(0, tokens.n - 1)] = True
        order = torch.sort(deep, descending=True, stable=True).indices
        kept[order[~kept[order]][: k - int(kept.sum())]] = True
        return Selection(kept.nonzero().flatten(), tokens.n, deep)
