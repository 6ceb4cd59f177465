"""DART: after a layer of the language model, a few pivots and the tokens that duplicate them least."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from gripvlm.errors import PrunerError
from gripvlm.pruners.base import Selection
from gripvlm.pruners.dart_input import least_duplicates
from gripvlm.pruners.layered import LayerPruner, LayerTokens, Schedule, one_cut

__all__ = ["DART"]


@dataclass(frozen=True)
class DART(LayerPruner):
    """Duplication-aware reduction (arXiv 2502.11494) before layer `layer` of the language model.

    Image pivots: the tokens whose keys have the largest L1 norm. Each pivot, of image and text, adds an
    equal share of the tokens: those whose hidden states have the smallest cosine to its own.

    1. `keep` is the average over layers: what goes on after the cut is solved from it.
    2. Keys are those of the layer before, the mean over heads. Text pivots are the text tokens whose hidden
       states have the largest L1 norm: their keys are not among what a pruner gets.
    3. k is exact; ties go to the lower index; kept tokens stay at their positions, as in the code.

    Attributes:
        layer: 1 or more; 2 as in the code.
        pivots: image pivots, at least 1.
        text_pivots: text pivots.
    """

    name: ClassVar[str] = "dart"
    needs: ClassVar[frozenset[str]] = frozenset()
    layer_needs: ClassVar[frozenset[str]] = frozenset({"hidden", "keys", "question"})
    source: ClassVar[str] = "DART, arXiv 2502.11494 (EMNLP 2025)"

    layer: int = 2
    pivots: int = 4
    text_pivots: int = 4

    def __post_init__(self) -> None:
        if self.pivots < 1 or self.text_pivots < 0:
            raise PrunerError(f"dart: type pivots=4, at least 1, and text_pivots=4, 0 or more; got {self}")

    def schedule(self, n: int, keep: int, layers: int) -> Schedule:
        return one_cut(self.name, n, keep, layers, self.layer)

    def select_at(self, layer: int, tokens: LayerTokens) -> Selection:
        assert tokens.hidden is not None  # promised by `layer_needs`
        assert tokens.keys is not None
        assert tokens.text is not None
        size = tokens.keys.float().abs().sum(dim=1)
        chosen = least_duplicates(size, tokens.hidden, tokens.text, tokens.keep, self.pivots, self.text_pivots)
        return Selection(chosen, tokens.n)
