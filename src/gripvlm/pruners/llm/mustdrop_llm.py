"""MustDrop, all of it: merge and cut before the language model, then drop what no text token looks at."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from gripvlm.errors import PrunerError
from gripvlm.pruners.base import top_k
from gripvlm.pruners.input.mustdrop import MustDrop
from gripvlm.pruners.llm_base import LLMPruner, Schedule, geometric_cuts
from gripvlm.pruners.ops.depths import at_depths
from gripvlm.pruners.ops.saliency import looked_at
from gripvlm.types import LLMTokens, Selection, VisualTokens

__all__ = ["MustDropLLM"]


@dataclass(frozen=True)
class MustDropLLM(LLMPruner):
    """Multi-stage dropping (arXiv 2411.10803): vision, prefill and, with `decode`, decoding; see `mustdrop`.

    Prefill: before each of the layers `cuts`, 3, 7, 11 and 15 of 32, with a_tv the attention of text token t on visual
    token v in the layer before, the mean over heads, v goes where sum_t a_tv < g sum_tv a_tv and max_t a_tv < i, both.
    The tokens that the vision stage always keeps stay.

    Decoding, the output-aware cache policy: once the prompt has run, what the last cut has not kept goes from the
    caches of the layer before the first cut and those after it, so that the answer is written from the same
    tokens in all of these layers. Layers before that keep theirs.

    1. k is exact: g and i are scaled by one factor, at each cut the one that leaves k tokens. So tokens rank by
       max(share_v / ratio, max_t a_tv), ratio = g / i. Published pairs have ratios 1, 1.2 and 1.1.
    2. `keep` is the average over layers: `first` x keep rows enter, and the same share goes on at each cut. For
       large budgets all rows enter, for small ones fewer than `first` x keep, so that one is left.
    3. If more tokens are always kept than k, the best ranked of these stay.
    4. Without text after the image, the attention of the prompt's last token.
    5. The decoding stage is off by default: `keep` is what the prompt's layers see, and it comes on top. The first
       layer's cache is never shortened, since positions are counted by it.

    Attributes:
        ratio: g / i.
        first: rows that enter, as a multiple of keep, at least 1; the paper's depends on the image.
        cuts: layers of a model of 32; other depths cut at the same relative ones.
        tau, keys: see `mustdrop`.
        decode: also the decoding stage.
    """

    name: ClassVar[str] = "mustdrop_llm"
    needs: ClassVar[frozenset[str]] = frozenset({"features", "grid", "vision_attention"})
    vision_layers: ClassVar[tuple[int, ...]] = (-1,)
    llm_needs: ClassVar[frozenset[str]] = frozenset({"question", "last"})
    source: ClassVar[str] = "MustDrop (decode=True: all stages), arXiv 2411.10803"

    ratio: float = 1.1
    first: float = 1.5
    cuts: tuple[int, ...] = (3, 7, 11, 15)
    tau: float = 0.8
    keys: float = 0.08
    decode: bool = False

    def __post_init__(self) -> None:
        if self.ratio <= 0 or self.first < 1 or not 0 <= self.keys <= 1:
            raise PrunerError(
                f"mustdrop_llm: type ratio=1.1, above 0, first=1.5, at least 1, and keys=0.08, in [0, 1]; got {self}"
            )

    def schedule(self, n: int, keep: int, layers: int) -> Schedule:
        cuts = at_depths(self.cuts, 32, layers)
        most = (layers * keep - (layers - cuts[0])) // cuts[0]  # leaves one row after the first cut
        enter = max(keep, min(n, int(self.first * keep + 0.5), most))
        return {0: enter, **geometric_cuts(self.name, enter, keep, layers, cuts)}

    def evict_after_prefill(self, layers: int) -> int | None:
        return max(1, at_depths(self.cuts, 32, layers)[0] - 1) if self.decode else None

    def select(self, tokens: VisualTokens) -> Selection:
        return MustDrop(self.tau, self.keys).select(tokens)

    def select_at_layer(self, layer: int, tokens: LLMTokens) -> Selection:
        seen = tokens.asked.float().mean(dim=0)  # [t, n]
        share = seen.sum(dim=0) / seen.sum().clamp(min=torch.finfo(seen.dtype).tiny)
        scores = torch.maximum(share / self.ratio, seen.amax(dim=0))
        looked = looked_at(tokens.input, -1)
        always = top_k(looked, math.ceil(self.keys * looked.numel() - 1e-9)).to(tokens.rows.device)
        value = scores + torch.isin(tokens.rows, always).to(scores) * (1 + scores.max() - scores.min())
        return Selection(top_k(value, tokens.keep), tokens.n, scores)
