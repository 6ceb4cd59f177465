"""HoloV: a share of the budget for every crop of the picture, then the salient tokens of each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import normalize

from gripvlm.pruners.base import Pruner, top_k
from gripvlm.pruners.ops.attention import cls_attention
from gripvlm.types import Selection, VisualTokens
from gripvlm.utils.batching import onto

EPS = 1e-6


@dataclass(frozen=True)
class HoloV(Pruner):
    """Holistic context retention (arXiv 2510.02912), as the authors' code computes it.

    Crops are `crops` runs of tokens in raster order, the first n % crops of them one longer. A token's score is
    a_i + alpha v_i x mean(a) / mean(v), with means over its crop: a_i the attention of the vision tower's CLS token in
    the block before the last, the mean over heads; v_i the variance of its cosines to the others of the crop, of the
    projected rows (its own counts too, as 0). A crop gets floor(k w) tokens, w its mean score over the sum of all
    crops', and the crops with the largest w one more each until there are k. In a crop the tokens with the largest a_i
    stay.

    1. mean(a) / mean(v) gives v the mean of a in each crop: up to an epsilon of 1e-6 beside mean(v), shares are those
       of attention alone. So they are in the code.
    2. Tokens that a crop has no room for go to those with the largest a_i that are left; the code returns rows of
       zeros instead.
    3. A crop of one token is scored a_i. The code has it a thousandth of that.

    Attributes:
        crops: 16 as in the code, at least 1.
        alpha: weight of the variance, 0 or more.
    """

    name = "holov"
    needs = frozenset({"features", "vision_attention"})
    vision_layers = (-2,)
    source = "HoloV, arXiv 2510.02912 (NeurIPS 2025)"

    crops: int = 16
    alpha: float = 0.09

    def __post_init__(self) -> None:
        self.require(self.crops >= 1 and self.alpha >= 0, "crops=16, at least 1, and alpha=0.09, 0 or more")

    def select(self, tokens: VisualTokens) -> Selection:
        looked, device = cls_attention(tokens, -2), tokens.device
        crops = min(self.crops, tokens.n)
        long, over = -(-tokens.n // crops), tokens.n % crops
        # [crops, long] places of each crop's tokens; the last of a shorter one is padding.
        sizes = torch.full((crops,), tokens.n // crops)
        sizes[:over] += 1
        starts = sizes.cumsum(0) - sizes
        places = starts[:, None] + torch.arange(long)
        real, size = onto(torch.arange(long) < sizes[:, None], device), onto(sizes, device)
        places = onto(places.clamp(max=tokens.n - 1), device)

        attention = 1e3 * looked[places] * real  # the scale is the code's, for its epsilon
        rows = normalize(tokens.features.float(), dim=-1)[places] * real[..., None]
        cosine = rows @ rows.transpose(1, 2)
        cosine = cosine * ~torch.eye(long, dtype=torch.bool, device=device)
        others = (size - 1).clamp(min=1)[:, None]
        mean = cosine.sum(dim=2) / others
        variance = ((cosine - mean[..., None]).square() * real[:, None]).sum(dim=2) / others * real
        mean_attention, mean_variance = attention.sum(dim=1) / size, variance.sum(dim=1) / size
        scaled = variance * (mean_attention / (mean_variance + EPS))[:, None]
        weight = (attention + self.alpha * scaled).sum(dim=1) / size
        weight = weight / (weight.sum() + EPS)

        count = (weight * tokens.keep).floor()
        place = torch.empty_like(count)
        ranks = torch.arange(crops, device=device, dtype=count.dtype)
        place[torch.sort(weight, descending=True, stable=True).indices] = ranks
        count = count + (place < tokens.keep - count.sum())
        order = torch.sort(attention.masked_fill(~real, -1), dim=1, descending=True, stable=True).indices
        within = torch.empty_like(order).scatter_(1, order, torch.arange(long, device=device).expand(crops, -1))
        chosen = (within < count[:, None]) & real
        # Whoever is chosen comes ahead of all that are not.
        first = torch.zeros_like(looked).scatter_add_(0, places.flatten(), chosen.flatten().to(looked.dtype))
        return Selection(top_k(first * (1 + looked.amax()) + looked, tokens.keep), tokens.n, sound=True)
