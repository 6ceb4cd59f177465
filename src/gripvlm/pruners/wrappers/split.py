"""Split: one budget for all images (or tiles) of a prompt, shared out by what is in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch.nn.functional import normalize

from gripvlm.pruners.base import Wrapper
from gripvlm.pruners.ops.apportion import apportion
from gripvlm.types import Selection, VisualTokens


@dataclass(frozen=True)
class Split(Wrapper):
    """Image i of a prompt keeps k_i = K w_i / sum w of the prompt's budget K = sum of its images' budgets.

    w_i = 1 - ||mean of the unit rows||, how much the image's rows differ. Each image keeps at least one row and at most
    all; rounding is in `apportion`. Then the inner pruner chooses k_i rows of each. For families whose items are tiles
    this is a split among tiles.

    1. Ours. It works through `allocate_budget`, which runs before `select`; `select` alone changes nothing.
    """

    name = "split"
    extra_needs = frozenset({"features"})
    source = "wrapper: one budget for all images of a prompt"

    def allocate_budget(self, images: Sequence[VisualTokens], num_layers: int) -> list[int]:
        weights = []
        for tokens in images:
            mean = normalize(tokens.features.float(), dim=-1).mean(dim=0)
            # Not below 0, where rounding puts the mean of equal rows.
            weights.append(max(0.0, 1 - float(mean.norm())))
        return apportion(sum(tokens.keep for tokens in images), weights, [tokens.n for tokens in images])

    def select(self, tokens: VisualTokens) -> Selection:
        return self.inner.select(tokens)
