"""LLaVA-PruMerge and PruMerge+ (arXiv 2403.15388): salient tokens absorb what resembles them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from gripvlm.pruners.base import Pruner, top_k
from gripvlm.pruners.ops.attention import cls_attention, tower_keys
from gripvlm.pruners.ops.ranking import mask_of
from gripvlm.types import Merge, Selection, VisualTokens


@dataclass(frozen=True)
class PruMerge(Pruner):
    """Keep what the CLS token looks at, and let it absorb what resembles it.

    Kept are the tokens with the largest CLS attention a in the last block. A kept row becomes x_i + sum of a_j x_j over
    the `neighbours` other tokens whose keys are most like its own (cosine); from k = 2 on one more row holds the sum of
    a_j x_j over all that are not kept. The paper keeps as many as there are outliers, a_i > Q3 + 1.5 (Q3 - Q1).

    1. For the paper's count pass `count` as the budget.
    2. Weighted means: the weights 1, a_j, ... are divided by their sum.
    3. The extra row is one of the k. It stands at the strongest token that is not kept.
    4. Attention and keys are means over heads; the code computes both as one head of full width.
    5. Projected rows are merged; the paper merges before the projector. With k = n nothing is.

    Attributes:
        neighbours: tokens that a kept row absorbs; they may be kept themselves.
        uniform: share of k that is spread evenly over the image: 0 here, more in PruMerge+.
    """

    name = "prumerge"
    needs = frozenset({"features", "vision_attention"})
    vision_layers = (-1,)
    source = "LLaVA-PruMerge, arXiv 2403.15388 (ICCV 2025)"

    neighbours: int = 32
    uniform: float = 0.0

    def __post_init__(self) -> None:
        valid = self.neighbours >= 0 and 0 <= self.uniform <= 1
        self.require(valid, "neighbours=32, 0 or more, and uniform=0.75, in [0, 1]")

    def count(self, tokens: VisualTokens) -> int:
        """Tokens with outlying attention, at least 1."""
        attention = cls_attention(tokens, -1)
        low, high = torch.quantile(attention, torch.tensor([0.25, 0.75]).to(attention))
        return max(1, int((attention > high + 1.5 * (high - low)).sum()))

    def _anchors(self, attention: Tensor, k: int) -> Tensor:
        """[n] bool: the k rows that are kept for themselves."""
        # At least one row by attention, whatever `uniform` is.
        evenly = min(k - 1, int(self.uniform * k + 0.5))
        kept = mask_of(top_k(attention, k - evenly), attention.numel())
        rest = (~kept).nonzero().flatten()
        # Even steps over the others in raster order, not over the image: some of its even points are kept already.
        kept[rest[torch.arange(evenly, device=rest.device) * rest.numel() // max(1, evenly)]] = True
        return kept

    def select(self, tokens: VisualTokens) -> Selection:
        n, k = tokens.n, tokens.keep
        attention = cls_attention(tokens, -1)
        extra = int(1 < k < n)
        kept = self._anchors(attention, k - extra)
        anchors, rest = kept.nonzero().flatten(), (~kept).nonzero().flatten()
        indices = anchors
        # The row that absorbs what is dropped stands where the strongest dropped token stood.
        if extra:
            indices = torch.cat((anchors, rest[attention[rest].argmax()][None])).sort().values
        slots = torch.searchsorted(indices, anchors)
        keys = normalize(tower_keys(tokens, -1), dim=-1)
        alike = keys[anchors] @ keys.T  # [k', n]
        # No row is its own neighbour, but kept rows may be neighbours of each other.
        alike[torch.arange(anchors.numel()), anchors] = -torch.inf
        size = min(self.neighbours, n - 1)
        near = torch.sort(alike, dim=1, descending=True, stable=True).indices[:, :size]
        mass = attention[near]  # [k', size]
        total = 1 + mass.sum(dim=1, keepdim=True)
        source = [anchors, near.flatten()]
        destination = [slots, slots.repeat_interleave(size)]
        weight = [total[:, 0].reciprocal(), (mass / total).flatten()]
        if extra:
            # Never 0: the weights are divided by their sum.
            mass = attention[rest].clamp(min=torch.finfo(torch.float32).tiny)
            source, weight = [*source, rest], [*weight, mass / mass.sum()]
            every = torch.arange(k, device=slots.device)
            hole = every[~torch.isin(every, slots)]  # [1] the extra row's slot
            destination = [*destination, hole.expand_as(rest)]
        merge = Merge(torch.cat(source), torch.cat(destination), torch.cat(weight))
        return Selection(indices, n, attention, merge if k < n else None)


@dataclass(frozen=True)
class PruMergePlus(PruMerge):
    """Evenly spread tokens beside the salient ones, and what resembles them merged in.

    `uniform` x k of the kept tokens lie evenly over the others, in raster order. The paper adds to the outliers, a
    share r of the tokens, every floor(step / 3)-th token, step = floor(1 / r): about three for each outlier, so three
    quarters of k here.

    1. The paper's even tokens may fall on outliers, and then there are fewer.
    """

    name = "prumerge_plus"
    source = "PruMerge+, arXiv 2403.15388 (ICCV 2025)"

    uniform: float = 0.75
