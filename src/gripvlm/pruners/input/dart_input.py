"""DART at the input: a few pivots, and the tokens that duplicate them least."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from gripvlm.pruners.base import Pruner, top_k
from gripvlm.pruners.ops.ranking import fill_best, mask_of
from gripvlm.types import Selection, VisualTokens


def least_duplicates(rows: Tensor, pivots: Tensor, text: Tensor, k: int) -> Tensor:
    """[k] indices: the pivots, then for each pivot its share of the rows that are least like it.

    One after the other, the image's pivots in the order of rows and then the text's, each adds the remaining rows with
    the smallest cosine to it: all the same number, one more for the first ones where it does not divide.

    Args:
        rows: [n, d] of the image.
        pivots: [p] indices of the image's pivots, p <= k.
        text: [t, d] the text's pivots.
    """
    rows = normalize(rows.float(), dim=-1)
    ends = torch.cat((rows[pivots], normalize(text.float(), dim=-1).to(rows)))
    cosine = rows @ ends.T  # [n, p + t]
    kept = mask_of(pivots, rows.shape[0])
    share, over = divmod(k - pivots.numel(), ends.shape[0])
    for i in range(ends.shape[0]):
        fill_best(kept, torch.sort(cosine[:, i], stable=True).indices, share + (i < over))
    return kept.nonzero().flatten()


@dataclass(frozen=True)
class DARTInput(Pruner):
    """Duplication-aware reduction (DART, arXiv 2502.11494) on the rows that enter the language model.

    The image pivots are the rows with the largest L1 norm, the text pivots the question's token
    embeddings with the largest one. Each pivot adds an equal share of k: the tokens with the smallest
    cosine to it. See `least_duplicates`.

    1. Before the language model there are no keys or states: its input rows stand in for both, without its last
       norm. `dart` is the method as published, after a layer.
    2. All words of the question may be pivots: where they stand in the prompt is not known here. Without any, the
       image pivots share k.
    3. k is exact; ties go to the lower index; raster order is restored.

    Attributes:
        pivots: image pivots, at least 1.
        text_pivots: text pivots.
    """

    name = "dart_input"
    needs = frozenset({"features", "question"})
    source = "DART, arXiv 2502.11494 (EMNLP 2025); at the input"

    pivots: int = 4
    text_pivots: int = 4

    def __post_init__(self) -> None:
        self.require(self.pivots >= 1 and self.text_pivots >= 0, "pivots=4, at least 1, and text_pivots=4, 0 or more")

    def select(self, tokens: VisualTokens) -> Selection:
        assert tokens.question is not None
        sizes, text_sizes = (part.float().abs().sum(dim=1) for part in (tokens.features, tokens.question))
        pivots = top_k(sizes, min(self.pivots, tokens.keep))
        words = top_k(text_sizes, min(self.text_pivots, tokens.question.shape[0]))
        return Selection(least_duplicates(tokens.features, pivots, tokens.question[words], tokens.keep), tokens.n)
