"""MustDrop, vision part: merge uniform neighbourhoods, always keep what the CLS token looks at."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from gripvlm.pruners.base import Pruner, top_k
from gripvlm.pruners.ops.attention import cls_attention
from gripvlm.pruners.ops.merging import mean_merge
from gripvlm.pruners.ops.ranking import descending, window_numbers
from gripvlm.types import Selection, VisualTokens


@dataclass(frozen=True)
class MustDrop(Pruner):
    """Multi-stage dropping (arXiv 2411.10803), what it does in the vision stage.

    The raster is cut into 3 x 3 windows. One whose rows are alike, mean cosine over its 36 pairs >= tau,
    becomes one token, their mean. The ceil(keys x n) tokens with the largest CLS attention in the last
    block are always kept.

    1. k is exact: of the tokens and merged windows, the k with the largest attention, a window counting
       with its mean. If merging leaves fewer than k, the least alike windows stay as they are.
    2. A window that holds an always-kept token is not merged. If there are more of these than k, the
       strongest k are kept.
    3. Merging is by the projected rows, once; the paper does it after the tower's first block.
    4. The merged token stands at the window's centre. Only whole windows merge, from the top left.
    5. The prefill and decoding stages are `mustdrop_llm`'s. Towers without a CLS
       token: the mean attention received.

    Attributes:
        tau: 0.8 as in the authors' code.
        keys: share of all tokens that is always kept.
    """

    name = "mustdrop"
    needs = frozenset({"features", "grid", "vision_attention"})
    vision_layers = (-1,)
    source = "MustDrop (vision stage), arXiv 2411.10803"

    tau: float = 0.8
    keys: float = 0.08

    def __post_init__(self) -> None:
        self.require(0 <= self.keys <= 1, "keys=0.08, in [0, 1]")

    def select(self, tokens: VisualTokens) -> Selection:
        assert tokens.grid is not None
        scores = cls_attention(tokens, -1)
        merged = self._alike(tokens, top_k(scores, math.ceil(self.keys * tokens.n - 1e-9)))  # [w, 9]
        # A merged window competes as its centre, with its mean; its other eight tokens are out.
        value = scores.clone()
        value[merged.flatten()] = -torch.inf
        value[merged[:, 4]] = scores[merged].mean(dim=1)
        indices = top_k(value, tokens.keep)
        own = merged[torch.isin(merged[:, 4], indices)]
        slot = torch.searchsorted(indices, own[:, 4:5].contiguous()).expand(-1, 8)
        others = own[:, [0, 1, 2, 3, 5, 6, 7, 8]]
        merge = mean_merge(indices, others.flatten(), slot.flatten())
        return Selection(indices, tokens.n, scores, merge)

    def _alike(self, tokens: VisualTokens, fixed: Tensor) -> Tensor:
        """[w, 9] rows of the windows to merge, the most alike first."""
        assert tokens.grid is not None
        h, w = tokens.grid
        group = window_numbers((h, w), (3, 3), tokens.features.device)
        whole = (torch.bincount(group) == 9).nonzero().flatten()
        order = torch.sort(group, stable=True).indices
        # Windows at the right and bottom edge may be smaller: only whole ones merge.
        cells = order[torch.isin(group[order], whole)].view(-1, 9)
        cells = cells[~torch.isin(cells, fixed).any(dim=1)]
        rows = normalize(tokens.features.float(), dim=-1)[cells]  # [w, 9, d]
        # |sum of 9 unit rows|^2 - 9 is twice the sum of the 36 pairs' cosines.
        alike = (rows.sum(dim=1).square().sum(-1) - rows.square().sum((1, 2))) / 72
        best = descending(alike)[: (tokens.n - tokens.keep) // 8]  # each merge saves 8
        return cells[best[alike[best] >= self.tau]]
