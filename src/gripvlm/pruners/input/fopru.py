"""FoPru: keep the tokens that the vision tower focuses on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gripvlm.pruners.base import ScorePruner
from gripvlm.pruners.ops.attention import received_attention
from gripvlm.types import VisualTokens


@dataclass(frozen=True)
class FoPru(ScorePruner):
    """Focal pruning (arXiv 2411.14164), by rank: keep the tokens of largest significance g.

    A is the attention among patches in the block before the last, the mean over heads, without the CLS token's
    row and column. u_j = mean_i A_ij is what patch j receives, v_i = mean_j A_ij what patch i gives; g is u
    where Var(u) > Var(v) over the tokens, else v.

    1. A row made of several patches has their means of u and v. In towers without a CLS token v is 1 / n for all,
       so g is u.
    2. The paper's other strategy, whole rows of the raster, is not here.
    """

    name = "fopru"
    needs = frozenset({"vision_attention", "vision_given"})
    vision_layers = (-2,)
    source = "FoPru, arXiv 2411.14164"

    def score(self, tokens: VisualTokens) -> Tensor:
        rows = tokens.vision[-2]
        if rows.given is None or rows.patch_received is None:
            received = received_attention(tokens, -2)
            # Without a CLS token all that patches give goes to patches, so each gives the same.
            given = torch.full_like(received, 1 / tokens.n)
        else:
            received, given = rows.patch_received.float().mean(dim=0), rows.given.float().mean(dim=0)
        return received if received.var(correction=0) > given.var(correction=0) else given
