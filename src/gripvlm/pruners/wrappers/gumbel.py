"""Gumbel: a draw from a scorer's distribution in place of its highest scores."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gripvlm.pruners.base import Wrapper, top_k_of_each
from gripvlm.pruners.ops.own_generator import own_generator
from gripvlm.pruners.wrappers.top_p import checked_logits, scores_of
from gripvlm.types import Selection, VisualTokens
from gripvlm.utils.batching import onto, padded


@dataclass(frozen=True)
class Gumbel(Wrapper):
    """k tokens drawn without replacement, each with probability softmax(scores / temperature) among those left.

    By Gumbel top-k (Kool et al., "Stochastic beams and where to find them", ICML 2019, arXiv 1903.06059, section 2.3):
    the k largest of scores / temperature + g, g standard Gumbel noise. The noise is the image's own (`own_generator`),
    so that an image has one draw. Scores of single tokens cannot say that one of three is enough, and their k highest
    are often tokens of the same thing; a draw spreads over all that score well.

    1. Grip is trained with such draws (`gripvlm.grip.policy`, at temperature 1), but takes the highest scores. Of a
       scorer of several rounds this draws all k from the first.
    2. What the inner pruner would merge is dropped.

    Attributes:
        temperature: above 0; near 0 the highest scores, large a random choice.
        seed: any int; one seed is one draw for each image.
    """

    name = "gumbel"
    extra_needs = frozenset({"key"})
    example = "grip"
    source = "wrapper: a draw from a scorer's distribution; Gumbel top-k, arXiv 1903.06059 (ICML 2019)"

    temperature: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(0 < self.temperature < float("inf"), "temperature=0.5, above 0")
        checked_logits(f"pruner {self.name!r}", self.inner)

    @property
    def joint(self) -> bool:  # type: ignore[override]
        return self.inner.joint

    def select(self, tokens: VisualTokens) -> Selection:
        return self.select_batch([tokens])[0]

    def select_batch(self, images: Sequence[VisualTokens]) -> list[Selection]:
        noisy = [self._noisy(*pair) for pair in zip(images, scores_of(self.inner, images), strict=True)]
        # The sets that are drawn from: images, or all images of a prompt.
        groups = [[i] for i in range(len(images))]
        if self.joint:
            by_sample = itertools.groupby(range(len(images)), key=lambda i: images[i].sample)
            groups = [list(group) for _, group in by_sample]
        rows = [torch.cat([noisy[i] for i in group]) for group in groups]
        counts = [sum(images[i].keep for i in group) for group in groups]
        drawn = top_k_of_each(padded(rows, -torch.inf), counts)
        kept = [part for group, own in zip(groups, drawn, strict=True) for part in _by_image(own, group, images)]
        return [Selection(rows, tokens.n, scores) for rows, tokens, scores in zip(kept, images, noisy, strict=True)]

    def _noisy(self, tokens: VisualTokens, scores: Tensor) -> Tensor:
        """[n] scores / temperature + Gumbel noise."""
        uniform = torch.rand(tokens.n, generator=own_generator(self.seed, tokens), dtype=torch.float64)
        # In float64, whose uniform numbers are 0 once in 10^16; the smallest of float32 would all be one number.
        noise = -(-uniform.clamp(min=1e-300).log()).log()
        return scores / self.temperature + onto(noise.float(), scores.device)


def _by_image(drawn: Tensor, group: Sequence[int], images: Sequence[VisualTokens]) -> list[Tensor]:
    """Rows of a group, ascending, as rows of its images."""
    if len(group) == 1:
        return [drawn]
    ends = np.cumsum([images[i].n for i in group])
    # One read for the group: how many of each image are kept is up to the device.
    upto = torch.searchsorted(drawn, onto(ends, drawn.device)).tolist()
    parts = drawn.tensor_split(upto[:-1])
    return [part - start for part, start in zip(parts, [0, *ends[:-1].tolist()], strict=True)]
