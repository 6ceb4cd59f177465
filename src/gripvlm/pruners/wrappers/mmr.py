"""MMR: re-rank any pruner's scores so that the kept tokens do not repeat each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gripvlm.errors import PrunerError
from gripvlm.pruners.base import Wrapper
from gripvlm.pruners.ops.pairwise import GreedyPruner, padding_of
from gripvlm.types import VisualTokens
from gripvlm.utils.batching import padded


@dataclass(frozen=True)
class MMR(Wrapper, GreedyPruner):
    """Maximal marginal relevance (Carbonell and Goldstein, SIGIR 1998) over the inner scores.

    Repeatedly takes argmax_i balance x s_i - (1 - balance) x max_{j in S} cos(x_i, x_j), where s is
    the inner pruner's scores scaled to [0, 1] over the image. O(n^2 d + k n). Over a trained scorer this is IDPruner
    (arXiv 2602.13315), whose published code chooses the same tokens.

    1. The first token is argmax s_i: with S empty there is nothing to repeat.
    2. Scores that are all equal count as 1. Infinite ones count as the largest (smallest) finite one.
    3. What the inner pruner would merge is dropped: its kept rows are others.

    Attributes:
        balance: 1 is the inner ranking alone, 0 is diversity alone after the first token.
    """

    name = "mmr"
    extra_needs = frozenset({"features"})
    source = "wrapper: maximal marginal relevance, SIGIR 1998; over a trained scorer IDPruner, arXiv 2602.13315"

    balance: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(0 <= self.balance <= 1, "balance=0.5, in [0, 1]")

    def pick(self, images: Sequence[VisualTokens], rows: Sequence[Tensor], cosine: Tensor) -> Tensor:
        scores = padded([self._scaled(tokens) for tokens in images], 0.0)  # [B, n]
        picked = padding_of(images)
        value = scores  # the first by score alone: there is nothing to repeat yet
        closest = torch.full_like(scores, -torch.inf)  # [B, n], cosine to the nearest picked token
        batch = torch.arange(len(images), device=cosine.device)
        most = max(tokens.keep for tokens in images)
        picks = torch.empty(len(images), most, dtype=torch.long, device=cosine.device)
        for step in range(most):
            pick = value.masked_fill(picked, -torch.inf).argmax(dim=1)
            picks[:, step] = pick
            picked.scatter_(1, pick[:, None], True)  # picked[batch, pick] = True copies True from the host, and waits
            closest = torch.maximum(closest, cosine[batch, pick])
            value = self.balance * scores - (1 - self.balance) * closest
        return picks

    def _scaled(self, tokens: VisualTokens) -> Tensor:
        """[n] s."""
        scores = self.inner.select(tokens).scores
        if scores is None:
            raise PrunerError(
                f"pruner {self.name!r} needs scores, but {self.inner.name!r} chooses a set without any: "
                "use one that ranks, such as norm"
            )
        scores = scores.float().to(tokens.features.device)
        finite = scores.isfinite()
        # Infinite scores would make every finite one 0 or NaN.
        low, high = scores.where(finite, torch.inf).amin(), scores.where(finite, -torch.inf).amax()
        differ = high > low  # a tensor: reading it would wait for the device
        return torch.where(differ, (scores.clamp(low, high) - low) / torch.where(differ, high - low, 1), 1)
