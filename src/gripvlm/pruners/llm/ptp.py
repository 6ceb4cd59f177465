"""PTP (arXiv 2509.15704): salient regions, salient tokens, and what the instruction attends to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gripvlm.pruners.base import LLMScorePruner, ScorePruner
from gripvlm.pruners.ops.apportion import apportion, nearest
from gripvlm.pruners.ops.attention import cls_attention
from gripvlm.pruners.ops.ranking import min_max
from gripvlm.pruners.ops.schedules import least_keep
from gripvlm.types import LLMTokens, VisualTokens


@dataclass(frozen=True)
class PTPVision(ScorePruner):
    """A budget for every region, then the salient tokens of each.

    Region: tile t of a prompt's budget K gets K z_t / sum z, z_t the mean saliency of its tokens. Token: inside a tile,
    the tokens with the largest saliency b_j, the CLS attention in the block before the last, scaled to [0, 1].

    1. How the paper weighs regions is not known for certain. Raw attention sums to 1 in every tile, so its mean says
       nothing; z_t is the mean of the scaled b.
    2. The tiles are the images of the prompt (for tiled families one item each). Each keeps at least one token.
    """

    name = "ptp_vision"
    needs = frozenset({"features", "vision_attention"})
    vision_layers = (-2,)
    source = "PTP (region and token levels), arXiv 2509.15704"

    def score(self, tokens: VisualTokens) -> Tensor:
        return min_max(cls_attention(tokens, -2))

    def allocate_budget(self, images: Sequence[VisualTokens], num_layers: int) -> list[int]:
        weights = [float(self.score(tokens).mean()) for tokens in images]
        return apportion(sum(tokens.keep for tokens in images), weights, [tokens.n for tokens in images])


@dataclass(frozen=True)
class PTP(LLMScorePruner):
    """Regions, salient tokens and the instruction decide together, after a few layers.

    c_j = max over text tokens of their attention on token j, the mean over heads, in the layer before `layer`, scaled
    to [0, 1] over the tile. Kept are the tokens with the largest (1 - alpha) b + alpha c, b as in `ptp_vision`; each
    region keeps as many as its saliency earns there.

    1. The regions share what is left from `layer` on; each pays for all its rows before.
    2. b and c are both scaled; unscaled, c is about 1e-3 and alpha hardly matters.
    3. Without text after the image, c = 0.
    4. Departures 1 and 2 of `ptp_vision`.

    Attributes:
        alpha: weight of the instruction, in [0, 1].
        layer: 1 or more; the paper's 2.
    """

    name = "ptp"
    needs = PTPVision.needs
    llm_needs = frozenset({"question"})
    vision_layers = PTPVision.vision_layers
    source = "PTP, arXiv 2509.15704"

    alpha: float = 0.5
    layer: int = 2

    def __post_init__(self) -> None:
        self.require(0 <= self.alpha <= 1, "alpha=0.5, in [0, 1]")

    def allocate_budget(self, images: Sequence[VisualTokens], num_layers: int) -> list[int]:
        # Regions share what is left from `layer` on; the budget counts the average over layers, so convert both ways.
        after = [self.schedule(tokens.n, tokens.keep, num_layers)[self.layer] for tokens in images]
        later = [replace(tokens, keep=count) for tokens, count in zip(images, after, strict=True)]
        counts = PTPVision().allocate_budget(later, num_layers)
        paid, least = [], []
        for tokens, count in zip(images, counts, strict=True):
            paid.append((self.layer * tokens.n + (num_layers - self.layer) * count) / num_layers)
            least.append(least_keep(tokens.n, num_layers, self.layer))
        # Converted back, counts are fractions, and an image cannot pay less than for its rows before `layer`.
        return nearest(sum(tokens.keep for tokens in images), paid, least, [tokens.n for tokens in images])

    def score_at_layer(self, layer: int, tokens: LLMTokens) -> Tensor:
        assert tokens.question is not None
        assert tokens.after is not None
        saliency = PTPVision().score(tokens.input)[tokens.rows]
        instruction = torch.zeros_like(saliency)
        # Text ahead of the image does not see it: its attention would be all zeros.
        if bool(tokens.after.any()):
            instruction = min_max(tokens.question.float().mean(dim=0).amax(dim=0)).to(saliency.device)
        return (1 - self.alpha) * saliency + self.alpha * instruction
