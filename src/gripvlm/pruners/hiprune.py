"""HiPrune: objects from a middle block with their surroundings, the rest from the deep block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gripvlm.errors import PrunerError
from gripvlm.pruners.base import Pruner, Selection, VisualTokens
from gripvlm.pruners.saliency import received

__all__ = ["HiPrune"]


@dataclass(frozen=True)
class HiPrune(Pruner):
    """Hierarchical attention (arXiv 2508.00553): anchors, buffers and registers.

    Attention is what a token receives, the mean over heads and queries. Anchors: the tokens with the
    most in block `middle`; buffers: their neighbours above, left, right and below. Together they are
    round(alpha k) tokens. Registers: the rest of k, by attention in the last block.

    1. Anchors come in the order of attention, each followed by its buffers (in raster order) that are
       inside the image and not chosen yet, until the number is reached; how the code shares the
       number out between anchors and buffers was not available to us.
    2. The mean includes the CLS query, where there is one.
    3. Ties go to the lower index; raster order is restored.

    Attributes:
        alpha: in [0, 1].
        middle: block of the tower; the paper's 9 of CLIP's 24. Another tower needs another.
    """

    name: ClassVar[str] = "hiprune"
    needs: ClassVar[frozenset[str]] = frozenset({"vision_attention", "grid"})
    source: ClassVar[str] = "HiPrune, arXiv 2508.00553"

    alpha: float = 0.1
    middle: int = 9

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise PrunerError(f"hiprune: alpha={self.alpha} must be in [0, 1]: type alpha=0.1")

    @property
    def vision_layers(self) -> tuple[int, ...]:  # type: ignore[override]
        return (self.middle, -1)

    def select(self, tokens: VisualTokens) -> Selection:
        assert tokens.grid is not None  # promised by `needs`
        kept = torch.zeros(tokens.n, dtype=torch.bool, device=tokens.features.device)
        first = int(self.alpha * tokens.keep + 0.5)
        kept[around(received(tokens, self.middle), tokens.grid)[:first]] = True
        deep = received(tokens, -1)
        order = torch.sort(deep, descending=True, stable=True).indices
        kept[order[~kept[order]][: tokens.keep - first]] = True
        return Selection(kept.nonzero().flatten(), tokens.n, deep)


def around(scores: Tensor, grid: tuple[int, int]) -> Tensor:
    """[n] all tokens, each as soon as it or a neighbour comes up in the order of falling scores."""
    h, w = grid
    order = torch.sort(scores, descending=True, stable=True).indices
    y, x = order // w, order % w
    near = torch.stack((y, y - 1, y, y, y + 1), 1), torch.stack((x, x, x - 1, x + 1, x), 1)
    inside = (near[0] >= 0) & (near[0] < h) & (near[1] >= 0) & (near[1] < w)
    listed = (near[0] * w + near[1])[inside]  # in order; each token up to five times
    place = torch.full((h * w,), listed.numel(), device=scores.device)
    place.scatter_reduce_(0, listed, torch.arange(listed.numel(), device=scores.device), "amin")
    return place.argsort()
