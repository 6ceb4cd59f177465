"""CDPruner: keep tokens that are relevant to the question and unlike each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import normalize

from gripvlm.pruners.ops.pairwise import GreedyPruner, explain, padding_of
from gripvlm.types import VisualTokens
from gripvlm.utils.batching import padded

EPS = 1e-5  # of a unit variance: less than this is rounding


class TextTower(Protocol):
    """CLIP's text tower and visual projection, with the questions of a batch: see `gripvlm.models.clip`."""

    def check(self, model: Any) -> None:
        """Raises a `GripError` where its vision tower is not the model's."""

    def cosine(self, patches: Tensor, sample: int) -> Tensor:
        """[n] cosine of [n, d_v] patch states with the question of this prompt."""


@dataclass(frozen=True)
class CDPruner(GreedyPruner):
    """Conditional DPP (arXiv 2506.10967): greedy argmax_S det L_S, L = diag(r) C diag(r).

    C_ij = cos(x_i, x_j), r_i = (c_i - min c) / (max c - min c) + 1e-6, c_i the relevance of token i
    to the question. Each step adds the token with the largest det L_{S + i} / det L_S, which is
    r_i^2 times the part of C_ii that S does not explain: d_i^2, kept up to date by one row of a
    Cholesky factor a step. O(n^2 d + k^2 n), one pass of vector work a step.

    1. The paper's c_i is minus the mean cosine between CLIP's projected patch and CLIP's embeddings of the
       question, cut into pieces that fit its text tower: `clip` does that, with a `gripvlm.models.clip.ClipText`.
       Models carry no such tower; without one we use the mean cosine between x_i and the question's token
       embeddings. A substitute: the two live in one space, the language model's, but are not trained to match.
    2. Factorised is C, not L: the same choice, without L's small numbers.
    3. Once C is explained to 1e-5 (k above its rank, or duplicates), the rest is filled by relevance.
    4. min and max are over the image alone, not over the batch. An empty question, or one equally
       far from all tokens, gives r = 1.

    Attributes:
        clip: CLIP's text tower with the questions of the batch; from Python only.
    """

    name = "cdpruner"
    source = "CDPruner, arXiv 2506.10967 (NeurIPS 2025); without `clip`, question embeddings stand in"

    clip: TextTower | None = None

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({"features", "question" if self.clip is None else "patches"})

    def check(self, model: Any) -> None:
        if self.clip is not None:
            self.clip.check(model)

    def relevance(self, rows: Tensor, tokens: VisualTokens) -> Tensor | None:
        """[n] c_i of [n, d] unit rows, or of their patches; None without a question."""
        if self.clip is not None:
            assert tokens.patches is not None
            return -self.clip.cosine(tokens.patches, tokens.sample).to(rows)
        if tokens.question is None or not tokens.question.shape[0]:
            return None
        return (rows @ normalize(tokens.question.to(rows), dim=-1).T).mean(dim=1)

    def quality(self, rows: Tensor, tokens: VisualTokens) -> Tensor:
        """[n] r_i of [n, d] unit rows."""
        relevance = self.relevance(rows, tokens)
        if relevance is None:
            return torch.ones_like(rows[:, 0])
        low, high = relevance.aminmax()
        differ = high > low  # a tensor: reading it would wait for the device
        return torch.where(differ, (relevance - low) / torch.where(differ, high - low, 1) + 1e-6, 1)

    def pick(self, images: Sequence[VisualTokens], rows: Sequence[Tensor], cosine: Tensor) -> Tensor:
        each = [self.quality(*pair) for pair in zip(rows, images, strict=True)]
        quality = padded(each, 0.0)  # [B, n], r
        square = quality.square()
        # Once everything is explained relevance decides: r, lowered below every gain, which are not negative.
        spent = quality - torch.stack([one.amax() for one in each])[:, None] - 1
        spent = spent.masked_fill(padding_of(images), -torch.inf)
        left = cosine.diagonal(dim1=1, dim2=2).clone()  # [B, n], d_i^2; 0 at padding and, to rounding, once picked
        most = max(tokens.keep for tokens in images)
        factor = cosine.new_zeros(len(images), most, cosine.shape[1])  # rows of the Cholesky factor
        picks = torch.empty(len(images), most, dtype=torch.long, device=cosine.device)
        for step in range(most):
            pick = torch.where(left > EPS, square * left, spent).argmax(dim=1)
            picks[:, step] = pick
            spent.scatter_(1, pick[:, None], -torch.inf)
            explain(cosine, factor, left, pick, step, EPS)
        return picks
