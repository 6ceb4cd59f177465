"""VisPruner: the tokens that the CLS token looks at, and a diverse part of the rest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import normalize

from gripvlm.pruners.base import Pruner
from gripvlm.pruners.ops.attention import cls_attention
from gripvlm.pruners.ops.ranking import descending
from gripvlm.types import Selection, VisualTokens


@dataclass(frozen=True)
class VisPruner(Pruner):
    """Visual cues (arXiv 2412.01818v2, ICCV 2025): int(important x k) tokens by attention, the rest by diversity.

    Important: the largest CLS attention in the block before the last. The other tokens, sorted by
    attention, are split into those at even and at odd places; of the even ones the (at most `step`)
    with the largest cosine to any odd one are dropped. The order of the next round: the even ones that are left,
    the most similar first, then the odd ones; and so on until k are left in all.

    1. An odd number of tokens is no special case: there is one more even one than odd ones. The code stops.
    2. Cosines of the tower's rows, before the projector; ties go to the higher attention.

    Attributes:
        important: in [0, 1].
        step: tokens dropped a round; the choice takes (n - k) / step rounds.
    """

    name = "vispruner"
    needs = frozenset({"vision_attention", "patches"})
    vision_layers = (-2,)
    source = "VisPruner, arXiv 2412.01818 (ICCV 2025)"

    important: float = 0.5
    step: int = 8

    def __post_init__(self) -> None:
        self.require(0 <= self.important <= 1 <= self.step, "important=0.5, in [0, 1], and step=8, at least 1")

    def select(self, tokens: VisualTokens) -> Selection:
        assert tokens.patches is not None
        scores = cls_attention(tokens, -2)
        order = descending(scores)
        # 1e-9: 0.29 * 100 is 28.999999999999996 in floats, and means 29.
        first = int(self.important * tokens.keep + 1e-9)
        diverse = tokens.keep - first
        rest = order[first:] if diverse else order[:0]
        left = torch.arange(rest.numel(), device=rest.device)
        if left.numel() > diverse:
            rows = normalize(tokens.patches.float(), dim=-1)[rest]
            # Once for all rounds, each of which needs another part of it.
            cosine = rows @ rows.T
        while (over := left.numel() - diverse) > 0:
            even, odd = left[::2], left[1::2]
            alike = cosine[even[:, None], odd].amax(dim=1)
            # Sorted, not only cut: which tokens the next round finds at even places depends on the order.
            left = torch.cat((even[descending(alike)[min(self.step, over) :]], odd))
        return Selection(torch.cat((order[:first], rest[left])).sort().values, tokens.n, scores)
