"""SparseVLM: words that look at the picture rate its tokens; some of the dropped ones are recycled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gripvlm.errors import PrunerError
from gripvlm.pruners.base import top_k
from gripvlm.pruners.llm_base import LLMPruner, Schedule, geometric_cuts
from gripvlm.pruners.ops.clusters import density_peaks
from gripvlm.pruners.ops.depths import at_depths
from gripvlm.pruners.ops.saliency import mean_into
from gripvlm.types import LLMTokens, Selection

__all__ = ["SparseVLM", "raters"]


def raters(visual: Tensor, text: Tensor) -> Tensor:
    """[t] bool: words whose share of the visual tokens, mean_v softmax_t(x_v . e_t), is at least the mean 1 / t.

    Args:
        visual: [n, d] rows.
        text: [t, d] embeddings, t >= 1.
    """
    share = (visual.float() @ text.float().T).softmax(dim=1).mean(dim=0)
    return share >= share.mean() * (1 - 1e-6)


@dataclass(frozen=True)
class SparseVLM(LLMPruner):
    """Text-guided sparsification with recycling (arXiv 2410.04417), version 1.5 of the code.

    Before the layers 3, 7 and 16 of 32, after 2, 6 and 15: score_j = the attention of the raters on token j, the
    mean over raters and heads. Raters are chosen once, among the text tokens after the image, by their embeddings
    and all of the image's rows: see `raters`. The best s tokens are kept. Of the p others the best
    floor(0.3 p) + 1 are recycled: grouped by density peaks into floor(that / 10) + 1 clusters, and each cluster's
    mean is kept.

    1. `keep` is the average over layers, recycled tokens included, and the same share goes on at each cut. The
       code's settings for 192, 128 and 64 of 576 keep 300/200/110, 303/110/36 and 66/30/17 at the cuts; with all
       576 in three layers and what is recycled they cost 206.5, 145.4 and 82.3 a layer. A cut too small for a
       cluster recycles nothing.
    2. A word whose share is the mean, up to rounding, rates too: else a single word, or equal ones, would not. Where
       no text comes after the image, the prompt's last token rates. Special tokens do not.
    3. A cluster's mean stands at its centre, not after all kept tokens, whose positions do not change.
    4. Without the random noise that the code adds to densities, which decides between equals there (with two clusters
       any two that are nearest to one another); ties go to the lower index.

    Attributes:
        cuts: layers of a model of 32; other depths cut at the same relative ones.
        recycle: share of the dropped tokens to recycle; 0 recycles none.
        cluster: recycled tokens a cluster, about.
    """

    name: ClassVar[str] = "sparsevlm"
    needs: ClassVar[frozenset[str]] = frozenset({"features"})
    llm_needs: ClassVar[frozenset[str]] = frozenset({"hidden", "question", "words", "last"})
    source: ClassVar[str] = "SparseVLM, arXiv 2410.04417 (ICML 2025)"

    cuts: tuple[int, ...] = (3, 7, 16)
    recycle: float = 0.3
    cluster: int = 10

    def __post_init__(self) -> None:
        if not 0 <= self.recycle <= 1 or self.cluster < 1:
            raise PrunerError(f"sparsevlm: type recycle=0.3, in [0, 1], and cluster=10, at least 1; got {self}")

    def schedule(self, n: int, keep: int, layers: int) -> Schedule:
        return geometric_cuts(self.name, n, keep, layers, at_depths(self.cuts, 32, layers))

    def parts(self, n: int, count: int) -> tuple[int, int, int]:
        """(tokens kept, tokens recycled, clusters) such that kept + clusters == count."""
        for kept in range(count - 1, 0, -1) if self.recycle else ():
            recycled = int(self.recycle * (n - kept)) + 1
            if kept + recycled // self.cluster + 1 == count:
                return kept, recycled, count - kept
        return count, 0, 0

    def score(self, tokens: LLMTokens) -> Tensor:
        """[n] what the raters look at."""
        assert tokens.words is not None  # promised by `llm_needs`
        assert tokens.after is not None
        seen = tokens.asked.float()  # [H, r, n]
        if bool(tokens.after.any()):
            visual = tokens.input.features
            seen = seen[:, raters(visual, tokens.words[tokens.after].to(visual.device)).to(seen.device)]
        return seen.mean(dim=(0, 1))

    def select_at_layer(self, layer: int, tokens: LLMTokens) -> Selection:
        assert tokens.hidden is not None  # promised by `llm_needs`
        scores = self.score(tokens)
        kept, recycled, clusters = self.parts(tokens.n, tokens.keep)
        if not clusters:
            return Selection(top_k(scores, kept), tokens.n, scores)
        order = torch.sort(scores, descending=True, stable=True).indices
        pool = order[kept : kept + recycled].sort().values
        centres, nearest = density_peaks(tokens.hidden[pool], clusters)
        indices = torch.cat((order[:kept], pool[centres])).sort().values
        slots = torch.searchsorted(indices, pool[centres])
        others = torch.ones_like(pool, dtype=torch.bool)
        others[centres] = False
        merge = mean_into(tokens.keep, indices, pool[others], slots[nearest[others]])
        return Selection(indices, tokens.n, scores, merge)
