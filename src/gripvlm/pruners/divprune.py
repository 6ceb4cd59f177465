"""DivPrune: keep the visual tokens that lie farthest apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import normalize

from gripvlm.pruners.base import Pruner, Selection, VisualTokens

__all__ = ["DivPrune"]


@dataclass(frozen=True)
class DivPrune(Pruner):
    """Max-min diversity (arXiv 2503.02175): find S, |S| = k, with large min_{i, j in S} d(i, j).

    d(i, j) = 1 - cos(x_i, x_j) over the projected rows. Greedy: the first token is
    argmax_i min_{j != i} d(i, j), the one whose nearest other token is farthest; then repeatedly
    the token farthest from those chosen, argmax_i min_{j in S} d(i, j).

    1. One running minimum makes it O(n^2 d) for the distances and O(k n) for the choice, where a
       minimum over all of S at each step would be O(k^2 n). The choice is the same.
    2. k is exact and comes from the budget, not from a ratio alone.
    3. Distances in float32 whatever the dtype. Ties go to the lower index; the first token is often
       one, since two tokens may be each other's nearest. A row of zeros is at distance 1 from all.
    4. Raster order is restored at the end.
    """

    name: ClassVar[str] = "divprune"
    source: ClassVar[str] = "DivPrune, arXiv 2503.02175 (CVPR 2025)"

    def select(self, tokens: VisualTokens) -> Selection:
        rows = normalize(tokens.features.float(), dim=-1)
        cosine = rows @ rows.T  # [n, n]
        distance = 1 - torch.maximum(cosine, cosine.T)  # symmetric to the bit, so that ties are ties
        distance.fill_diagonal_(torch.inf)
        chosen = torch.empty(tokens.keep, dtype=torch.long, device=rows.device)
        chosen[0] = distance.amin(dim=1).argmax()
        nearest = torch.full_like(distance[0], torch.inf)  # [n], distance to the chosen set
        for step in range(1, tokens.keep):
            last = chosen[step - 1 : step]
            nearest = torch.minimum(nearest, distance.index_select(0, last)[0])
            nearest[last] = -torch.inf  # never chosen twice; stays the minimum from here on
            chosen[step] = nearest.argmax()
        return Selection(chosen.sort().values, tokens.n)
