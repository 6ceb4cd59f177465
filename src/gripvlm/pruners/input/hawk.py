"""HAWK: keep what the question's words ask for in the language model's first layer, by the heads that matter."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from gripvlm.errors import PrunerError
from gripvlm.pruners.base import ScorePruner
from gripvlm.types import VisualTokens
from gripvlm.utils.batching import onto


@dataclass(frozen=True)
class HAWK(ScorePruner):
    """Head importance-aware pruning (arXiv 2604.07812): score_j = sum_h w_h a_hj / |a_h|.

    a_hj = mean_i q_hi . k_hj / sqrt(d_h): queries of the question's tokens i and keys of the image's tokens j, in the
    head h of the language model's first layer, ahead of rotary positions (equations 4 to 7). |a_h|, L2 over the image's
    tokens, is from the authors' code. w are the heads' importances, measured once for a model: what answers lose
    without each of them (equations 1 to 3). `gripvlm.eval.heads` measures them.

    1. Without `weights` all heads weigh the same: the method without its idea, to compare with.
    2. The question is the text of the prompt without special tokens, or `question=`; in the code what stands between
       the image and the end of the user's turn. Without any text the first k tokens stay.
    3. Models that normalise queries and keys of each head, as Qwen3's do and Qwen2.5's do not, do so here too.

    Attributes:
        weights: one for each query head of the first layer, none below 0 and not all 0; of any sum.
    """

    name = "hawk"
    needs = frozenset({"question", "first_layer"})
    source = "HAWK, arXiv 2604.07812 (CVPR 2026); without `weights`, all heads alike"

    weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        valid = not self.weights or (min(self.weights) >= 0 and max(self.weights) > 0)
        self.require(valid, "weights=(...), one for each head, none below 0 and not all 0")

    def score(self, tokens: VisualTokens) -> Tensor:
        assert tokens.first_queries is not None
        assert tokens.first_keys is not None
        queries, keys = tokens.first_queries.float(), tokens.first_keys.float()
        heads = keys.shape[1]
        if self.weights and len(self.weights) != heads:
            raise PrunerError(
                f"pruner 'hawk' has {len(self.weights)} weights, but the first layer has {heads} heads: measure them "
                "for this model with python -m gripvlm.eval.heads"
            )
        if not len(queries):
            return torch.zeros_like(keys[:, 0, 0])
        looked = torch.einsum("hd,nhd->hn", queries.mean(dim=0), keys) * keys.shape[-1] ** -0.5
        weights = onto(self.weights or (1.0 / heads,) * heads, keys.device).to(keys)
        return weights @ normalize(looked, dim=1)
