"""CDPruner: keep tokens that are relevant to the question and unlike each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from gripvlm.errors import PrunerError
from gripvlm.pruners.base import Pruner, Selection, VisualTokens
from gripvlm.pruners.together import batches, cosines, padded

__all__ = ["CDPruner"]

RELEVANCE = ("positive", "negative", "none")
SPENT = 1e-5  # of a unit variance: less than this is rounding


@dataclass(frozen=True)
class CDPruner(Pruner):
    """Conditional DPP (arXiv 2506.10967): greedy argmax_S det L_S, L = diag(r) C diag(r).

    C_ij = cos(x_i, x_j), r_i = (c_i - min c) / (max c - min c) + 1e-6, c_i the relevance of token i
    to the question. Each step adds the token with the largest det L_{S + i} / det L_S, which is
    r_i^2 times the part of C_ii that S does not explain: d_i^2, kept up to date by one row of a
    Cholesky factor a step. O(n^2 d + k^2 n), one pass of vector work a step.

    1. The paper's c_i is minus the mean cosine between CLIP's projected patch and CLIP's text
       embedding. Without a text tower we use the mean cosine between x_i and the question's token
       embeddings, with the sign that `relevance` says. A substitute: the two live in one space, the
       language model's, but are not trained to match.
    2. Factorised is C, not L: the same choice, without L's small numbers.
    3. Once C is explained to 1e-5 (k above its rank, or duplicates), the rest is filled by relevance.
    4. min and max are over the image alone, not over the batch. An empty question, or one equally
       far from all tokens, gives r = 1.
    5. Float32 whatever the dtype; ties go to the lower index; raster order is restored.

    Attributes:
        relevance: "positive" (near the question is relevant), "negative" (far is), or "none" (r = 1,
            a plain DPP).
        theta: None for r as above; else r_i becomes exp(a r_i), a = theta / (2 (1 - theta)), theta in
            [0, 1): 0 is diversity alone.
    """

    name: ClassVar[str] = "cdpruner"
    needs: ClassVar[frozenset[str]] = frozenset({"features", "question"})
    source: ClassVar[str] = "CDPruner, arXiv 2506.10967 (NeurIPS 2025); question embeddings stand in for CLIP text"

    relevance: str = "positive"
    theta: float | None = None

    def __post_init__(self) -> None:
        if self.relevance not in RELEVANCE or (self.theta is not None and not 0 <= self.theta < 1):
            raise PrunerError(f"cdpruner: type relevance={'|'.join(RELEVANCE)} and theta=0.5, in [0, 1); got {self}")

    def quality(self, rows: Tensor, question: Tensor | None) -> Tensor:
        """[n] r_i of [n, d] unit rows."""
        if self.relevance == "none" or question is None or not question.shape[0]:
            quality = torch.ones_like(rows[:, 0])
        else:
            text = normalize(question.to(rows), dim=-1)
            cosine = (rows @ text.T).mean(dim=1)
            cosine = -cosine if self.relevance == "negative" else cosine
            low, high = cosine.aminmax()
            quality = (cosine - low) / (high - low) + 1e-6 if high > low else torch.ones_like(cosine)
        return quality if self.theta is None else (quality * (self.theta / (2 - 2 * self.theta))).exp()

    def select(self, tokens: VisualTokens) -> Selection:
        return self.select_batch([tokens])[0]

    def select_batch(self, images: Sequence[VisualTokens]) -> list[Selection]:
        return [selection for some in batches(images) for selection in self._select(some)]

    def _select(self, images: Sequence[VisualTokens]) -> list[Selection]:
        cosine = cosines(images)  # [B, n, n]
        qualities = [self.quality(normalize(one.features.float(), dim=-1), one.question) for one in images]
        quality = padded(qualities, 0.0)
        worst = quality - torch.stack([one.amax() for one in qualities])[:, None] - 1  # below every gain
        taken = padded([torch.zeros_like(one, dtype=torch.bool) for one in qualities], True)
        left = cosine.diagonal(dim1=1, dim2=2).clone()  # [B, n], d_i^2
        most, row = max(tokens.keep for tokens in images), torch.arange(len(images), device=cosine.device)
        factor = cosine.new_zeros(len(images), most, cosine.shape[1])
        chosen = torch.empty(len(images), most, dtype=torch.long, device=cosine.device)
        for step in range(most):
            gain = torch.where(left > SPENT, quality.square() * left, worst)
            pick = gain.masked_fill_(taken, -torch.inf).argmax(dim=1)
            chosen[:, step], taken[row, pick] = pick, True
            known = factor[row, :step, pick]  # [B, step]
            part = cosine[row, pick] - (known[..., None] * factor[:, :step]).sum(dim=1)
            own = left[row, pick][:, None]
            factor[:, step] = torch.where(own > SPENT, part * own.clamp(min=SPENT).rsqrt(), 0.0)
            left = left - factor[:, step].square()
        return [
            Selection(picks[: tokens.keep].sort().values, tokens.n)
            for picks, tokens in zip(chosen, images, strict=True)
        ]
