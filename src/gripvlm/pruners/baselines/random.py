"""Keep a uniformly random subset: the baseline that a method must beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gripvlm.pruners.base import ScorePruner
from gripvlm.pruners.ops.own_generator import own_generator
from gripvlm.types import VisualTokens
from gripvlm.utils.batching import onto


@dataclass(frozen=True)
class Random(ScorePruner):
    """Uniform over the k-subsets of n rows, the same draw for the same image every time.

    The numbers are the image's own (`own_generator`). Draws for growing k are nested, since all of them rank by the
    same numbers.

    Strong in practice: see UniPruneBench, arXiv 2511.02650.

    Attributes:
        seed: any int; one seed is one draw per image.
    """

    name = "random"
    needs = frozenset({"key"})
    source = "baseline; UniPruneBench, arXiv 2511.02650"

    seed: int = 0

    def score(self, tokens: VisualTokens) -> Tensor:
        ranks = torch.randperm(tokens.n, generator=own_generator(self.seed, tokens))
        return onto(ranks.float(), tokens.features.device)
