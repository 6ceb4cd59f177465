"""FasterVLM: keep what the vision tower's CLS token looks at."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gripvlm.pruners.base import ScorePruner
from gripvlm.pruners.ops.attention import cls_attention
from gripvlm.types import VisualTokens


@dataclass(frozen=True)
class FasterVLM(ScorePruner):
    """score_j = mean over heads of the CLS token's attention on j, in the block before the last.

    arXiv 2412.01818.

    1. The paper prunes before the projector, which treats rows one by one: the result is the same.
    """

    name = "fastervlm"
    needs = frozenset({"vision_attention"})
    vision_layers = (-2,)
    source = "FasterVLM, arXiv 2412.01818"

    def score(self, tokens: VisualTokens) -> Tensor:
        return cls_attention(tokens, -2)
