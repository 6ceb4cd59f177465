"""HiPrune: objects from a middle block with their surroundings, the rest from the deep block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from gripvlm.errors import PrunerError
from gripvlm.pruners.base import Pruner, Selection, VisualTokens, top_k
from gripvlm.pruners.saliency import received

__all__ = ["HiPrune"]


@dataclass(frozen=True)
class HiPrune(Pruner):
    """Hierarchical attention (arXiv 2508.00553): anchors, buffers and registers.

    Attention is what a token receives, the mean over heads and queries. Anchors: the floor(alpha k / 5)
    tokens with the most in block `middle`; buffers: their neighbours above, left, right and below.
    Registers: the rest of k, by attention in the block before the last, whose output LLaVA reads.

    1. Neighbours are inside the image: the authors' notebook takes the index before and after, which at
       the end of a row is a token of the next one.
    2. The mean includes the CLS query, where there is one, as in the notebook.
    3. Ties go to the lower index; raster order is restored.

    Attributes:
        alpha: share of anchors and buffers, in [0, 1].
        middle: block of the tower; 9 of CLIP's 24, 16 for Qwen2.5-VL. Another tower needs another.
    """

    name: ClassVar[str] = "hiprune"
    needs: ClassVar[frozenset[str]] = frozenset({"vision_attention", "grid"})
    source: ClassVar[str] = "HiPrune, arXiv 2508.00553 (ACL Findings 2026)"

    alpha: float = 0.1
    middle: int = 9

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise PrunerError(f"hiprune: alpha={self.alpha} must be in [0, 1]: type alpha=0.1")

    @property
    def vision_layers(self) -> tuple[int, ...]:  # type: ignore[override]
        return (self.middle, -2)

    def select(self, tokens: VisualTokens) -> Selection:
        assert tokens.grid is not None  # promised by `needs`
        deep = received(tokens, -2)
        anchors = torch.zeros_like(deep, dtype=torch.bool)
        anchors[top_k(received(tokens, self.middle), int(self.alpha * tokens.keep / 5 + 1e-9))] = True
        middle = anchors.view(tokens.grid)
        kept = middle.clone()
        kept[1:] |= middle[:-1]
        kept[:-1] |= middle[1:]
        kept[:, 1:] |= middle[:, :-1]
        kept[:, :-1] |= middle[:, 1:]
        kept = kept.flatten()
        order = torch.sort(deep, descending=True, stable=True).indices
        kept[order[~kept[order]][: tokens.keep - int(kept.sum())]] = True
        return Selection(kept.nonzero().flatten(), tokens.n, deep)
