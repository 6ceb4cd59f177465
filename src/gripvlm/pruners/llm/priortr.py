"""PriorTR: keep what the question looks at more than a token that has not read it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gripvlm.pruners.base import LLMScorePruner
from gripvlm.pruners.ops.attention import last_token_attention, text_attention
from gripvlm.pruners.ops.schedules import one_layer_schedule, same_depths
from gripvlm.types import LLMTokens

EPS = 1e-10


@dataclass(frozen=True)
class PriorTR(LLMScorePruner):
    """Prior-corrected token reduction (arXiv 2606.24156): score_j = P_j log(P_j / Q_j).

    P is the attention of the text after the image, the mean over tokens and heads, Q that of the null token: the first
    text token after the image, which sees the image but nothing of the question. Both in the layer before, and each
    scaled to a sum of 1 over the image's tokens. Before the layer `layer` the k with the largest score stay.

    1. `keep` is the average over layers; the code's 192, 128 and 64 are what is left from layer 3 on.
    2. Special tokens are not read, as they are in the code, where in Qwen's models one of them is the null token.
    3. Without text after the image there is no prior, and the attention of the prompt's last token ranks.

    Attributes:
        last: P of the prompt's last token alone, as in the code for LLaVA-1.6 and Qwen; else as for LLaVA-1.5 and
            InternVL.
        layer: of a model of 32; other depths drop at the same relative one.
    """

    name = "priortr"
    llm_needs = frozenset({"last", "question"})
    source = "PriorTR, arXiv 2606.24156 (ECCV 2026)"

    last: bool = False
    layer: int = 3

    def schedule(self, n: int, keep: int, num_layers: int) -> dict[int, int]:
        layer = same_depths((self.layer,), 32, num_layers)[0]
        return one_layer_schedule(self.name, n, keep, num_layers, layer)

    def score_at_layer(self, layer: int, tokens: LLMTokens) -> Tensor:
        assert tokens.after is not None
        text = text_attention(tokens).float().mean(dim=0)  # [t, n]
        task = last_token_attention(tokens) if self.last else text.mean(dim=0)
        if not bool(tokens.after.any()):
            return task
        task, prior = (part / (part.sum() + EPS) for part in (task, text[0]))
        return task * ((task + EPS) / (prior + EPS)).log()
