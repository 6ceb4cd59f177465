"""RESTORE: half of any pruner's choice, and all the rest merged into distinctive anchors."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import normalize

from gripvlm.pruners.base import Wrapper, top_k
from gripvlm.pruners.ops.ranking import mask_of
from gripvlm.types import Merge, Selection, VisualTokens


def anchors(rows: Tensor, count: int) -> Tensor:
    """[m] which of `count` anchors each of [m, d] rows goes to: the one with the largest cosine, anchors to themselves.

    Anchors have the largest D_i (1 - max_j cos_ij): D_i the sum of row i's cosines to all rows, j over those with a
    smaller D; for the row with the smallest D, D_i itself.
    """
    unit = normalize(rows.float(), dim=-1)
    cosine = unit @ unit.T
    density = cosine.sum(dim=1)
    thinner = density[None] < density[:, None]
    nearest = cosine.masked_fill(~thinner, -torch.inf).amax(dim=1)
    chosen = top_k(density * (1 - nearest.masked_fill(~thinner.any(dim=1), 0.0)), count)
    slot = cosine[:, chosen].argmax(dim=1)
    slot[chosen] = torch.arange(count, device=rows.device)
    return slot


@dataclass(frozen=True)
class Restore(Wrapper):
    """int(pruned x k) tokens of the inner pruner's choice; every other token goes to one of k - that anchors.

    Distinctive anchor merging (arXiv 2606.01711), as the authors' code computes it: see `anchors`, of the projected
    rows of the tokens that the inner pruner does not keep. A group becomes its mean, and stands at the place of its
    middle token in raster order, the lower of two. The paper has it on top of `holov`, `divprune` and `vispruner`.

    1. The paper's calibration of attention is not part of this. Its first term, log(tokens in a group), is
       `proportional_attention=True`, here in all layers, where the code takes n / k for all tokens in the first. Its
       second, by the distance of positions, is not implemented.
    2. The code compares a row with those of smaller D, where density peaks have the larger; so does this.
    3. What the inner pruner would merge is dropped.

    Attributes:
        pruned: share of k for the inner pruner, in [0, 1).
    """

    name = "restore"
    source = "wrapper: RESTORE (its merging), arXiv 2606.01711 (ICML 2026)"
    extra_needs = frozenset({"features"})

    pruned: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(0 <= self.pruned < 1, "pruned=0.5, in [0, 1)")

    def select(self, tokens: VisualTokens) -> Selection:
        n, k, device = tokens.n, tokens.keep, tokens.device
        own = int(self.pruned * k + 1e-9)
        kept = torch.empty(0, dtype=torch.long, device=device)
        if own:
            kept = self.inner.select(replace(tokens, keep=own)).indices.to(device)
        rest = (~mask_of(kept, n)).nonzero().flatten()
        group = anchors(tokens.features[rest], k - own)
        size = torch.bincount(group, minlength=k - own)
        first = size.cumsum(0) - size
        by_group = rest[torch.sort(group, stable=True).indices]
        middle = by_group[first + (size - 1) // 2]
        indices, order = torch.cat((kept, middle)).sort()
        slot = torch.empty_like(order).scatter_(0, order, torch.arange(k, device=device))[own:]
        merged = size[group] > 1
        source, group = rest[merged], group[merged]
        merge = Merge(source, slot[group], size[group].float().reciprocal()) if source.numel() else None
        return Selection(indices, n, merge=merge)
