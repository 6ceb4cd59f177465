"""SVD-Prune: keep the visual tokens that carry the leading singular subspace of the image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gripvlm.pruners.base import ScorePruner
from gripvlm.pruners.ops.apportion import apportion
from gripvlm.types import VisualTokens


@dataclass(frozen=True)
class SVDPrune(ScorePruner):
    """Leverage scores (arXiv 2604.11530): F = U S V^T, score_i = ||U_{i, 1..r}||^2 / r.

    r is the smallest rank with sum_{j <= r} s_j^2 >= energy x sum_j s_j^2. The scores sum to 1.
    Fixed: the k tokens with the largest scores. Adaptive: the smallest set whose scores sum to at
    least `energy`; `count` says how many that is.

    1. U comes from the eigenvectors of the smaller of F F^T and F^T F, in float32. Directions below
       1e-6 of the largest eigenvalue count as absent.
    2. F is the projected rows, centred only if `centre`; which of these the paper means is not known.
    3. A budget is exact here, so `adaptive` does not change one image's count: it shares the rows
       that are kept in a prompt out to its images in proportion to `count`. For the paper's own
       counts pass them as budgets: `keep=[[pruner.count(t.features) for t in s] for s in tokens]`,
       with tokens from `gripvlm.prune.visual_tokens`.

    Attributes:
        energy: the share of the squared singular values to reach, in (0, 1].
        rank: r itself, instead of one from `energy`; at most the rank of F is used.
        centre: subtract the mean row first.
        adaptive: see 3.
    """

    name = "svd_prune"
    source = "SVD-Prune, arXiv 2604.11530"

    energy: float = 0.9
    rank: int | None = None
    centre: bool = False
    adaptive: bool = False

    def __post_init__(self) -> None:
        valid = 0 < self.energy <= 1 and (self.rank is None or self.rank >= 1)
        self.require(valid, "energy=0.9, in (0, 1], and rank=8, at least 1")

    def leverage(self, features: Tensor) -> Tensor:
        """[n] scores of [n, d] rows, summing to 1 (to 0 where all rows are zero)."""
        rows = features.float()
        if self.centre:
            rows = rows - rows.mean(dim=0)
        # The smaller of the two Gram matrices has all directions, and is far cheaper to decompose than F.
        wide = rows.shape[0] <= rows.shape[1]
        values, vectors = torch.linalg.eigh(rows @ rows.T if wide else rows.T @ rows)
        values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)  # descending
        # Shares are compared up to rounding: energy=1 must be reached by the last direction.
        present = (values > values[0] * 1e-6) & (values > 0)
        reached = values.cumsum(0) >= self.energy * values.sum() * (1 - 1e-6)
        r = self.rank if self.rank is not None else int(reached.long().argmax()) + 1
        r = min(r, int(present.sum()))
        left = vectors[:, :r] if wide else rows @ vectors[:, :r] / values[:r].sqrt()
        return left.square().sum(dim=1) / max(r, 1)

    def count(self, features: Tensor) -> int:
        """Tokens that the adaptive variant keeps of [n, d] rows."""
        falling = self.leverage(features).sort(descending=True).values.cumsum(0)
        return int((falling < self.energy * falling[-1] * (1 - 1e-6)).sum()) + 1

    def allocate_budget(self, images: Sequence[VisualTokens], num_layers: int) -> list[int]:
        if not self.adaptive:
            return list(super().allocate_budget(images, num_layers))
        counts = [float(self.count(tokens.features)) for tokens in images]
        return apportion(sum(tokens.keep for tokens in images), counts, [tokens.n for tokens in images])

    def score(self, tokens: VisualTokens) -> Tensor:
        return self.leverage(tokens.features)
