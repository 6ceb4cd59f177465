"""VScan (arXiv 2505.22654): a scan of the image after the encoder, and one in the middle of the language model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from gripvlm.pruners.base import LLMScorePruner, Pruner
from gripvlm.pruners.ops.attention import cls_attention, last_token_attention
from gripvlm.pruners.ops.merging import mean_merge
from gripvlm.pruners.ops.ranking import descending, fill_best, mask_of, rank_in_group, window_numbers
from gripvlm.pruners.ops.schedules import entering_tokens, one_layer_schedule, same_depths
from gripvlm.types import LLMTokens, Selection, VisualTokens


@dataclass(frozen=True)
class VScanVision(Pruner):
    """A global and a local scan of the image, and merging of what neither keeps.

    Local scan: int(local x k) tokens, the same number from every window of `window` x `window`, those with the largest
    CLS attention in the block `shallow`. Global scan: of the other tokens, the largest CLS attention in the block
    before the last, up to k. Every token that is not kept goes to the kept one with the most similar row (cosine),
    which becomes the mean of all that it stands for.

    1. Quotas are exact: where the windows' number does not divide the local part, those with the highest next token
       give one more. The code drops the remainder.

    Attributes:
        local: share of k for the local scan.
        window: cells a side.
        shallow: block of the local scan; the paper's 5 of CLIP's 24. Another tower needs another.
    """

    name = "vscan_vision"
    needs = frozenset({"features", "grid", "vision_attention"})
    source = "VScan (first stage), arXiv 2505.22654"

    local: float = 0.5
    window: int = 6
    shallow: int = 5

    def __post_init__(self) -> None:
        self.require(0 <= self.local <= 1 <= self.window, "local=0.5, in [0, 1], and window=6, at least 1")

    @property
    def vision_layers(self) -> tuple[int, ...]:  # type: ignore[override]
        return (self.shallow, -2)

    def select(self, tokens: VisualTokens) -> Selection:
        assert tokens.grid is not None
        near, far = cls_attention(tokens, self.shallow), cls_attention(tokens, -2)
        rank = rank_in_group(near, window_numbers(tokens.grid, (self.window, self.window), near.device))
        order = descending(near)
        # The best of each window, then the second best of each, ...: a prefix takes the same number from every window.
        order = order[torch.sort(rank[order], stable=True).indices]
        part = int(self.local * tokens.keep + 1e-9)
        kept = mask_of(order[:part], tokens.n)
        fill_best(kept, descending(far), tokens.keep - part)
        indices, rest = kept.nonzero().flatten(), (~kept).nonzero().flatten()
        rows = normalize(tokens.features.float(), dim=-1)
        slot = (rows[rest] @ rows[indices].T).argmax(dim=1)
        return Selection(indices, tokens.n, far, mean_merge(indices, rest, slot))


@dataclass(frozen=True)
class VScan(LLMScorePruner):
    """A scan of the image after the encoder, and a second one in the middle of the language model.

    First: `vscan_vision`. Second: before the layer `layer` of 32, the tokens with the largest attention of the prompt's
    last token stay, the mean over heads.

    1. `first` x keep rows enter the language model, and the second stage makes up for it: 96 and then 32 for an average
       of 64, as published. For large budgets all rows enter, for small ones fewer, so that one is left.
    2. Attention is that of the layer before.

    Attributes:
        first: rows that enter, as a multiple of keep, at least 1.
        layer: of a model of 32; other depths drop at the same relative one.
        local, window, shallow: see `vscan_vision`.
    """

    name = "vscan"
    needs = VScanVision.needs
    source = "VScan, arXiv 2505.22654"

    first: float = 1.5
    layer: int = 16
    local: float = 0.5
    window: int = 6
    shallow: int = 5

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
        return VScanVision(self.local, self.window, self.shallow).select(tokens)

    def score_at_layer(self, layer: int, tokens: LLMTokens) -> Tensor:
        return last_token_attention(tokens)
