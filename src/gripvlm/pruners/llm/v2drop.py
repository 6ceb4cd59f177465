"""V2Drop: drop in stages the visual tokens that a layer of the language model changes least."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gripvlm.pruners.base import LLMScorePruner
from gripvlm.pruners.ops.schedules import ratio_schedule, same_depths
from gripvlm.types import LLMTokens


@dataclass(frozen=True)
class V2Drop(LLMScorePruner):
    """Variation-aware dropping (arXiv 2509.01552): score_j = |h_j - h'_j|, L2.

    h_j are the hidden states that enter a layer, h'_j those that entered the layer before. Before the layers 3 and 17
    of 32 the tokens with the largest score stay, half as many at the second; before layer 22 one stays.

    1. How many stay at layer 3 is solved from `keep`. The code keeps 288, 144 and 1 of 576, 202.8 on average. Where
       `keep` is more than these stages can use, the later ones keep more.

    Attributes:
        layers: three, of a model of 32; other depths drop at the same relative ones.
    """

    name = "v2drop"
    llm_needs = frozenset({"hidden", "before"})
    source = "V2Drop, arXiv 2509.01552 (CVPR 2026)"

    layers: tuple[int, ...] = (3, 17, 22)

    def __post_init__(self) -> None:
        self.require(len(self.layers) == 3 and min(self.layers) >= 1, "layers=(3,17,22), three of 1 or more")

    def schedule(self, n: int, keep: int, num_layers: int) -> dict[int, int]:
        layers = same_depths(sorted(self.layers), 32, num_layers)
        return ratio_schedule(self.name, n, keep, num_layers, dict(zip(layers, (1.0, 0.5, 0.0), strict=False)))

    def score_at_layer(self, layer: int, tokens: LLMTokens) -> Tensor:
        assert tokens.hidden is not None
        assert tokens.before is not None
        return (tokens.hidden.float() - tokens.before.float()).norm(dim=-1)
