"""VScan: a scan of the image after the encoder, and a second cut in the middle of the language model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from gripvlm.errors import PrunerError
from gripvlm.pruners.base import top_k
from gripvlm.pruners.input.vscan_vision import scan
from gripvlm.pruners.llm_base import LLMPruner, Schedule, one_cut
from gripvlm.pruners.ops.depths import at_depths
from gripvlm.types import LLMTokens, Selection, VisualTokens

__all__ = ["VScan"]


@dataclass(frozen=True)
class VScan(LLMPruner):
    """Both stages of VScan (arXiv 2505.22654): see `vscan_vision` for the first.

    Second: before the layer `cut` of 32, the tokens with the largest attention of the prompt's last token
    go on, the mean over heads.

    1. `keep` is the average over layers. `first` x keep rows enter the language model, and the second
       stage makes up for it: 96 and then 32 for 64, as published.
    2. For large budgets all rows enter, for small ones fewer than `first` x keep, so that one is left.
    3. Attention is that of the layer before the cut.

    Attributes:
        first: rows that enter, as a multiple of keep, at least 1.
        cut: layer of a model of 32; other depths cut at the same relative one.
        local, window, shallow, merge: see `vscan_vision`.
    """

    name: ClassVar[str] = "vscan"
    needs: ClassVar[frozenset[str]] = frozenset({"features", "grid", "vision_attention"})
    llm_needs: ClassVar[frozenset[str]] = frozenset({"last"})
    source: ClassVar[str] = "VScan, arXiv 2505.22654"

    first: float = 1.5
    cut: int = 16
    local: float = 0.5
    window: int = 6
    shallow: int = 5
    merge: bool = True

    def __post_init__(self) -> None:
        if self.first < 1 or not 0 <= self.local <= 1 or self.window < 1:
            raise PrunerError(f"vscan: type first=1.5, at least 1, local=0.5, in [0, 1], and window=6; got {self}")

    @property
    def vision_layers(self) -> tuple[int, ...]:  # type: ignore[override]
        return (self.shallow, -2)

    def schedule(self, n: int, keep: int, layers: int) -> Schedule:
        cut = at_depths((self.cut,), 32, layers)[0]
        most = (layers * keep - (layers - cut)) // cut  # leaves one row after the cut
        enter = max(keep, min(n, int(self.first * keep + 0.5), most))
        return {0: enter, **one_cut(self.name, enter, keep, layers, cut)}

    def select(self, tokens: VisualTokens) -> Selection:
        return scan(tokens, self.local, self.window, self.shallow, self.merge)

    def select_at_layer(self, layer: int, tokens: LLMTokens) -> Selection:
        assert tokens.last is not None  # promised by `llm_needs`
        scores = tokens.last.float().mean(dim=0)
        return Selection(top_k(scores, tokens.keep), tokens.n, scores)
