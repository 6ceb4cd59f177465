"""Rank by scores that the caller brings: oracles, teachers, replays of an earlier run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from gripvlm.errors import PrunerError
from gripvlm.pruners.base import ScorePruner
from gripvlm.types import VisualTokens


@dataclass(frozen=True, eq=False)
class Given(ScorePruner):
    """score = scores[sample][image], a tensor [n] that the caller computed elsewhere.

    A 0/1 tensor with exactly k ones keeps exactly those rows, so a given *set* needs nothing more.

    Attributes:
        scores: a list over the batch of lists over each prompt's images of tensors [n].
    """

    name = "given"
    needs = frozenset()
    source = "the caller's own scores"
    logits: ClassVar[bool] = True  # or not: the caller knows

    scores: Sequence[Sequence[Tensor]]

    def score(self, tokens: VisualTokens) -> Tensor:
        try:
            scores = self.scores[tokens.sample][tokens.image]
        except IndexError:
            raise PrunerError(
                f"pruner 'given' has no scores for image {tokens.image} of sample {tokens.sample}: "
                "pass a list (samples) of lists (images) of tensors [n]"
            ) from None
        if not isinstance(scores, Tensor):
            raise PrunerError(f"pruner 'given' needs a tensor [n] for each image, got a {type(scores).__name__}")
        return scores.to(tokens.features.device)
