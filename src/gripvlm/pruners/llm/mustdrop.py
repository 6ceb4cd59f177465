"""MustDrop (arXiv 2411.10803): merge and drop before the language model, then drop what no text token looks at."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from gripvlm.pruners.base import LLMPruner, Pruner, top_k
from gripvlm.pruners.ops.attention import cls_attention, text_attention
from gripvlm.pruners.ops.merging import mean_merge
from gripvlm.pruners.ops.ranking import descending, window_numbers
from gripvlm.pruners.ops.schedules import entering_tokens, pyramid_schedule, same_depths
from gripvlm.types import LLMTokens, Selection, VisualTokens


def always_kept(scores: Tensor, share: float) -> Tensor:
    """Indices of the ceil(share x n) largest of [n] scores."""
    # 1e-9: 0.28 * 25 is 7.000000000000001 in floats, and means 7.
    return top_k(scores, math.ceil(share * scores.numel() - 1e-9))


@dataclass(frozen=True)
class MustDrop(Pruner):
    """Merge uniform neighbourhoods, always keep what the CLS token looks at.

    The vision stage. The raster is cut into 3 x 3 windows. One whose rows are alike, mean cosine over its 36 pairs
    >= tau, becomes one token, their mean. The ceil(keys x n) tokens with the largest CLS attention in the last block
    are always kept.

    1. Of the tokens and merged windows, the k with the largest attention, a window counting with its mean. If merging
       leaves fewer than k, the least alike windows stay as they are.
    2. A window that holds an always-kept token is not merged. If there are more of these than k, the strongest k stay.
    3. Merging is by the projected rows, once; the paper does it after the tower's first block.
    4. The merged token stands at the window's centre. Only whole windows merge, from the top left.

    Attributes:
        tau: 0.8 as in the authors' code.
        keys: share of all tokens that is always kept.
    """

    name = "mustdrop"
    needs = frozenset({"features", "grid", "vision_attention"})
    vision_layers = (-1,)
    source = "MustDrop (vision stage), arXiv 2411.10803"

    tau: float = 0.8
    keys: float = 0.08

    def __post_init__(self) -> None:
        self.require(0 <= self.keys <= 1, "keys=0.08, in [0, 1]")

    def select(self, tokens: VisualTokens) -> Selection:
        scores = cls_attention(tokens, -1)
        merged = self._alike(tokens, always_kept(scores, self.keys))  # [w, 9]
        # A merged window competes as its centre, with its mean; its other eight tokens are out.
        value = scores.clone()
        value[merged.flatten()] = -torch.inf
        value[merged[:, 4]] = scores[merged].mean(dim=1)
        indices = top_k(value, tokens.keep)
        own = merged[torch.isin(merged[:, 4], indices)]
        slot = torch.searchsorted(indices, own[:, 4:5].contiguous()).expand(-1, 8)
        others = own[:, [0, 1, 2, 3, 5, 6, 7, 8]]
        merge = mean_merge(indices, others.flatten(), slot.flatten())
        return Selection(indices, tokens.n, scores, merge)

    def _alike(self, tokens: VisualTokens, fixed: Tensor) -> Tensor:
        """[w, 9] rows of the windows to merge, the most alike first."""
        assert tokens.grid is not None
        group = window_numbers(tokens.grid, (3, 3), tokens.features.device)
        whole = (torch.bincount(group) == 9).nonzero().flatten()
        order = torch.sort(group, stable=True).indices
        # Windows at the right and bottom edge may be smaller: only whole ones merge.
        cells = order[torch.isin(group[order], whole)].view(-1, 9)
        cells = cells[~torch.isin(cells, fixed).any(dim=1)]
        rows = normalize(tokens.features.float(), dim=-1)[cells]  # [w, 9, d]
        # |sum of 9 unit rows|^2 - 9 is twice the sum of the 36 pairs' cosines.
        alike = (rows.sum(dim=1).square().sum(-1) - rows.square().sum((1, 2))) / 72
        best = descending(alike)[: (tokens.n - tokens.keep) // 8]  # each merge saves 8
        return cells[best[alike[best] >= self.tau]]


@dataclass(frozen=True)
class MustDropLLM(LLMPruner):
    """Merge and drop before the language model, then drop what no text token looks at.

    Vision: `mustdrop`. Prefill: before each of the `layers`, 3, 7, 11 and 15 of 32, with a_tv the attention of text
    token t on visual token v in the layer before, the mean over heads, v goes where sum_t a_tv < g sum_tv a_tv and
    max_t a_tv < i, both. The tokens that the vision stage always keeps stay.

    Decoding, the output-aware cache policy: once the prompt has run, what the last drop has not kept goes from the
    caches of the layer before the first drop and those after it, so that the answer is written from the same
    tokens in all of these layers. Layers before that keep theirs.

    1. g and i are scaled by one factor, at each layer the one that leaves k tokens. So tokens rank by
       max(share_v / ratio, max_t a_tv), ratio = g / i. Published pairs have ratios 1, 1.2 and 1.1.
    2. `first` x keep rows enter, and the same share stays at each layer. For large budgets all rows enter, for small
       ones fewer, so that one is left.
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
    needs = MustDrop.needs
    vision_layers = MustDrop.vision_layers
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
        always = always_kept(cls_attention(tokens.input, -1), self.keys).to(tokens.rows.device)
        # Lifts the ones that always stay above all others, and keeps their order among themselves.
        value = scores + torch.isin(tokens.rows, always).to(scores) * (1 + scores.max() - scores.min())
        return Selection(top_k(value, tokens.keep), tokens.n, scores)
