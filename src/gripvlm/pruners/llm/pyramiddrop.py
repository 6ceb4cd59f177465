"""PyramidDrop: drop visual tokens in stages, each time those that the last token looks at least."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gripvlm.pruners.base import LLMScorePruner
from gripvlm.pruners.ops.attention import last_token_attention
from gripvlm.pruners.ops.schedules import pyramid_schedule, same_depths
from gripvlm.types import LLMTokens


@dataclass(frozen=True)
class PyramidDrop(LLMScorePruner):
    """Pyramid visual redundancy reduction (arXiv 2410.17247), as for inference.

    Before the layers 8, 16 and 24 of 32 the same share of the tokens stays, those with the largest attention of the
    prompt's last token, the mean over heads.

    1. The share is solved from `keep`. The paper's share of a half gives 288, 144 and 72 of 576, 270 on average.
    2. Attention is that of the layer before; the code recomputes the one query with the
       queries and keys of the layer after it.
    3. Kept tokens stay at their positions; the code counts anew.

    Attributes:
        layers: of a model of 32; other depths drop at the same relative ones.
    """

    name = "pyramiddrop"
    source = "PyramidDrop, arXiv 2410.17247 (CVPR 2025)"

    layers: tuple[int, ...] = (8, 16, 24)

    def schedule(self, n: int, keep: int, num_layers: int) -> dict[int, int]:
        return pyramid_schedule(self.name, n, keep, num_layers, same_depths(self.layers, 32, num_layers))

    def score_at_layer(self, layer: int, tokens: LLMTokens) -> Tensor:
        return last_token_attention(tokens)
