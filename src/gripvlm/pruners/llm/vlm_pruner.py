"""VLM-Pruner: from a few pivots outwards, the tokens that are unlike what is kept and near it; the rest merged in."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from gripvlm.pruners.base import LLMPruner
from gripvlm.pruners.ops.ranking import descending, mask_of
from gripvlm.types import LLMTokens, Merge, Selection

CHANNELS = 256
"""Hidden channels that are compared: those that vary most among the tokens."""
STEP = 0.1
"""By how much the threshold rises with each pass."""
OWN = 0.3
"""What a kept token keeps of its own state where others are merged into it."""


def spread_pivots(keys: Tensor, count: int) -> Tensor:
    """[count] indices: of [n, d] keys the one with the largest L1 norm, then the farthest from those before (L2)."""
    pivots = [descending(keys.abs().sum(dim=1))[:1]]
    nearest = torch.full_like(keys[:, 0], torch.inf)
    for _ in range(count - 1):
        nearest = torch.minimum(nearest, (keys - keys[pivots[-1]]).square().sum(dim=1))
        nearest[torch.cat(pivots)] = -1
        pivots.append(nearest.argmax(dim=0, keepdim=True))
    return torch.cat(pivots)


@dataclass(frozen=True)
class VLMPruner(LLMPruner):
    """Centrifugal selection with a buffer for spatial sparsity (arXiv 2512.02700), as the authors' code computes it.

    Pivots: the token whose keys in the layer before have the largest L1 norm over all heads, and then those whose keys
    are farthest from the pivots' (`spread_pivots`). A token's likeness to what is kept is
    max_s cos(i, s) x (1 + min_s dist(i, s) / (2 diagonal)), s over the kept tokens: cosines of the hidden states that
    enter the layer, of the 256 channels with the largest variance; distances on the grid. In each pass, over the other
    tokens from the least alike, `batch` at a time: those below the threshold are kept, and what follows is compared
    with them too; of a batch with more than are still wanted, the least alike. A pass ends early when its first batch
    adds nothing; the threshold rises by 0.1 with each. Each dropped token then goes to the kept one with the largest
    cosine, which becomes 0.3 of itself and 0.7 of the mean of what goes to it, weighted by cosine.

    1. A pass that adds nothing is followed by the next; the code then stops with fewer than k.
    2. Negative cosines weigh 0 in a mean.
    3. The cut is `layer`, and `keep` the average over layers. Kept tokens stay at their positions.

    Attributes:
        layer: 1 or more; 2 as in the code.
        pivots: at least 1.
        threshold: of the first pass.
        batch: at least 1.
    """

    name = "vlm_pruner"
    needs = frozenset({"grid"})
    llm_needs = frozenset({"hidden", "all_keys"})
    source = "VLM-Pruner, arXiv 2512.02700 (CVPR 2026)"

    layer: int = 2
    pivots: int = 4
    threshold: float = 0.8
    batch: int = 16

    def __post_init__(self) -> None:
        self.require(self.pivots >= 1 and self.batch >= 1, "pivots=4 and batch=16, both at least 1")

    def select_at_layer(self, layer: int, tokens: LLMTokens) -> Selection:
        assert tokens.input.grid is not None  # promised by `needs`
        assert tokens.hidden is not None
        assert tokens.all_keys is not None
        height, width = tokens.input.grid
        states = tokens.hidden.float()
        unit = normalize(states[:, descending(states.var(dim=0, correction=0))[:CHANNELS]], dim=-1)
        cosine = unit @ unit.T
        places = torch.stack((tokens.rows // width, tokens.rows % width), dim=1).to(states)
        distance = torch.cdist(places, places, compute_mode="donot_use_mm_for_euclid_dist") / math.hypot(height, width)

        chosen = spread_pivots(tokens.all_keys.float(), min(self.pivots, tokens.keep))
        kept, count, threshold = mask_of(chosen, tokens.n), chosen.numel(), self.threshold
        alike, near = cosine[:, chosen].amax(dim=1), distance[:, chosen].amin(dim=1)
        while count < tokens.keep:
            rest = (~kept).nonzero().flatten()
            parts = rest[descending(-(alike * (1 + near / 2))[rest])].split(self.batch)
            before = count
            for number, part in enumerate(parts):
                if count == tokens.keep or (number == 1 and count == before):
                    break
                worth = alike[part] * (1 + near[part] / 2)
                chosen = part[~(worth >= threshold)]  # also where it is NaN, which no threshold ever reaches
                if chosen.numel() > tokens.keep - count:
                    chosen = part[descending(-worth)[: tokens.keep - count]]
                if chosen.numel():
                    kept[chosen] = True
                    count += chosen.numel()
                    alike = torch.maximum(alike, cosine[:, chosen].amax(dim=1))
                    near = torch.minimum(near, distance[:, chosen].amin(dim=1))
            threshold += STEP
        indices, rest = kept.nonzero().flatten(), (~kept).nonzero().flatten()
        return Selection(indices, tokens.n, merge=fused(cosine[rest][:, indices], indices, rest))


def fused(cosine: Tensor, indices: Tensor, rest: Tensor) -> Merge | None:
    """The merge of the m dropped rows `rest` into the k kept ones `indices`, by their cosines [m, k]."""
    if not rest.numel():
        return None
    best = cosine.max(dim=1)
    weight = best.values.clamp(min=0)
    total = torch.zeros_like(cosine[0]).index_add(0, best.indices, weight)
    goes = total[best.indices] > 0
    slot, into = best.indices[goes], (total > 0).nonzero().flatten()
    weights = (torch.full_like(total[into], OWN), (1 - OWN) * weight[goes] / total[slot])
    return Merge(torch.cat((indices[into], rest[goes])), torch.cat((into, slot)), torch.cat(weights))
