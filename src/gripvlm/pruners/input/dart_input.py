"""DART at the input: a few pivots, and the tokens that duplicate them least."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from gripvlm.errors import PrunerError
from gripvlm.pruners.base import Pruner, top_k
from gripvlm.types import Selection, VisualTokens

__all__ = ["DARTInput", "least_duplicates"]


def least_duplicates(
    states: Tensor, sizes: Tensor, text: Tensor, text_sizes: Tensor, k: int, pivots: int, text_pivots: int
) -> Tensor:
    """[k] indices: the `pivots` rows with the largest sizes, then for each pivot its share of the least similar others.

    Pivots are rows of `states` [n, d], by `sizes` [n], and the `text_pivots` rows of `text` [t, d] with the largest
    of `text_sizes` [t]. One after the other, in the order of rows and the image's first, each adds the remaining
    tokens with the smallest cosine to it: all the same number, one more for the first ones where it does not divide.
    """
    own = top_k(sizes, min(pivots, k))
    words = top_k(text_sizes, min(text_pivots, text.shape[0]))
    rows = normalize(states.float(), dim=-1)
    ends = torch.cat((rows[own], normalize(text.float(), dim=-1)[words].to(rows)))
    alike = rows @ ends.T  # [n, p]
    kept = torch.zeros(rows.shape[0], dtype=torch.bool, device=rows.device)
    kept[own] = True
    quota, over = divmod(k - own.numel(), ends.shape[0])
    for pivot in range(ends.shape[0]):
        order = torch.sort(alike[:, pivot], stable=True).indices
        kept[order[~kept[order]][: quota + (pivot < over)]] = True
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

    name: ClassVar[str] = "dart_input"
    needs: ClassVar[frozenset[str]] = frozenset({"features", "question"})
    source: ClassVar[str] = "DART, arXiv 2502.11494 (EMNLP 2025); at the input"

    pivots: int = 4
    text_pivots: int = 4

    def __post_init__(self) -> None:
        if self.pivots < 1 or self.text_pivots < 0:
            raise PrunerError(f"dart_input: type pivots=4, at least 1, and text_pivots=4, 0 or more; got {self}")

    def select(self, tokens: VisualTokens) -> Selection:
        assert tokens.question is not None  # promised by `needs`
        rows = tokens.features
        sizes, text_sizes = (part.float().abs().sum(dim=1) for part in (rows, tokens.question))
        chosen = least_duplicates(rows, sizes, tokens.question, text_sizes, tokens.keep, self.pivots, self.text_pivots)
        return Selection(chosen, tokens.n)
