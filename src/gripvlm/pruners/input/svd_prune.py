"""SVD-Prune: keep the visual tokens that carry the leading singular subspace of the image."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gripvlm.pruners.base import ScorePruner
from gripvlm.types import VisualTokens


@dataclass(frozen=True)
class SVDPrune(ScorePruner):
    """Leverage scores (arXiv 2604.11530): F = U S V^T, score_i = ||U_{i, 1..r}||^2 / r.

    r is the smallest rank with sum_{j <= r} s_j^2 >= energy x sum_j s_j^2. The scores sum to 1 (to 0 where all rows
    are zero).

    1. U comes from the eigenvectors of the smaller of F F^T and F^T F. Directions below 1e-6 of the largest eigenvalue
       count as absent.
    2. F is the projected rows, not centred; what the paper does is not known.
    3. The paper's adaptive count, the smallest set whose scores sum to `energy`, is not here: budgets are exact.

    Attributes:
        energy: the share of the squared singular values to reach, in (0, 1].
    """

    name = "svd_prune"
    source = "SVD-Prune, arXiv 2604.11530"

    energy: float = 0.9

    def __post_init__(self) -> None:
        self.require(0 < self.energy <= 1, "energy=0.9, in (0, 1]")

    def score(self, tokens: VisualTokens) -> Tensor:
        rows = tokens.features.float()
        # The smaller of the two Gram matrices has all directions, and is far cheaper to decompose than F.
        wide = rows.shape[0] <= rows.shape[1]
        values, vectors = torch.linalg.eigh(rows @ rows.T if wide else rows.T @ rows)
        values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)  # descending
        present = (values > values[0] * 1e-6) & (values > 0)
        # Shares are compared up to rounding: energy=1 must be reached by the last direction.
        reached = values.cumsum(0) >= self.energy * values.sum() * (1 - 1e-6)
        r = min(int(reached.long().argmax()) + 1, int(present.sum()))
        left = vectors[:, :r] if wide else rows @ vectors[:, :r] / values[:r].sqrt()
        return left.square().sum(dim=1) / max(r, 1)
