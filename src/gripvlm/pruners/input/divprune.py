"""DivPrune: keep the visual tokens that lie farthest apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gripvlm.pruners.ops.pairwise import GreedyPruner, padding_of
from gripvlm.types import VisualTokens


@dataclass(frozen=True)
class DivPrune(GreedyPruner):
    """Max-min diversity (arXiv 2503.02175): find S, |S| = k, with large min_{i, j in S} d(i, j).

    d(i, j) = 1 - cos(x_i, x_j) over the projected rows. Greedy: the first token is
    argmax_i min_{j != i} d(i, j), the one whose nearest other token is farthest; then repeatedly
    the token farthest from those chosen, argmax_i min_{j in S} d(i, j).

    1. One running minimum makes it O(n^2 d) for the distances and O(k n) for the choice, where a
       minimum over all of S at each step would be O(k^2 n). The choice is the same.
    2. The first token is often a tie, since two tokens may be each other's nearest. A row of zeros is at distance 1
       from all.
    """

    name = "divprune"
    source = "DivPrune, arXiv 2503.02175 (CVPR 2025)"

    def pick(self, images: Sequence[VisualTokens], rows: Sequence[Tensor], cosine: Tensor) -> Tensor:
        distance = cosine.neg_().add_(1)  # [B, n, n], in place: it may be half a gigabyte
        padding = padding_of(images)
        if any(tokens.n < padding.shape[1] for tokens in images):
            distance.masked_fill_(padding[:, None], torch.inf)
        distance.diagonal(dim1=1, dim2=2).fill_(torch.inf)
        batch = torch.arange(len(images), device=distance.device)
        most = max(tokens.keep for tokens in images)
        picks = torch.empty(len(images), most, dtype=torch.long, device=distance.device)
        # The paper's first token: the one whose nearest other token is farthest.
        picks[:, 0] = distance.amin(dim=2).masked_fill(padding, -torch.inf).argmax(dim=1)
        nearest = torch.full_like(distance[:, 0], torch.inf).masked_fill(padding, -torch.inf)  # [B, n], to the picked
        for step in range(1, most):
            last = picks[:, step - 1]
            nearest = torch.minimum(nearest, distance[batch, last])
            nearest.scatter_(1, last[:, None], -torch.inf)  # never picked twice; stays the minimum from here on
            picks[:, step] = nearest.argmax(dim=1)
        return picks
