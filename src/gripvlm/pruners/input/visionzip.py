"""VisionZip: the tokens that the CLS token looks at, and the rest merged into a few."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import normalize

from gripvlm.pruners.base import Pruner, top_k
from gripvlm.pruners.ops.attention import cls_attention, tower_keys
from gripvlm.pruners.ops.ranking import mask_of
from gripvlm.types import Merge, Selection, VisualTokens


@dataclass(frozen=True)
class VisionZip(Pruner):
    """k = D + C (arXiv 2412.04467): D dominant tokens and C contextual ones.

    Dominant: the largest CLS attention in the block before the last. Of the m other tokens, in raster
    order, the numbers 0, s, 2 s, ... are the C targets, s = floor(m / C); each of the rest goes to the
    target with the most similar key (cosine of the head mean), and a contextual token is its target
    plus the mean of what went to it. The paper's 192 = 162 + 30, 128 = 108 + 20 and 64 = 54 + 10 are
    all C = 5 k / 32, rounded half up.

    1. Half of that sum, (target + mean) / 2: it lies between the rows that it stands for.
    2. Projected rows are merged; the paper merges before the projector.
    3. The paper counts the CLS token itself as dominant; language models here get patches only.
    4. A contextual token stands where its target stood, not after all dominant ones.
    5. Towers without visible keys: projected rows.

    Attributes:
        contextual: C / k, in [0, 1].
    """

    name = "visionzip"
    needs = frozenset({"features", "vision_attention"})
    vision_layers = (-2,)
    source = "VisionZip, arXiv 2412.04467 (CVPR 2025)"

    contextual: float = 5 / 32

    def __post_init__(self) -> None:
        self.require(0 <= self.contextual <= 1, "contextual=0.15625, in [0, 1]")

    def counts(self, k: int) -> tuple[int, int]:
        """(D, C) of a budget."""
        contextual = int(self.contextual * k + 0.5)
        return k - contextual, contextual

    def select(self, tokens: VisualTokens) -> Selection:
        scores = cls_attention(tokens, -2)
        dominant, contextual = self.counts(tokens.keep)
        kept = mask_of(top_k(scores, dominant), tokens.n)
        if not contextual:
            return Selection(kept.nonzero().flatten(), tokens.n, scores)
        rest = (~kept).nonzero().flatten()
        # Evenly over the image: every s-th of those that are left, as in the code.
        targets = rest[:: rest.numel() // contextual][:contextual].contiguous()
        kept[targets] = True
        source, indices = (~kept).nonzero().flatten(), kept.nonzero().flatten()
        keys = normalize(tower_keys(tokens, -2), dim=-1)
        target = (keys[source] @ keys[targets].T).argmax(dim=1)  # [m - C]
        # Half the target, half the mean of what went to it; a target that nothing went to stays as it is.
        size = torch.bincount(target, minlength=contextual)
        some = (size > 0).nonzero().flatten()
        slots = torch.searchsorted(indices, targets)
        merge = Merge(
            source=torch.cat((targets[some], source)),
            destination=torch.cat((slots[some], slots[target])),
            weight=torch.cat((torch.full_like(some, 0.5, dtype=torch.float), 0.5 / size[target])),
        )
        return Selection(indices, tokens.n, scores, merge if source.numel() else None)
