"""MustDrop, all of it: merge and drop before the language model, then drop what no text token looks at."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from gripvlm.pruners.base import LLMPruner, top_k
from gripvlm.pruners.input.mustdrop import MustDrop
from gripvlm.pruners.ops.attention import cls_attention, text_attention
from gripvlm.pruners.ops.schedules import entering_tokens, pyramid_schedule, same_depths
from gripvlm.types import LLMTokens, Selection, VisualTokens


@dataclass(frozen=True)
class MustDropLLM(LLMPruner):
    """Multi-stage dropping (arXiv 2411.10803): vision, prefill and, with `decode`, decoding; see `mustdrop`.

    Prefill: before each of the `layers`, 3, 7, 11 and 15 of 32, with a_tv the attention of text token t on visual
    token v in the layer before, the mean over heads, v goes where sum_t a_tv < g sum_tv a_tv and max_t a_tv < i, both.
    The tokens that the vision stage always keeps stay.

    Decoding, the output-aware cache policy: once the prompt has run, what the last drop has not kept goes from the
    caches of the layer before the first drop and those after it, so that the answer is written from the same
    tokens in all of these layers. Layers before that keep theirs.

    1. k is exact: g and i are scaled by one factor, at each layer the one that leaves k tokens. So tokens rank by
       max(share_v / ratio, max_t a_tv), ratio = g / i. Published pairs have ratios 1, 1.2 and 1.1.
    2. `keep` is the average over layers: `first` x keep rows enter, and the same share goes on at each layer. For large
       budgets all rows enter, for small ones fewer than `first` x keep, so that one is left.
    3. If more tokens are always kept than k, the best ranked of these stay.
    4. Without text after the image, the attention of the prompt's last token.
    5. The decoding stage is off by default: `keep` is what the prompt's layers see, and it comes on top. The first
       layer's cache is never shortened, since positions are counted by it.

    Attributes:
        ratio: g / i.
        first: rows that enter, as a multiple of keep, at least 1; the paper's depends on the image.
        layers: of a model of 32; other depths drop at the same relative ones.
        tau, keys: see `mustdrop`.
        decode: also the decoding stage.
    """

    name = "mustdrop_llm"
    needs = frozenset({"features", "grid", "vision_attention"})
    vision_layers = (-1,)
    llm_needs = frozenset({"question", "last"})
    source = "MustDrop (decode=True: all stages), arXiv 2411.10803"

    ratio: float = 1.1
    first: float = 1.5
    layers: tuple[int, ...] = (3, 7, 11, 15)
    tau: float = 0.8
    keys: float = 0.08
    decode: bool = False

    def __post_init__(self) -> None:
        valid = self.ratio > 0 and self.first >= 1 and 0 <= self.keys <= 1
        self.require(valid, "ratio=1.1, above 0, first=1.5, at least 1, and keys=0.08, in [0, 1]")

    def schedule(self, n: int, keep: int, num_layers: int) -> dict[int, int]:
        layers = same_depths(self.layers, 32, num_layers)
        enter = entering_tokens(n, keep, num_layers, layers[0], self.first)
        return {0: enter, **pyramid_schedule(self.name, enter, keep, num_layers, layers)}

    def evict_after_prefill(self, num_layers: int) -> int | None:
        # At least 1: positions of decoded tokens are counted by the first layer's cache.
        return max(1, same_depths(self.layers, 32, num_layers)[0] - 1) if self.decode else None

    def select(self, tokens: VisualTokens) -> Selection:
        return MustDrop(self.tau, self.keys).select(tokens)

    def select_at_layer(self, layer: int, tokens: LLMTokens) -> Selection:
        attention = text_attention(tokens).float().mean(dim=0)  # [t, n]
        # The clamp: a text that looks at no token at all has no shares, and must not divide by 0.
        share = attention.sum(dim=0) / attention.sum().clamp(min=torch.finfo(attention.dtype).tiny)
        scores = torch.maximum(share / self.ratio, attention.amax(dim=0))
        saliency = cls_attention(tokens.input, -1)
        always = top_k(saliency, math.ceil(self.keys * saliency.numel() - 1e-9)).to(tokens.rows.device)
        # Lifts the ones that always stay above all others, and keeps their order among themselves.
        value = scores + torch.isin(tokens.rows, always).to(scores) * (1 + scores.max() - scores.min())
        return Selection(top_k(value, tokens.keep), tokens.n, scores)
