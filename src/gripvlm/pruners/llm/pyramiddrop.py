"""PyramidDrop: drop visual tokens in stages, each time those that the last token looks at least."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from gripvlm.pruners.base import top_k
from gripvlm.pruners.llm_base import LLMPruner, Schedule, geometric_cuts
from gripvlm.pruners.ops.depths import at_depths
from gripvlm.types import LLMTokens, Selection

__all__ = ["PyramidDrop"]


@dataclass(frozen=True)
class PyramidDrop(LLMPruner):
    """Pyramid visual redundancy reduction (arXiv 2410.17247), as for inference.

    Before the layers 8, 16 and 24 of 32 the same share of the tokens goes on, those with the largest
    attention of the prompt's last token, the mean over heads.

    1. `keep` is the average over layers and the share is solved from it. The paper's share of a half
       gives 288, 144 and 72 of 576, 270 on average.
    2. Attention is that of the layer before the cut; the code recomputes the one query with the
       queries and keys of the layer after it.
    3. Each image has its own budget. Kept tokens stay at their positions; the code counts anew.

    Attributes:
        cuts: layers of a model of 32; other depths cut at the same relative ones.
    """

    name: ClassVar[str] = "pyramiddrop"
    needs: ClassVar[frozenset[str]] = frozenset()
    llm_needs: ClassVar[frozenset[str]] = frozenset({"last"})
    source: ClassVar[str] = "PyramidDrop, arXiv 2410.17247 (CVPR 2025)"

    cuts: tuple[int, ...] = (8, 16, 24)

    def schedule(self, n: int, keep: int, layers: int) -> Schedule:
        return geometric_cuts(self.name, n, keep, layers, at_depths(self.cuts, 32, layers))

    def select_at_layer(self, layer: int, tokens: LLMTokens) -> Selection:
        assert tokens.last is not None  # promised by `llm_needs`
        scores = tokens.last.float().mean(dim=0)
        return Selection(top_k(scores, tokens.keep), tokens.n, scores)
