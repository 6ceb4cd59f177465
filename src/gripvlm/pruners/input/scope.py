"""SCOPE: keep salient tokens that stand for what the kept ones do not cover yet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from gripvlm.pruners.ops.attention import cls_attention
from gripvlm.pruners.ops.pairwise import GreedyPruner, padding_of
from gripvlm.types import VisualTokens
from gripvlm.utils.batching import padded


@dataclass(frozen=True)
class SCOPE(GreedyPruner):
    """Saliency and coverage (arXiv 2510.24214): one token after the other, argmax_j gain_j x saliency_j^alpha.

    gain_j = sum_i max(0, cos(x_i, x_j) - c_i): what j adds to the coverage of all tokens i, c_i the largest cosine of i
    to a kept one, 0 at first. Rows are the vision tower's, before the projector; saliency is the attention of its CLS
    token in the block before the last, the mean over heads. O(k n^2).

    Attributes:
        alpha: 1 as in the code; 0 is coverage alone.
    """

    name = "scope"
    needs = frozenset({"patches", "vision_attention"})
    vision_layers = (-2,)
    source = "SCOPE, arXiv 2510.24214 (NeurIPS 2025)"

    alpha: float = 1.0

    def __post_init__(self) -> None:
        self.require(self.alpha >= 0, "alpha=1.0, 0 or more")

    def compared(self, tokens: VisualTokens) -> Tensor:
        assert tokens.patches is not None  # promised by `needs`
        return normalize(tokens.patches.float(), dim=-1)

    def pick(self, images: Sequence[VisualTokens], rows: Sequence[Tensor], cosine: Tensor) -> Tensor:
        saliency = padded([cls_attention(tokens, -2) for tokens in images]) ** self.alpha  # [B, n]
        taken = padding_of(images).clone()
        covered = torch.zeros_like(cosine[:, 0])  # [B, n]
        batch = torch.arange(len(images), device=cosine.device)
        most = max(tokens.keep for tokens in images)
        picks = torch.empty(len(images), most, dtype=torch.long, device=cosine.device)
        for step in range(most):
            gain = (cosine - covered[..., None]).clamp_(min=0).sum(dim=1)
            picks[:, step] = pick = (gain * saliency).masked_fill(taken, -torch.inf).argmax(dim=1)
            taken.scatter_(1, pick[:, None], True)
            covered = torch.maximum(covered, cosine[batch, pick])
        return picks
