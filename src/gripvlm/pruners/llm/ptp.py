"""PTP: regions, salient tokens and the instruction decide together, after a few layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from gripvlm.errors import PrunerError
from gripvlm.pruners.input.ptp_vision import best_of_regions, checked, region_budgets, saliency
from gripvlm.pruners.llm_base import LLMPruner, Schedule, least_of_one_cut, one_cut
from gripvlm.pruners.ops.apportion import nearest
from gripvlm.pruners.ops.saliency import min_max
from gripvlm.types import LLMTokens, Selection, VisualTokens

__all__ = ["PTP"]


@dataclass(frozen=True)
class PTP(LLMPruner):
    """Pyramid token pruning (arXiv 2509.15704), all three levels: see `ptp_vision` for the first two.

    Instruction: c_j = max over text tokens of their attention on token j, the mean over heads, in the layer
    before `layer`, scaled to [0, 1] over the tile. Kept are the tokens with the largest
    f = (1 - alpha) b + alpha c, each region as many as its saliency b earns.

    1. `keep` is the average over layers: what goes on after the cut is solved from it, and that is what the
       regions share; each pays for all its rows before. Without text after the image, c = 0.
    2. b and c are both scaled; unscaled, c is about 1e-3 and alpha hardly matters.
    3. Departures 1 to 3 of `ptp_vision`.

    Attributes:
        alpha: weight of the instruction, in [0, 1].
        layer: 1 or more; the paper's 2.
        region_rule, thumbnail, windows: see `ptp_vision`.
    """

    name: ClassVar[str] = "ptp"
    llm_needs: ClassVar[frozenset[str]] = frozenset({"question"})
    vision_layers: ClassVar[tuple[int, ...]] = (-2,)
    source: ClassVar[str] = "PTP, arXiv 2509.15704"

    alpha: float = 0.5
    layer: int = 2
    region_rule: str = "mean_saliency"
    thumbnail: int = -1
    windows: int = 1

    def __post_init__(self) -> None:
        checked(self.name, self.region_rule, self.windows)
        if not 0 <= self.alpha <= 1:
            raise PrunerError(f"ptp: alpha={self.alpha} must be in [0, 1]: type alpha=0.5")

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({"features", "vision_attention"} | ({"grid"} if self.windows > 1 else set()))

    def allocate_budget_over(self, sample: Sequence[VisualTokens], layers: int) -> list[int]:
        after = [self.schedule(tokens.n, tokens.keep, layers)[self.layer] for tokens in sample]
        asked = [replace(tokens, keep=count) for tokens, count in zip(sample, after, strict=True)]
        counts = region_budgets(asked, self.region_rule, self.thumbnail)
        sizes = [tokens.n for tokens in sample]
        paid = [(self.layer * n + (layers - self.layer) * k) / layers for n, k in zip(sizes, counts, strict=True)]
        least = [least_of_one_cut(n, layers, self.layer) for n in sizes]
        return nearest(sum(tokens.keep for tokens in sample), paid, least, sizes)

    def schedule(self, n: int, keep: int, layers: int) -> Schedule:
        return one_cut(self.name, n, keep, layers, self.layer)

    def select_at_layer(self, layer: int, tokens: LLMTokens) -> Selection:
        assert tokens.question is not None  # promised by `llm_needs`
        assert tokens.after is not None
        base = saliency(tokens.input)[tokens.rows]
        asked = torch.zeros_like(base)
        if bool(tokens.after.any()):
            asked = min_max(tokens.question.float().mean(dim=0).amax(dim=0)).to(base.device)
        scores = (1 - self.alpha) * base + self.alpha * asked
        kept = best_of_regions(scores, base, tokens.keep, tokens.input.grid, self.windows)
        return Selection(kept.nonzero().flatten(), tokens.n, scores)
