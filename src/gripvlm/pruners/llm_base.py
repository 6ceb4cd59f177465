"""Pruners that drop visual tokens inside the language model: `LLMPruner`, what it sees, and its schedules.

Tensors only, as everywhere in this folder.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor

from gripvlm.errors import BudgetError
from gripvlm.pruners.base import Pruner
from gripvlm.types import LLMTokens, Merge, Selection, VisualTokens

__all__ = [
    "LLM_NEEDS",
    "LLMPruner",
    "Schedule",
    "average",
    "geometric_cuts",
    "least_of_one_cut",
    "one_cut",
]

LLM_NEEDS = frozenset({"hidden", "last", "question", "text", "words", "keys", "key_sizes", "norm"})
"""Everything a pruner may name in `llm_needs`; what it does not name is None."""

Schedule: TypeAlias = Mapping[int, int]
"""Layer -> rows of one image that this layer and those after it see; all rows before the first entry."""


class LLMPruner(Pruner):
    """Drops visual tokens before one or several layers of the language model, one image at a time.

    Subclasses are frozen dataclasses, as for `Pruner`. Further class attribute:

    llm_needs: which fields of `LLMTokens` they read (see `LLM_NEEDS`).

    `keep` is what the language model pays for, averaged over its layers, so a method that lets every
    token through its first layers keeps fewer than `keep` afterwards; `schedule` solves for it.
    `select` is asked only where the schedule has an entry for layer 0, rows dropped at the input.
    """

    stage: ClassVar[str] = "llm"
    llm_needs: ClassVar[frozenset[str]] = frozenset({"last"})

    @abstractmethod
    def schedule(self, n: int, keep: int, layers: int) -> Schedule:
        """How many rows of an image each layer sees.

        Args:
            n: rows of the image.
            keep: rows to pay for on average, 1 <= keep <= n.
            layers: layers of the language model.

        Returns:
            Layer -> count from there on, 0 <= layer < layers, counts from n down to 1, such that the
            average over all layers is within half a token of `keep` (the caller checks).

        Raises:
            BudgetError: no counts give this average; it says which do.
        """

    @abstractmethod
    def select_at_layer(self, layer: int, tokens: LLMTokens) -> Tensor | tuple[Tensor, Merge | None] | Selection:
        """Exactly `tokens.keep` of `tokens.n`: indices [keep] ascending in 0..n-1, and what they absorb.

        A merge makes weighted sums of the hidden states that enter the layer. Called for each layer of
        the schedule at which the image loses rows. The caller checks the result, for all pruners.
        """

    def evict_after_prefill(self, layers: int) -> int | None:
        """Once the prompt has run, tokens that did not reach the last layer go from the caches of this layer, 1 or
        more, and those after it; None: each layer's cache keeps what the layer saw.
        """
        return None

    def allocate_budget_over(self, sample: Sequence[VisualTokens], layers: int) -> Sequence[int]:
        """`allocate_budget` where the language model has so many layers, which says what `schedule` can reach."""
        return self.allocate_budget(sample)

    def select(self, tokens: VisualTokens) -> Selection:
        """All rows; override it where the schedule drops some at the input (layer 0)."""
        return Selection(torch.arange(tokens.n, device=tokens.features.device), tokens.n)


def average(n: int, schedule: Schedule, layers: int) -> float:
    """Rows paid for, averaged over the layers, of an image of n rows."""
    total, left = 0, n
    for layer in range(layers):
        left = schedule.get(layer, left)
        total += left
    return total / layers


def one_cut(name: str, n: int, keep: int, layers: int, cut: int) -> dict[int, int]:
    """{cut: count} for all n rows before layer `cut`: count = (layers keep - cut n) / (layers - cut), rounded half up.

    Raises:
        BudgetError: the layers before the cut alone cost more, or there is no such layer.
    """
    _checked_cuts(name, [cut], layers)
    count = (2 * (layers * keep - cut * n) + (layers - cut)) // (2 * (layers - cut))
    if count < 1:
        raise _too_few(name, n, keep, layers, cut, least_of_one_cut(n, layers, cut))
    return {cut: count}


def least_of_one_cut(n: int, layers: int, cut: int) -> int:
    """The smallest `keep` that `one_cut` takes: one row is left after the cut."""
    return -(-(2 * cut * n + layers - cut) // (2 * layers))


def geometric_cuts(name: str, n: int, keep: int, layers: int, cuts: Sequence[int]) -> dict[int, int]:
    """The same share of the rows goes on at each cut; the share is solved so that the average is `keep`.

    The average grows with the share, so bisection finds it; rounding is then made up for at the
    last cut, or, where that has no room, at those before.

    Raises:
        BudgetError: the layers before the first cut alone cost more, or there is no such layer.
    """
    cuts = sorted(cuts)
    _checked_cuts(name, cuts, layers)

    def counts(share: float) -> dict[int, int]:
        return {cut: max(1, round(n * share ** (i + 1))) for i, cut in enumerate(cuts)}

    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if average(n, counts(middle), layers) <= keep else (low, middle)
    found = counts(1.0 if keep == n else low)
    for i in reversed(range(len(cuts))):  # the last cut first: its one row costs the fewest layers
        span = [*cuts, layers][i + 1] - cuts[i]
        over = round((average(n, found, layers) - keep) * layers / span)
        least, most = found[cuts[i + 1]] if i + 1 < len(cuts) else 1, found[cuts[i - 1]] if i else n
        found[cuts[i]] = min(most, max(least, found[cuts[i]] - over))
    if average(n, found, layers) - keep > 0.5:
        least = math.ceil(average(n, dict.fromkeys(cuts, 1), layers) - 0.5)
        raise _too_few(name, n, keep, layers, cuts[0], least)
    return found


def _checked_cuts(name: str, cuts: Sequence[int], layers: int) -> None:
    if wrong := [cut for cut in cuts if not 1 <= cut < layers]:
        raise BudgetError(
            f"pruner {name!r} drops before layer {wrong[0]}, but this language model has {layers} layers: "
            f"type a layer from 1 to {layers - 1}"
        )


def _too_few(name: str, n: int, keep: int, layers: int, first: int, floor: int) -> BudgetError:
    return BudgetError(
        f"{keep} of {n} visual tokens on average over {layers} layers is less than pruner {name!r} can reach: all {n} "
        f"go through the first {first}; type keep={floor} or more, or drop before an earlier layer"
    )
