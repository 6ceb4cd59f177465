"""PTP: regions, salient tokens and the instruction decide together, after a few layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from gripvlm.pruners.base import LLMPruner
from gripvlm.pruners.input.ptp_vision import PTPVision, best_of_regions, saliency
from gripvlm.pruners.ops.apportion import nearest
from gripvlm.pruners.ops.ranking import min_max
from gripvlm.pruners.ops.schedules import least_keep
from gripvlm.types import LLMTokens, Selection, VisualTokens


@dataclass(frozen=True)
class PTP(LLMPruner):
    """Pyramid token pruning (arXiv 2509.15704), all three levels: see `ptp_vision` for the first two.

    Instruction: c_j = max over text tokens of their attention on token j, the mean over heads, in the layer
    before `layer`, scaled to [0, 1] over the tile. Kept are the tokens with the largest
    f = (1 - alpha) b + alpha c, each region as many as its saliency b earns.

    1. `keep` is the average over layers: what goes on from `layer` on is solved from it, and that is what the
       regions share; each pays for all its rows before. Without text after the image, c = 0.
    2. b and c are both scaled; unscaled, c is about 1e-3 and alpha hardly matters.
    3. Departures 1 to 3 of `ptp_vision`.

    Attributes:
        alpha: weight of the instruction, in [0, 1].
        layer: 1 or more; the paper's 2.
        region_rule, thumbnail, windows: see `ptp_vision`.
    """

    name = "ptp"
    llm_needs = frozenset({"question"})
    vision_layers = (-2,)
    source = "PTP, arXiv 2509.15704"

    alpha: float = 0.5
    layer: int = 2
    region_rule: str = "mean_saliency"
    thumbnail: int = -1
    windows: int = 1

    def __post_init__(self) -> None:
        self.require(0 <= self.alpha <= 1, "alpha=0.5, in [0, 1]")
        _ = self.vision  # refuses what the two visual levels cannot do

    @property
    def vision(self) -> PTPVision:
        """The two visual levels."""
        return PTPVision(self.region_rule, self.thumbnail, self.windows)

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return self.vision.needs

    def allocate_budget(self, images: Sequence[VisualTokens], num_layers: int) -> list[int]:
        # Regions share what is left from `layer` on; the budget counts the average over layers, so convert both ways.
        after = [self.schedule(tokens.n, tokens.keep, num_layers)[self.layer] for tokens in images]
        later = [replace(tokens, keep=count) for tokens, count in zip(images, after, strict=True)]
        counts = self.vision.allocate_budget(later, num_layers)
        paid, least = [], []
        for tokens, count in zip(images, counts, strict=True):
            paid.append((self.layer * tokens.n + (num_layers - self.layer) * count) / num_layers)
            least.append(least_keep(tokens.n, num_layers, self.layer))
        return nearest(sum(tokens.keep for tokens in images), paid, least, [tokens.n for tokens in images])

    def select_at_layer(self, layer: int, tokens: LLMTokens) -> Selection:
        assert tokens.question is not None
        assert tokens.after is not None
        base = saliency(tokens.input)[tokens.rows]
        instruction = torch.zeros_like(base)
        # Text ahead of the image does not see it: its attention would be all zeros.
        if bool(tokens.after.any()):
            instruction = min_max(tokens.question.float().mean(dim=0).amax(dim=0)).to(base.device)
        scores = (1 - self.alpha) * base + self.alpha * instruction
        kept = best_of_regions(scores, base, tokens.keep, tokens.input.grid, self.windows)
        return Selection(kept.nonzero().flatten(), tokens.n, scores)
