"""SparseVLM: words that look at the picture rate its tokens; some of the dropped ones are recycled."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gripvlm.pruners.base import LLMPruner, top_k
from gripvlm.pruners.ops.attention import text_attention
from gripvlm.pruners.ops.merging import density_peaks, mean_merge
from gripvlm.pruners.ops.ranking import descending
from gripvlm.pruners.ops.schedules import pyramid_schedule, same_depths
from gripvlm.types import LLMTokens, Selection


def raters(visual: Tensor, text: Tensor) -> Tensor:
    """[t] bool: words whose share of the visual tokens, mean_v softmax_t(x_v . e_t), is at least the mean 1 / t.

    Args:
        visual: [n, d] rows.
        text: [t, d] embeddings, t >= 1.
    """
    share = (visual.float() @ text.float().T).softmax(dim=1).mean(dim=0)
    # Up to rounding: a single word has exactly the mean, and must rate.
    return share >= share.mean() * (1 - 1e-6)


@dataclass(frozen=True)
class SparseVLM(LLMPruner):
    """Text-guided sparsification with recycling (arXiv 2410.04417), version 1.5 of the code.

    Before the layers 3, 7 and 16 of 32, after 2, 6 and 15: score_j = the attention of the raters on token j, the
    mean over raters and heads. Raters are chosen once, among the text tokens after the image, by their embeddings
    and all of the image's rows: see `raters`. The best s tokens are kept. Of the p others the best
    floor(0.3 p) + 1 are recycled: grouped by density peaks into floor(that / 10) + 1 clusters, and each cluster's
    mean is kept.

    1. `keep` includes recycled tokens, and the same share of the tokens stays at each layer. The code's settings for
       192, 128 and 64 of 576 keep 300/200/110, 303/110/36 and 66/30/17 at these three; with all 576 before and what is
       recycled they cost 206.5, 145.4 and 82.3 a layer. A layer with too few tokens for a cluster recycles nothing.
    2. A word whose share is the mean, up to rounding, rates too: else a single word, or equal ones, would not. Where
       no text comes after the image, the prompt's last token rates. Special tokens do not.
    3. A cluster's mean stands at its centre, not after all kept tokens, whose positions do not change.
    4. Without the random noise that the code adds to densities, which decides between equals there (with two clusters
       any two that are nearest to one another).

    Attributes:
        layers: of a model of 32; other depths drop at the same relative ones.
        recycle: share of the dropped tokens to recycle; 0 recycles none.
        cluster: recycled tokens a cluster, about.
    """

    name = "sparsevlm"
    needs = frozenset({"features"})
    llm_needs = frozenset({"hidden", "question", "words", "last"})
    source = "SparseVLM, arXiv 2410.04417 (ICML 2025)"

    layers: tuple[int, ...] = (3, 7, 16)
    recycle: float = 0.3
    cluster: int = 10

    def __post_init__(self) -> None:
        self.require(0 <= self.recycle <= 1 <= self.cluster, "recycle=0.3, in [0, 1], and cluster=10, at least 1")

    def schedule(self, n: int, keep: int, num_layers: int) -> dict[int, int]:
        return pyramid_schedule(self.name, n, keep, num_layers, same_depths(self.layers, 32, num_layers))

    def parts(self, n: int, count: int) -> tuple[int, int, int]:
        """(tokens kept, tokens recycled, clusters) such that kept + clusters == count."""
        # From above: the most kept tokens that leave room for the clusters of what they leave.
        for kept in range(count - 1, 0, -1) if self.recycle else ():
            recycled = int(self.recycle * (n - kept)) + 1
            if kept + recycled // self.cluster + 1 == count:
                return kept, recycled, count - kept
        return count, 0, 0

    def score(self, tokens: LLMTokens) -> Tensor:
        """[n] what the raters look at."""
        assert tokens.words is not None
        assert tokens.after is not None
        attention = text_attention(tokens).float()  # [H, r, n]
        if bool(tokens.after.any()):
            visual = tokens.input.features
            rates = raters(visual, tokens.words[tokens.after].to(visual.device))
            attention = attention[:, rates.to(attention.device)]
        return attention.mean(dim=(0, 1))

    def select_at_layer(self, layer: int, tokens: LLMTokens) -> Selection:
        assert tokens.hidden is not None
        scores = self.score(tokens)
        kept, recycled, clusters = self.parts(tokens.n, tokens.keep)
        if not clusters:
            return Selection(top_k(scores, kept), tokens.n, scores)
        order = descending(scores)
        # In raster order, which decides between equal densities.
        pool = order[kept : kept + recycled].sort().values
        centres, nearest = density_peaks(tokens.hidden[pool], clusters)
        indices = torch.cat((order[:kept], pool[centres])).sort().values
        slots = torch.searchsorted(indices, pool[centres])
        # A centre is its slot's own row, so only the others are merged in.
        others = torch.ones_like(pool, dtype=torch.bool)
        others[centres] = False
        merge = mean_merge(indices, pool[others], slots[nearest[others]])
        return Selection(indices, tokens.n, scores, merge)
