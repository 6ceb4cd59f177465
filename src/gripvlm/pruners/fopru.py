"""FoPru: keep the tokens, or the rows of the image, that the vision tower focuses on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gripvlm.errors import PrunerError
from gripvlm.pruners.base import ScorePruner, Selection, VisualTokens, top_k
from gripvlm.pruners.saliency import received

__all__ = ["FoPru"]


@dataclass(frozen=True)
class FoPru(ScorePruner):
    """Focal pruning (arXiv 2411.14164): significance g_j = mean over heads and patches i of A_ij.

    A is the attention of the block before the last. Rank: the k tokens with the largest g. Row: whole
    rows of the raster with the largest sums of g, as many as fit in k.

    1. The paper takes the mean attention received (columns of A) or given (rows), whichever varies more
       over the tokens. Rows of A sum to 1 up to the CLS column, so what is given hardly varies, and in
       towers without a CLS token not at all: here g is always what is received.
    2. The mean includes the CLS query, where there is one: one query of n + 1.
    3. k is exact: what whole rows leave over is filled with the best tokens of the next row.
    4. The paper's row strategy wants a square; any raster does. Ties go to the lower index.

    Attributes:
        strategy: "rank" or "row".
    """

    name: ClassVar[str] = "fopru"
    vision_layers: ClassVar[tuple[int, ...]] = (-2,)
    source: ClassVar[str] = "FoPru, arXiv 2411.14164"

    strategy: str = "rank"

    def __post_init__(self) -> None:
        if self.strategy not in ("rank", "row"):
            raise PrunerError(f"fopru: strategy={self.strategy!r} is unknown: type strategy=rank or strategy=row")

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({"vision_attention"} | ({"grid"} if self.strategy == "row" else set()))

    def score(self, tokens: VisualTokens) -> Tensor:
        return received(tokens, -2)

    def select(self, tokens: VisualTokens) -> Selection:
        if self.strategy == "rank":
            return super().select(tokens)
        assert tokens.grid is not None  # promised by `needs`
        scores = self.score(tokens)
        h, w = tokens.grid
        whole, over = divmod(tokens.keep, w)
        order = torch.sort(scores.view(h, w).sum(dim=1), descending=True, stable=True).indices
        mask = torch.zeros(h, w, dtype=torch.bool, device=scores.device)
        mask[order[:whole]] = True
        if over:
            following = order[whole]
            mask[following, top_k(scores.view(h, w)[following], over)] = True
        return Selection(mask.flatten().nonzero().flatten(), tokens.n, scores)
