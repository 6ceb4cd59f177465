"""VScan, first stage: a global and a local scan of the image, and merging of what neither keeps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import normalize

from gripvlm.pruners.base import Pruner
from gripvlm.pruners.ops.attention import cls_attention
from gripvlm.pruners.ops.merging import mean_merge
from gripvlm.pruners.ops.ranking import descending, fill_best, mask_of, rank_in_group, window_numbers
from gripvlm.types import Selection, VisualTokens


@dataclass(frozen=True)
class VScanVision(Pruner):
    """VScan's first stage (arXiv 2505.22654), after the encoder; both stages are `vscan`.

    Local scan: int(local x k) tokens, the same number from every window of `window` x `window`, those
    with the largest CLS attention in the block `shallow`. Global scan: of the other tokens, the largest
    CLS attention in the block before the last, up to k. Every token that is not kept goes to the kept
    one with the most similar row (cosine), which becomes the mean of all that it stands for.

    1. Quotas are exact: where the windows' number does not divide the local part, those with the
       highest next token give one more. The code drops the remainder.
    2. Towers without a CLS token: the mean attention received. Ties go to the lower index.

    Attributes:
        local: share of k for the local scan.
        window: cells a side.
        shallow: block of the local scan; the paper's 5 of CLIP's 24. Another tower needs another.
        merge: whether tokens that are not kept are merged in, or dropped.
    """

    name = "vscan_vision"
    needs = frozenset({"features", "grid", "vision_attention"})
    source = "VScan (first stage), arXiv 2505.22654"

    local: float = 0.5
    window: int = 6
    shallow: int = 5
    merge: bool = True

    def __post_init__(self) -> None:
        self.require(0 <= self.local <= 1 <= self.window, "local=0.5, in [0, 1], and window=6, at least 1")

    @property
    def vision_layers(self) -> tuple[int, ...]:  # type: ignore[override]
        return (self.shallow, -2)

    def select(self, tokens: VisualTokens) -> Selection:
        assert tokens.grid is not None
        near, far = cls_attention(tokens, self.shallow), cls_attention(tokens, -2)
        rank = rank_in_group(near, window_numbers(tokens.grid, (self.window, self.window), near.device))
        order = descending(near)
        # The best of each window, then the second best of each, ...: a prefix takes the same number from every window.
        order = order[torch.sort(rank[order], stable=True).indices]
        part = int(self.local * tokens.keep + 1e-9)
        kept = mask_of(order[:part], tokens.n)
        fill_best(kept, descending(far), tokens.keep - part)
        indices, rest = kept.nonzero().flatten(), (~kept).nonzero().flatten()
        if not self.merge:
            return Selection(indices, tokens.n, far)
        rows = normalize(tokens.features.float(), dim=-1)
        slot = (rows[rest] @ rows[indices].T).argmax(dim=1)
        return Selection(indices, tokens.n, far, mean_merge(indices, rest, slot))
