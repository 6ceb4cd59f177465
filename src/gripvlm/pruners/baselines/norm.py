"""Keep the visual tokens with the largest features."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gripvlm.pruners.base import ScorePruner
from gripvlm.types import VisualTokens


@dataclass(frozen=True)
class Norm(ScorePruner):
    """score_i = ||x_i||_2, the Euclidean norm of row i after the projector.

    A folk baseline without a paper of its own: it asks whether a token's size alone says that it
    matters.
    """

    name = "norm"
    source = "folk baseline: largest L2 norm"

    def score(self, tokens: VisualTokens) -> Tensor:
        return tokens.features.float().norm(dim=-1)
