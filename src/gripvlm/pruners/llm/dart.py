"""DART: after a layer of the language model, a few pivots and the tokens that duplicate them least."""

from __future__ import annotations

from dataclasses import dataclass

from gripvlm.pruners.base import LLMPruner, top_k
from gripvlm.pruners.input.dart_input import least_duplicates
from gripvlm.types import LLMTokens, Selection


@dataclass(frozen=True)
class DART(LLMPruner):
    """Duplication-aware reduction (arXiv 2502.11494) before layer `layer` of the language model.

    Pivots: the image's tokens, and the text tokens after the image, whose keys in the layer before have the largest
    L1 norm, over all heads. Each pivot adds an equal share of the tokens: those with the smallest cosine to it, of
    the hidden states after the model's last norm.

    1. `keep` is the average over layers: what goes on from `layer` on is solved from it.
    2. Pivots take their shares in raster order, the image's before the text's. The code goes through a Python set
       of positions, whose order is that of hashes.
    3. Special tokens are no pivots, as they are in the code. Without text after the image, where the code stops, the
       image pivots share k.
    4. k is exact, where the code keeps 4 + 8 (k // 8); ties go to the lower index; kept tokens stay at their
       positions, as in the code.

    Attributes:
        layer: 1 or more; 2 as in the code.
        pivots: image pivots, at least 1.
        text_pivots: text pivots.
    """

    name = "dart"
    llm_needs = frozenset({"hidden", "text", "key_sizes", "norm"})
    source = "DART, arXiv 2502.11494 (EMNLP 2025)"

    layer: int = 2
    pivots: int = 4
    text_pivots: int = 4

    def __post_init__(self) -> None:
        self.require(self.pivots >= 1 and self.text_pivots >= 0, "pivots=4, at least 1, and text_pivots=4, 0 or more")

    def select_at_layer(self, layer: int, tokens: LLMTokens) -> Selection:
        assert tokens.hidden is not None
        assert tokens.norm is not None
        assert tokens.key_sizes is not None
        assert tokens.text is not None
        assert tokens.after is not None
        assert tokens.text_key_sizes is not None
        states, text = tokens.norm(tokens.hidden), tokens.norm(tokens.text[tokens.after])
        # Pivots by keys of the layer before, likeness by states after the last norm: as in the code.
        image_pivots = top_k(tokens.key_sizes, min(self.pivots, tokens.keep))
        text_pivots = top_k(tokens.text_key_sizes[tokens.after], min(self.text_pivots, text.shape[0]))
        return Selection(least_duplicates(states, image_pivots, text[text_pivots], tokens.keep), tokens.n)
