"""TopP: more tokens than the budget where the scorer's own probabilities say that it will not do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from gripvlm.errors import PrunerError
from gripvlm.pruners.base import Pruner, SameChoice
from gripvlm.pruners.ops.apportion import apportion
from gripvlm.types import VisualTokens
from gripvlm.utils.batching import joined


@dataclass(frozen=True)
class TopP(SameChoice):
    """k tokens of an image; where these have less than `p` of the scorer's probability, as many more as it takes.

    With probabilities softmax(scores) over the image's rows, the count becomes that of the smallest set that has `p` of
    them, as in nucleus sampling (Holtzman et al., ICLR 2020), but at least k and at most `most` x k. Then the inner
    pruner chooses so many. For a joint pruner all rows of a prompt are one set, with one k.

    1. Ours. `keep` is here the least, not the count: `Record`, results and `/metrics` say what was paid.
    2. The inner pruner runs twice, the first time with k, which its scores may depend on.
    3. Only for scores that are logits, as those of grip: other scores have no probabilities. A scorer of several rounds
       has those of its first, before a token loses by being like kept ones; all its rounds choose.

    Attributes:
        p: the share of the probability to keep, in (0, 1).
        most: how many times the budget an image may keep, 1 or more.
    """

    name = "top_p"
    source = "wrapper: more tokens where the scorer is unsure; after nucleus sampling, arXiv 1904.09751 (ICLR 2020)"
    may_exceed: ClassVar[bool] = True
    example = "grip"

    p: float = 0.9
    most: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(0 < self.p < 1, "p=0.9, above 0 and below 1")
        self.require(1 <= self.most < float("inf"), "most=2.0, 1 or more")
        checked_logits(f"pruner {self.name!r}", self.inner)

    @property
    def joint(self) -> bool:  # type: ignore[override]
        return self.inner.joint

    def allocate_budget(self, images: Sequence[VisualTokens], num_layers: int) -> list[int]:
        counts = super().allocate_budget(images, num_layers)
        images = [replace(tokens, keep=k) for tokens, k in zip(images, counts, strict=True)]
        scores = scores_of(self.inner, images)
        sets = [joined(scores)] if self.joint else scores
        # One read for all images: each would wait for the device.
        needed = torch.stack([self._needed(each) for each in sets]).tolist()
        if not self.joint:
            return [self._raised(tokens.keep, count, tokens.n) for tokens, count in zip(images, needed, strict=True)]
        sizes = [tokens.n for tokens in images]
        return apportion(self._raised(sum(counts), needed[0], sum(sizes)), counts, sizes)

    def _needed(self, scores: Tensor) -> Tensor:
        """How many of the highest of [n] scores have `p` of the probability."""
        mass = scores.softmax(0).sort(descending=True).values.cumsum(0)
        return (mass < self.p).sum() + 1

    def _raised(self, k: int, needed: int, n: int) -> int:
        return min(max(k, min(needed, int(self.most * k))), n)


def checked_logits(wrapper: str, inner: Pruner) -> None:
    """Raises a PrunerError where the inner pruner's scores have no probabilities."""
    if not inner.logits:
        raise PrunerError(
            f"{wrapper} needs scores that are logits, and those of {inner.name!r} are not: use one that is trained, "
            "as in gumbel(grip); to vary untrained scores, mmr(norm)"
        )


def scores_of(inner: Pruner, images: Sequence[VisualTokens]) -> list[Tensor]:
    """[n] float32 scores of each image, on its device.

    Raises:
        PrunerError: a pruner that returned none, or that needs a grid where an image is several rasters.
    """
    found = []
    if "grid" in inner.needs and any(tokens.grid is None for tokens in images):
        raise PrunerError(
            f"scores of all rows of an image are compared, but {inner.name!r} needs a grid, and so scores one raster "
            "at a time where an image is several (whole view and tiles, frames): use another pruner inside"
        )
    for tokens, choice in zip(images, inner.select_batch(images), strict=True):
        if choice.scores is None:
            raise PrunerError(
                f"{inner.name!r} says that its scores are logits, but returned a selection without scores"
            )
        found.append(choice.scores.float().to(tokens.device))
    return found
