"""DivPrune: keep the visual tokens that lie farthest apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from gripvlm.pruners.base import Pruner
from gripvlm.pruners.ops.pairwise import batches, cosines
from gripvlm.types import Selection, VisualTokens
from gripvlm.utils.batching import padded

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
        return self.select_batch([tokens])[0]

    def select_batch(self, images: Sequence[VisualTokens]) -> list[Selection]:
        return [selection for some in batches(images) for selection in self._select(some)]

    def _select(self, images: Sequence[VisualTokens]) -> list[Selection]:
        distance = cosines(images).neg_().add_(1)  # [B, n, n]
        empty = padded([torch.zeros_like(tokens.features[:, 0], dtype=torch.bool) for tokens in images], True)
        if any(tokens.n < empty.shape[1] for tokens in images):
            distance.masked_fill_(empty[:, None], torch.inf)
        distance.diagonal(dim1=1, dim2=2).fill_(torch.inf)
        row = torch.arange(len(images), device=distance.device)
        most = max(tokens.keep for tokens in images)
        chosen = torch.empty(len(images), most, dtype=torch.long, device=distance.device)
        chosen[:, 0] = distance.amin(dim=2).masked_fill(empty, -torch.inf).argmax(dim=1)
        nearest = torch.full_like(distance[:, 0], torch.inf).masked_fill(empty, -torch.inf)  # [B, n], to the chosen
        for step in range(1, most):
            last = chosen[:, step - 1]
            nearest = torch.minimum(nearest, distance[row, last])
            nearest.scatter_(1, last[:, None], -torch.inf)  # never chosen twice; stays the minimum from here on
            chosen[:, step] = nearest.argmax(dim=1)
        return [
            Selection(picks[: tokens.keep].sort().values, tokens.n, sound=True)
            for picks, tokens in zip(chosen, images, strict=True)
        ]
