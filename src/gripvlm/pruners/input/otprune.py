"""OTPrune: keep visual tokens that are distributed as all of them are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from gripvlm.pruners.ops.pairwise import GreedyPruner, explain, padding_of, products
from gripvlm.types import VisualTokens


@dataclass(frozen=True)
class OTPrune(GreedyPruner):
    """Distribution alignment by optimal transport (arXiv 2602.20205): greedy argmax_S log det K_S.

    K = I + gamma G G^T, G = X X^T of the projected rows X [n, d], each of whose columns has length 1. The log
    determinant is the paper's tractable surrogate of the 2-Wasserstein distance between the kept tokens and all. Each
    step adds the token with the largest det K_{S + i} / det K_S, kept up to date by one row of a Cholesky factor a
    step. O(n^3) for K, O(k^2 n) for the choice.

    1. A column of zeros stays zero. The code divides by its length.

    Attributes:
        gamma: 0.01 as in the code.
    """

    name = "otprune"
    source = "OTPrune, arXiv 2602.20205 (CVPR 2026)"

    gamma: float = 0.01

    def __post_init__(self) -> None:
        self.require(self.gamma > 0, "gamma=0.01, above 0")

    def compared(self, tokens: VisualTokens) -> Tensor:
        return normalize(tokens.features.float(), dim=0)

    def pick(self, images: Sequence[VisualTokens], rows: Sequence[Tensor], cosine: Tensor) -> Tensor:
        kernel = products([gram[: tokens.n, : tokens.n] for gram, tokens in zip(cosine, images, strict=True)])
        kernel.mul_(self.gamma).diagonal(dim1=1, dim2=2).add_(1)
        left = kernel.diagonal(dim1=1, dim2=2).clone()  # [B, n], det K_{S + i} / det K_S; at least 1 for all but S
        left.masked_fill_(padding_of(images), -torch.inf)
        most = max(tokens.keep for tokens in images)
        factor = kernel.new_zeros(len(images), most, kernel.shape[1])
        picks = torch.empty(len(images), most, dtype=torch.long, device=kernel.device)
        for step in range(most):
            picks[:, step] = pick = left.argmax(dim=1)
            explain(kernel, factor, left, pick, step, 0.0)
            left.scatter_(1, pick[:, None], -torch.inf)
        return picks
