"""MMR: re-rank any pruner's scores so that the kept tokens do not repeat each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gripvlm.errors import PrunerError
from gripvlm.pruners.ops.pairwise import batches, cosines
from gripvlm.pruners.wrapper_base import Wrapper, scores_of
from gripvlm.types import Selection, VisualTokens
from gripvlm.utils.batching import padded

__all__ = ["MMR"]


@dataclass(frozen=True)
class MMR(Wrapper):
    """Maximal marginal relevance (Carbonell and Goldstein, SIGIR 1998) over the inner scores.

    Repeatedly takes argmax_i balance x s_i - (1 - balance) x max_{j in S} cos(x_i, x_j), where s is
    the inner pruner's scores scaled to [0, 1] over the image. O(n^2 d + k n).

    1. The first token is argmax s_i: with S empty there is nothing to repeat.
    2. Scores that are all equal count as 1. Infinite ones count as the largest (smallest) finite one.
    3. What the inner pruner would merge is dropped: its kept rows are others.
    4. Float32 whatever the dtype; ties go to the lower index; raster order is restored.

    Attributes:
        balance: 1 is the inner ranking alone, 0 is diversity alone after the first token.
    """

    name: ClassVar[str] = "mmr"
    extra: ClassVar[frozenset[str]] = frozenset({"features"})
    source: ClassVar[str] = "wrapper: maximal marginal relevance, SIGIR 1998"

    balance: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.balance <= 1:
            raise PrunerError(f"mmr: balance={self.balance} must be in [0, 1]: type mmr(norm):balance=0.5")

    def select(self, tokens: VisualTokens) -> Selection:
        return self.select_batch([tokens])[0]

    def select_batch(self, images: Sequence[VisualTokens]) -> list[Selection]:
        return [selection for some in batches(images) for selection in self._select(some)]

    def _scaled(self, tokens: VisualTokens) -> Tensor:
        """[n] s."""
        scores = scores_of(self, self.inner, tokens)
        finite = scores.isfinite()
        low, high = scores.where(finite, torch.inf).amin(), scores.where(finite, -torch.inf).amax()
        told = high > low
        return torch.where(told, (scores.clamp(low, high) - low) / torch.where(told, high - low, 1), 1)

    def _select(self, images: Sequence[VisualTokens]) -> list[Selection]:
        each = [self._scaled(tokens) for tokens in images]
        scaled, cosine = padded(each, 0.0), cosines(images)  # [B, n], [B, n, n]
        taken = padded([torch.zeros_like(one, dtype=torch.bool) for one in each], True)
        value = scaled
        closest = torch.full_like(scaled, -torch.inf)  # [B, n], cosine to the nearest chosen token
        most, row = max(tokens.keep for tokens in images), torch.arange(len(images), device=cosine.device)
        chosen = torch.empty(len(images), most, dtype=torch.long, device=cosine.device)
        for step in range(most):
            pick = value.masked_fill(taken, -torch.inf).argmax(dim=1)
            chosen[:, step] = pick
            taken.scatter_(1, pick[:, None], True)  # taken[row, pick] = True would copy True from the host, and wait
            closest = torch.maximum(closest, cosine[row, pick])
            value = self.balance * scaled - (1 - self.balance) * closest
        return [
            Selection(picks[: tokens.keep].sort().values, tokens.n, sound=True)
            for picks, tokens in zip(chosen, images, strict=True)
        ]
