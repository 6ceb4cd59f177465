"""DART (arXiv 2502.11494): a few pivots, and the tokens that duplicate them least."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from gripvlm.pruners.base import LLMPruner, Pruner, top_k
from gripvlm.pruners.ops.ranking import fill_best, mask_of
from gripvlm.types import LLMTokens, Selection, VisualTokens

PIVOTS = "pivots=4, at least 1, and text_pivots=4, 0 or more"


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
    # One pivot after the other: a row that one took is gone for the next.
    for i in range(ends.shape[0]):
        fill_best(kept, torch.sort(cosine[:, i], stable=True).indices, share + (i < over))
    return kept.nonzero().flatten()


@dataclass(frozen=True)
class DART(LLMPruner):
    """After a layer of the language model, a few pivots and the tokens that duplicate them least.

    Pivots: the image's tokens, and the text tokens after the image, whose keys in the layer before have the largest
    L1 norm, over all heads. Each pivot adds an equal share of the tokens: those with the smallest cosine to it, of
    the hidden states after the model's last norm. See `least_duplicates`.

    1. Pivots take their shares in raster order, the image's before the text's. The code goes through a Python set
       of positions, whose order is that of hashes.
    2. Special tokens are no pivots, as they are in the code. Without text after the image, where the code stops, the
       image pivots share k.
    3. The code keeps 4 + 8 (k // 8).

    Attributes:
        layer: 1 or more; 2 as in the code.
        pivots: image pivots, at least 1.
        text_pivots: text pivots.
    """

    name = "dart"
    llm_needs = frozenset({"hidden", "text", "key_sizes", "norm"})
    source = "DART, arXiv 2502.11494 (EMNLP 2025)"

    layer: int = 2
    pivots: int = 4
    text_pivots: int = 4

    def __post_init__(self) -> None:
        self.require(self.pivots >= 1 and self.text_pivots >= 0, PIVOTS)

    def select_at_layer(self, layer: int, tokens: LLMTokens) -> Selection:
        assert tokens.hidden is not None
        assert tokens.norm is not None
        assert tokens.key_sizes is not None
        assert tokens.text is not None
        assert tokens.after is not None
        assert tokens.text_key_sizes is not None
        states, text = tokens.norm(tokens.hidden), tokens.norm(tokens.text[tokens.after])
        # Pivots by keys of the layer before, likeness by states after the last norm: as in the code.
        image_pivots = top_k(tokens.key_sizes, min(self.pivots, tokens.keep))
        text_pivots = top_k(tokens.text_key_sizes[tokens.after], min(self.text_pivots, text.shape[0]))
        return Selection(least_duplicates(states, image_pivots, text[text_pivots], tokens.keep), tokens.n)


@dataclass(frozen=True)
class DARTInput(Pruner):
    """A few pivots, and the tokens that duplicate them least.

    `dart` on the rows that enter the language model. Image pivots: the rows with the largest L1 norm; text pivots:
    the question's token embeddings with the largest one.

    1. Before the language model there are no keys or states: its input rows stand in for both, without its last norm.
    2. All words of the question may be pivots: where they stand in the prompt is not known here. Without any, the
       image pivots share k.

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
        self.require(self.pivots >= 1 and self.text_pivots >= 0, PIVOTS)

    def select(self, tokens: VisualTokens) -> Selection:
        assert tokens.question is not None
        # Norms of the rows stand in for those of the keys, which do not exist yet.
        sizes, text_sizes = (part.float().abs().sum(dim=1) for part in (tokens.features, tokens.question))
        pivots = top_k(sizes, min(self.pivots, tokens.keep))
        words = top_k(text_sizes, min(self.text_pivots, tokens.question.shape[0]))
        return Selection(least_duplicates(tokens.features, pivots, tokens.question[words], tokens.keep), tokens.n)
