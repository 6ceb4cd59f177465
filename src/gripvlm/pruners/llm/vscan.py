"""VScan: a scan of the image after the encoder, and a second one in the middle of the language model."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gripvlm.pruners.base import LLMScorePruner
from gripvlm.pruners.input.vscan_vision import VScanVision
from gripvlm.pruners.ops.attention import last_token_attention
from gripvlm.pruners.ops.schedules import entering_tokens, one_layer_schedule, same_depths
from gripvlm.types import LLMTokens, Selection, VisualTokens


@dataclass(frozen=True)
class VScan(LLMScorePruner):
    """Both stages of VScan (arXiv 2505.22654): see `vscan_vision` for the first.

    Second: before the layer `layer` of 32, the tokens with the largest attention of the prompt's last token
    go on, the mean over heads.

    1. `keep` is the average over layers. `first` x keep rows enter the language model, and the second
       stage makes up for it: 96 and then 32 for 64, as published.
    2. For large budgets all rows enter, for small ones fewer than `first` x keep, so that one is left.
    3. Attention is that of the layer before.

    Attributes:
        first: rows that enter, as a multiple of keep, at least 1.
        layer: of a model of 32; other depths drop at the same relative one.
        local, window, shallow, merge: see `vscan_vision`.
    """

    name = "vscan"
    needs = frozenset({"features", "grid", "vision_attention"})
    source = "VScan, arXiv 2505.22654"

    first: float = 1.5
    layer: int = 16
    local: float = 0.5
    window: int = 6
    shallow: int = 5
    merge: bool = True

    def __post_init__(self) -> None:
        valid = self.first >= 1 and 0 <= self.local <= 1 <= self.window
        self.require(valid, "first=1.5, at least 1, local=0.5, in [0, 1], and window=6, at least 1")

    @property
    def vision_layers(self) -> tuple[int, ...]:  # type: ignore[override]
        return (self.shallow, -2)

    def schedule(self, n: int, keep: int, num_layers: int) -> dict[int, int]:
        layer = same_depths((self.layer,), 32, num_layers)[0]
        enter = entering_tokens(n, keep, num_layers, layer, self.first)
        return {0: enter, **one_layer_schedule(self.name, enter, keep, num_layers, layer)}

    def select(self, tokens: VisualTokens) -> Selection:
        return VScanVision(self.local, self.window, self.shallow, self.merge).select(tokens)

    def score_at_layer(self, layer: int, tokens: LLMTokens) -> Tensor:
        return last_token_attention(tokens)
