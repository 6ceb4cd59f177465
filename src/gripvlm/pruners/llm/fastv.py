"""FastV: after a few layers of the language model, keep what the prompt's last token looks at."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gripvlm.pruners.base import LLMScorePruner
from gripvlm.pruners.ops.attention import last_token_attention
from gripvlm.types import LLMTokens


@dataclass(frozen=True)
class FastV(LLMScorePruner):
    """Ranks visual tokens by attention in layer K and drops the lowest before the next (arXiv 2403.06764).

    score_j = mean over heads of the attention of the prompt's last token on token j, in the layer whose
    output enters layer `layer` (counted from 0): the first `layer` layers see every token.

    1. The paper says "received from all other tokens"; its code takes the last token's row, and so does this.
    2. Of 576 tokens with 32 layers, keep=192, 128 and 64 leave 166, 98 and 30.
    3. Each image has its own budget; the code ranks the tokens of all images together.

    Attributes:
        layer: rows are dropped before it, 1 or more; the paper's K = 2.
    """

    name = "fastv"
    source = "FastV, arXiv 2403.06764 (ECCV 2024)"

    layer: int = 2

    def score_at_layer(self, layer: int, tokens: LLMTokens) -> Tensor:
        return last_token_attention(tokens)
