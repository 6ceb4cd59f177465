"""FoPru: keep the tokens, or the rows of the image, that the vision tower focuses on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gripvlm.pruners.base import ScorePruner, top_k
from gripvlm.pruners.ops.attention import received_attention
from gripvlm.pruners.ops.ranking import descending
from gripvlm.types import Selection, VisualTokens

SIGNIFICANCE = ("variance", "received", "given")


@dataclass(frozen=True)
class FoPru(ScorePruner):
    """Focal pruning (arXiv 2411.14164): keep the tokens of largest significance g.

    A is the attention among patches in the block before the last, the mean over heads, without the CLS token's
    row and column. u_j = mean_i A_ij is what patch j receives, v_i = mean_j A_ij what patch i gives; g is u
    where Var(u) > Var(v) over the tokens, else v. Rank: the k tokens with the largest g. Row: whole rows of the
    raster with the largest sums of g, as many as fit in k.

    1. A row made of several patches has their means of u and v. In towers without a CLS token v is 1 / n for all,
       so g is u.
    2. k is exact: what whole rows leave over is filled with the best tokens of the next row.
    3. The paper's row strategy wants a square; any raster does. Ties go to the lower index.

    Attributes:
        strategy: "rank" or "row".
        significance: "variance" for the rule above, "received" for u and "given" for v.
    """

    name = "fopru"
    vision_layers = (-2,)
    source = "FoPru, arXiv 2411.14164"

    strategy: str = "rank"
    significance: str = "variance"

    def __post_init__(self) -> None:
        self.require(self.significance in SIGNIFICANCE, f"significance={'|'.join(SIGNIFICANCE)}")
        self.require(self.strategy in ("rank", "row"), "strategy=rank or strategy=row")

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({"vision_attention", "vision_given"} | ({"grid"} if self.strategy == "row" else set()))

    def score(self, tokens: VisualTokens) -> Tensor:
        rows = tokens.vision[-2]
        # Without a CLS token all that patches give goes to patches, so each gives the same.
        if rows.given is None or rows.patch_received is None:
            took = received_attention(tokens, -2)
            gave = torch.full_like(took, 1 / tokens.n)
        else:
            took, gave = rows.patch_received.float().mean(dim=0), rows.given.float().mean(dim=0)
        if self.significance == "variance":
            return took if took.var(correction=0) > gave.var(correction=0) else gave
        return took if self.significance == "received" else gave

    def select(self, tokens: VisualTokens) -> Selection:
        if self.strategy == "rank":
            return super().select(tokens)
        assert tokens.grid is not None
        scores = self.score(tokens)
        by_row = scores.view(tokens.grid)
        whole, over = divmod(tokens.keep, tokens.grid[1])
        order = descending(by_row.sum(dim=1))
        rows = torch.arange(tokens.n, device=scores.device).view(tokens.grid)
        indices = rows[order[:whole]].flatten()
        if over:
            row = order[whole]
            indices = torch.cat((indices, rows[row][top_k(by_row[row], over)]))
        return Selection(indices.sort().values, tokens.n, scores)
