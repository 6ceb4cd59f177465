"""PuMer: drop what the text does not look at, then merge what is alike."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gripvlm.pruners.base import LLMPruner
from gripvlm.pruners.ops.attention import text_attention
from gripvlm.pruners.ops.merging import mean_merge, soft_matching
from gripvlm.pruners.ops.ranking import descending
from gripvlm.pruners.ops.schedules import pyramid_schedule, same_depths
from gripvlm.types import LLMTokens, Selection


@dataclass(frozen=True)
class PuMer(LLMPruner):
    """Text-informed pruning and modality-aware merging (ACL 2023, acl-long.721), inside a language model.

    At each of the layers, c_j = the attention of the text on token j, the mean over text tokens and heads: the
    lowest are dropped. The m others, in falling order of c, are matched by bipartite soft matching on
    their keys, even places with odd ones, and the closest pairs become their mean: at most (m - 1) // 2 of
    them, since the token with the highest c is not merged away.

    1. PuMer is for cross-modal encoders and fine-tuned with reduction; this is its reducer, untrained, in a
       decoder. The paper's ViLT reduces in the layers 2, 5 and 8 of 12, between attention and MLP; here after that
       MLP, before the layers 3, 6 and 9, at the same relative depth.
    2. The same share of the tokens stays at each layer. Of those that have to go there, those dropped and those merged
       are as prune to merge, as far as pairs go.
    3. Text is not merged: the prompt's tokens are not the pruner's. So merging is within the modality.
    4. Text ahead of the image, which does not see it, does not count. Without text after it, the last token.
    5. A merged token stands where its odd one stood.

    Attributes:
        prune, merge: shares of tokens pruned and merged; only their ratio counts.
        layers: of a model of 12.
    """

    name = "pumer"
    llm_needs = frozenset({"question", "last", "keys"})
    source = "PuMer, ACL 2023 (acl-long.721); untrained"

    prune: float = 0.1
    merge: float = 0.3
    layers: tuple[int, ...] = (3, 6, 9)

    def __post_init__(self) -> None:
        valid = min(self.prune, self.merge) >= 0 < self.prune + self.merge
        self.require(valid, "prune=0.1 and merge=0.3, not both 0")

    def schedule(self, n: int, keep: int, num_layers: int) -> dict[int, int]:
        return pyramid_schedule(self.name, n, keep, num_layers, same_depths(self.layers, 12, num_layers))

    def merges(self, n: int, count: int) -> int:
        """How many of the n - count tokens that go are merged: as pairs allow, and the protected one."""
        return min(count - 1, int((n - count) * self.merge / (self.prune + self.merge) + 0.5))

    def select_at_layer(self, layer: int, tokens: LLMTokens) -> Selection:
        assert tokens.keys is not None
        scores = text_attention(tokens).float().mean(dim=(0, 1))
        merges = self.merges(tokens.n, tokens.keep)
        # In falling order even and odd places alternate by importance: pairs join a strong and a weaker token.
        left = descending(scores)[: tokens.keep + merges]
        if not merges:
            return Selection(left.sort().values, tokens.n, scores)
        source, destination = soft_matching(tokens.keys[left], merges, fixed=1)
        stays = torch.ones_like(left, dtype=torch.bool)
        stays[source] = False
        indices = left[stays].sort().values
        merge = mean_merge(indices, left[source], torch.searchsorted(indices, left[destination]))
        return Selection(indices, tokens.n, scores, merge)
