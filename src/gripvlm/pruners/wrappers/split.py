"""Split: one budget for all images (or tiles) of a prompt, shared out by what is in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch.nn.functional import normalize

from gripvlm.errors import PrunerError
from gripvlm.pruners.base import Wrapper
from gripvlm.pruners.ops.apportion import apportion
from gripvlm.types import Selection, VisualTokens

RULES = ("tokens", "scores", "variety")


@dataclass(frozen=True)
class Split(Wrapper):
    """Image i of a prompt keeps k_i = K w_i / sum w of the prompt's budget K = sum of its images' budgets.

    Each image keeps at least one row and at most all; rounding is in `apportion`. Then the inner
    pruner chooses k_i rows of each. For families whose items are tiles this is a split among tiles.

    1. Ours. `by="scores"` is the region rule of PTP (arXiv 2509.15704) with any pruner's scores.
    2. It works through `allocate_budget`, which runs before `select`; `select` alone changes nothing.

    Attributes:
        by: w_i is "tokens": the image's rows; "scores": the mean of the inner pruner's scores, which
            must not be negative; "variety": 1 - ||mean of the unit rows||, how much the rows differ.
    """

    name = "split"
    extra_needs = frozenset({"features"})
    source = "wrapper: one budget for all images of a prompt"

    by: str = "variety"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.by in RULES, f"by={'|'.join(RULES)}")

    def _weight(self, tokens: VisualTokens) -> float:
        if self.by == "tokens":
            return float(tokens.n)
        if self.by == "variety":
            return max(0.0, 1 - float(normalize(tokens.features.float(), dim=-1).mean(dim=0).norm()))
        scores = self.scores_of(self.inner, tokens)
        if not bool((scores >= 0).all()):
            raise PrunerError(f"split: by=scores needs scores >= 0, but {self.inner.name!r} has some below")
        return float(scores.mean())

    def allocate_budget(self, images: Sequence[VisualTokens], num_layers: int) -> list[int]:
        # At least one token an image: a weight of 0 would leave an image without any.
        total = sum(tokens.keep for tokens in images)
        return apportion(total, [self._weight(tokens) for tokens in images], [tokens.n for tokens in images])

    def select(self, tokens: VisualTokens) -> Selection:
        return self.inner.select(tokens)
