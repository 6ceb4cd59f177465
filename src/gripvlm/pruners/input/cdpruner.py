"""CDPruner: keep tokens that are relevant to the question and unlike each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn.functional import normalize, threshold

from gripvlm.errors import PrunerError
from gripvlm.pruners.base import Pruner
from gripvlm.pruners.ops.pairwise import batches, products, unit_rows
from gripvlm.types import Selection, VisualTokens
from gripvlm.utils.batching import padded

__all__ = ["CDPruner", "TextTower"]

RELEVANCE = ("default", "positive", "negative", "none")
SPENT = 1e-5  # of a unit variance: less than this is rounding


class TextTower(Protocol):
    """CLIP's text tower and visual projection, with the questions of a batch: see `gripvlm.models.clip`."""

    def check(self, model: Any) -> None:
        """Raises a `GripError` where its vision tower is not the model's."""

    def cosine(self, patches: Tensor, sample: int) -> Tensor:
        """[n] cosine of [n, d_v] patch states with the question of this prompt."""


@dataclass(frozen=True)
class CDPruner(Pruner):
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
    5. Float32 whatever the dtype; ties go to the lower index; raster order is restored.

    Attributes:
        relevance: "positive" (near the question is relevant), "negative" (far is), "none" (r = 1, a plain
            DPP), or "default": negative with `clip`, as in the paper, else positive.
        theta: None for r as above; else r_i becomes exp(a r_i), a = theta / (2 (1 - theta)), theta in
            [0, 1): 0 is diversity alone.
        clip: CLIP's text tower with the questions of the batch; from Python only.
    """

    name: ClassVar[str] = "cdpruner"
    source: ClassVar[str] = "CDPruner, arXiv 2506.10967 (NeurIPS 2025); without `clip`, question embeddings stand in"

    relevance: str = "default"
    theta: float | None = None
    clip: TextTower | None = None

    def __post_init__(self) -> None:
        if self.relevance not in RELEVANCE or (self.theta is not None and not 0 <= self.theta < 1):
            raise PrunerError(f"cdpruner: type relevance={'|'.join(RELEVANCE)} and theta=0.5, in [0, 1); got {self}")

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({"features", "question" if self.clip is None else "patches"})

    def check(self, model: Any) -> None:
        if self.clip is not None:
            self.clip.check(model)

    def cosine(self, rows: Tensor, tokens: VisualTokens) -> Tensor | None:
        """[n] mean cosine of [n, d] unit rows, or of their patches, with the question; None without one."""
        if self.clip is not None:
            assert tokens.patches is not None  # promised by `needs`
            return self.clip.cosine(tokens.patches, tokens.sample).to(rows)
        if tokens.question is None or not tokens.question.shape[0]:
            return None
        return (rows @ normalize(tokens.question.to(rows), dim=-1).T).mean(dim=1)

    def quality(self, rows: Tensor, tokens: VisualTokens) -> Tensor:
        """[n] r_i of [n, d] unit rows."""
        cosine = None if self.relevance == "none" else self.cosine(rows, tokens)
        if cosine is None:
            quality = torch.ones_like(rows[:, 0])
        else:
            far = self.relevance == "negative" or (self.relevance == "default" and self.clip is not None)
            cosine = -cosine if far else cosine
            low, high = cosine.aminmax()
            told = high > low
            quality = torch.where(told, (cosine - low) / torch.where(told, high - low, 1) + 1e-6, 1)
        return quality if self.theta is None else (quality * (self.theta / (2 - 2 * self.theta))).exp()

    def select(self, tokens: VisualTokens) -> Selection:
        return self.select_batch([tokens])[0]

    def select_batch(self, images: Sequence[VisualTokens]) -> list[Selection]:
        return [selection for some in batches(images) for selection in self._select(some)]

    def _select(self, images: Sequence[VisualTokens]) -> list[Selection]:
        rows = unit_rows(images)
        cosine = products(rows)  # [B, n, n]
        qualities = [self.quality(*pair) for pair in zip(rows, images, strict=True)]
        quality = padded(qualities, 0.0)
        square = quality.square()
        worst = quality - torch.stack([one.amax() for one in qualities])[:, None] - 1  # below every gain
        worst = worst.masked_fill(
            padded([torch.zeros_like(one, dtype=torch.bool) for one in qualities], True), -torch.inf
        )
        left = cosine.diagonal(dim1=1, dim2=2).clone()  # [B, n], d_i^2; 0 at padding and, to rounding, once taken
        most, row = max(tokens.keep for tokens in images), torch.arange(len(images), device=cosine.device)
        factor = cosine.new_zeros(len(images), most, cosine.shape[1])
        chosen = torch.empty(len(images), most, dtype=torch.long, device=cosine.device)
        for step in range(most):
            pick = torch.where(left > SPENT, square * left, worst).argmax(dim=1)
            chosen[:, step] = pick
            worst.scatter_(1, pick[:, None], -torch.inf)
            known = factor[row, :step, pick]  # [B, step]
            part = cosine[row, pick] - (known[..., None] * factor[:, :step]).sum(dim=1)
            own = threshold(left.gather(1, pick[:, None]), SPENT, torch.inf)
            factor[:, step] = part * own.rsqrt()  # 0 where nothing was left
            left -= factor[:, step].square()
        return [
            Selection(picks[: tokens.keep].sort().values, tokens.n, sound=True)
            for picks, tokens in zip(chosen, images, strict=True)
        ]
