"""The base classes of pruners. Tensors only: no module in this folder depends on transformers or a model family."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from gripvlm.errors import PrunerError
from gripvlm.pruners.ops.schedules import one_layer_schedule
from gripvlm.types import LLMTokens, Merge, Selection, VisualTokens
from gripvlm.utils.batching import onto

__all__ = [
    "LLM_NEEDS",
    "NEEDS",
    "LLMPruner",
    "LLMScorePruner",
    "Pruner",
    "ScorePruner",
    "TowerPruner",
    "Wrapper",
    "top_k",
    "top_k_of_each",
]

NEEDS = frozenset({
    "features", "grid", "question", "key", "vision_attention", "vision_given", "patches", "first_layer", "groups",
    "tower_rows",
})  # fmt: skip
"""Everything a pruner may name in `needs`; what it does not name may be None, 0 or empty."""

LLM_NEEDS = frozenset({
    "hidden", "before", "rotary", "last", "question", "text", "words", "norm", "keys", "all_keys", "key_sizes",
    "values",
})  # fmt: skip
"""Everything an `LLMPruner` may name in `llm_needs`; what it does not name is None."""


def top_k(scores: Tensor, k: int) -> Tensor:
    """[k] indices of the k largest of [n] scores, ascending; among equals the lower index wins."""
    # torch.topk breaks ties differently on every device; a stable sort does not.
    order = torch.sort(scores, descending=True, stable=True).indices
    return order[:k].sort().values


def top_k_of_each(scores: Tensor, counts: Sequence[int]) -> list[Tensor]:
    """`top_k` of each row of [B, n] scores, with a count of its own, in two sorts for all rows."""
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices
    # Counts differ by row, and reading one back would wait for the device: so no slicing until all is sorted.
    ranks = torch.arange(scores.shape[1], device=scores.device)
    dropped = torch.ones_like(order).scatter_(-1, order, (ranks >= onto(list(counts), scores.device)[:, None]).long())
    # A stable sort of kept (0) and dropped (1) places brings the kept ones to the front, in raster order.
    places = torch.sort(dropped, dim=-1, stable=True).indices
    return [row[:count] for row, count in zip(places, counts, strict=True)]


class Pruner(ABC):
    """Chooses k of n visual tokens, one image at a time.

    Subclasses are frozen dataclasses, one a file: `name`, `select` and those attributes whose defaults do not fit.

    Attributes:
        name: the registry name, snake_case.
        needs: which fields of `VisualTokens` it reads (see `NEEDS`).
        source: the paper, in one line.
        vision_layers: blocks of the vision tower whose attention it reads (with "vision_attention" in
            `needs`); negative numbers count from the last. LLaVA's features come out of -2.
        stage: where tokens are dropped: "input" is before the language model, "llm" inside it (`LLMPruner`),
            "vision" inside the vision tower (`TowerPruner`, and the wrapper `tower`), "pixels" ahead of it (`Repeats`).
        trained: whether it has weights that were trained for pruning.
        logits: whether the scores that it returns are logits, whose softmax over rows means something.
        joint: whether a prompt's images share one budget, the sum of their `keep`: `select_batch` may then keep other
            counts of each (also none), with that sum over the images of a `sample`. `allocate_budget` moves budget
            before anything is scored; this is for pruners that learn the counts by choosing.
        may_exceed: whether `allocate_budget` may return more than the budgets, where the pruner finds that they will
            not do (`TopP`).
        default_keep: the budget where `keep` is not passed; None means that it must be.
    """

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset({"features"})
    source: ClassVar[str] = ""
    vision_layers: ClassVar[tuple[int, ...]] = ()
    stage: ClassVar[str] = "input"
    trained: ClassVar[bool] = False
    logits: ClassVar[bool] = False
    joint: ClassVar[bool] = False
    may_exceed: ClassVar[bool] = False
    default_keep: ClassVar[float | None] = None

    @abstractmethod
    def select(self, tokens: VisualTokens) -> Selection:
        """Exactly `tokens.keep` rows of `tokens`. The caller checks the result, for all pruners."""

    def select_batch(self, images: Sequence[VisualTokens]) -> list[Selection]:
        """`select` for all images of a batch; override it where they are faster together."""
        return [self.select(tokens) for tokens in images]

    def allocate_budget(self, images: Sequence[VisualTokens], num_layers: int) -> Sequence[int]:
        """The tokens to keep of each of a prompt's images; their sum must be that of `tokens.keep` (see `may_exceed`).

        By default `tokens.keep` of each. Override it to move budget between images or tiles. `num_layers` are those
        of the language model, which say what an `LLMPruner`'s schedule can reach.
        """
        return [tokens.keep for tokens in images]

    def in_tower(self, block: int) -> Pruner:
        """What chooses in this pruner's place inside the vision tower, before `block` (see the wrapper `tower`).

        By default itself. Override it where another score was trained for the hidden states there.
        """
        return self

    def check(self, model: Any) -> None:  # noqa: B027
        """Raises a `GripError` where this pruner cannot serve `model`. Called when it is attached."""

    def require(self, valid: bool, allowed: str) -> None:
        """Refuses options: `self.require(0 <= self.alpha <= 1, "alpha=0.1, in [0, 1]")`.

        Raises:
            PrunerError: not `valid`; it names the options given and what is `allowed`.
        """
        if not valid:
            raise PrunerError(f"pruner {self.name!r}: pass {allowed}; got {self}")


def _checked_scores(where: str, scores: Any, n: int) -> Tensor:
    # Checked where the method is still known; what else can be wrong the caller finds for all pruners.
    if isinstance(scores, Tensor) and scores.shape == (n,):
        return scores
    got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
    raise PrunerError(f"{where} must return a tensor ({n},), got {got}")


class ScorePruner(Pruner):
    """A pruner that ranks: implement `score`, and the k highest are kept."""

    @abstractmethod
    def score(self, tokens: VisualTokens) -> Tensor:
        """[n] floats, higher is kept. Ties go to the lower index."""

    def select(self, tokens: VisualTokens) -> Selection:
        scores = _checked_scores(f"pruner {self.name!r}: score()", self.score(tokens), tokens.n)
        # Sound: indices made by top_k may be used on a device before they are checked.
        return Selection(top_k(scores, tokens.keep), tokens.n, scores, sound=True)


class LLMPruner(Pruner):
    """Drops visual tokens before one or several layers of the language model, one image at a time.

    `keep` is what the language model pays for, averaged over its layers. A method that lets every token through
    its first layers keeps fewer than `keep` afterwards: `schedule` solves for how many.

    Attributes:
        llm_needs: which fields of `LLMTokens` it reads (see `LLM_NEEDS`).
        layer: tokens are dropped before it, 1 or more; unused where `schedule` is overridden.
    """

    stage = "llm"
    needs = frozenset()
    llm_needs: ClassVar[frozenset[str]] = frozenset({"last"})
    layer: int

    @abstractmethod
    def select_at_layer(self, layer: int, tokens: LLMTokens) -> Selection:
        """Exactly `tokens.keep` of `tokens.n`. A merge makes weighted sums of the hidden states that enter the layer.

        Called for each layer of the schedule at which the image loses tokens.
        """

    def schedule(self, n: int, keep: int, num_layers: int) -> Mapping[int, int]:
        """How many tokens of an image each layer sees; by default fewer from `self.layer` on.

        Args:
            n: tokens of the image.
            keep: tokens to pay for on average, 1 <= keep <= n.
            num_layers: layers of the language model.

        Returns:
            Layer -> count from there on, 0 <= layer < num_layers, counts from n down to 1; all n before the first
            entry. The average over all layers is within half a token of `keep` (the caller checks).

        Raises:
            BudgetError: no counts give this average; it says which do.
        """
        return one_layer_schedule(self.name, n, keep, num_layers, self.layer)

    def select(self, tokens: VisualTokens) -> Selection:
        """All tokens; override it where the schedule has an entry for layer 0, tokens dropped at the input."""
        return Selection(torch.arange(tokens.n, device=tokens.features.device), tokens.n)

    def evict_after_prefill(self, num_layers: int) -> int | None:
        """The first layer, 1 or more, from which on caches also lose the tokens that did not reach the last layer.

        It happens once the prompt has run. None: each layer's cache keeps what the layer saw.
        """
        return None


class LLMScorePruner(LLMPruner):
    """An `LLMPruner` that ranks: implement `score_at_layer`, and the highest stay. See `fastv.py`."""

    @abstractmethod
    def score_at_layer(self, layer: int, tokens: LLMTokens) -> Tensor:
        """[n] floats, higher is kept. Ties go to the lower index."""

    def select_at_layer(self, layer: int, tokens: LLMTokens) -> Selection:
        scores = self.score_at_layer(layer, tokens)
        scores = _checked_scores(f"pruner {self.name!r}: score_at_layer()", scores, tokens.n)
        return Selection(top_k(scores, tokens.keep), tokens.n, scores)


class TowerPruner(Pruner):
    """Merges tokens inside the vision tower, so that its later blocks are shorter too.

    In each block, between attention and MLP, `match` says which tokens go into which. The caller makes the mean of
    each group, weighted by the tokens in it, and leaves it at the place of the token that the others went into. All
    images of a call lose the same number.

    Attributes:
        proportional: whether the tower attends to merged tokens by their size.
    """

    stage = "vision"
    needs = frozenset({"groups"})
    proportional: bool = True

    @abstractmethod
    def plan(self, tokens: int, left: int, blocks: int, fixed: int) -> list[int]:
        """How many tokens each of the blocks merges away, the same for every image.

        Args:
            tokens: those that enter the first block, special ones included.
            left: those that are to leave the last one.
            blocks: whose output counts.
            fixed: special tokens ahead (0 or 1), which stay as they are.

        Returns:
            [blocks] counts with sum tokens - left, each at most half of the free tokens that are there.

        Raises:
            BudgetError: so few cannot be reached; it says how few can.
        """

    @abstractmethod
    def match(self, keys: Tensor, merges: int, fixed: int) -> tuple[Tensor, Tensor]:
        """(source, destination), both [b, merges] places: tokens that go, and those they go into, which stay.

        Args:
            keys: [b, t, d_h] the block's keys, the mean over heads.
            merges: tokens to go.
            fixed: special tokens ahead, neither source nor destination.
        """

    def select(self, tokens: VisualTokens) -> Selection:
        """The rows that others went into, and those that stayed alone; each stands for its group."""
        assert tokens.groups is not None  # promised by `needs`
        indices, slot, size = tokens.groups.unique(return_inverse=True, return_counts=True)
        # Nothing was merged: without a merge the rows stay the tower's own, bit for bit.
        if indices.numel() == tokens.n:
            return Selection(indices, tokens.n)
        source = (size[slot] > 1).nonzero().flatten()
        return Selection(indices, tokens.n, merge=Merge(source, slot[source], size[slot[source]].float().reciprocal()))


@dataclass(frozen=True)
class Wrapper(Pruner):
    """A pruner around another, or several: it needs what these need, and `extra_needs` on top.

    Attributes:
        inner: a pruner, its name or its spec; several where `many`. On a command line: `mmr(norm)`,
            `mmr(random:seed=1)`, with options of the wrapper `mmr(norm):balance=0.7`.
        wraps: the stages at which pruners that it takes may drop.
        example: a pruner that it takes, for errors.
    """

    extra_needs: ClassVar[frozenset[str]] = frozenset()
    many: ClassVar[bool] = False
    wraps: ClassVar[tuple[str, ...]] = ("input",)
    example: ClassVar[str] = "norm"

    inner: Any

    def __post_init__(self) -> None:
        from gripvlm.pruners.registry import get_pruner  # the registry imports this file

        given = list(self.inner) if isinstance(self.inner, (tuple, list)) else [self.inner]
        if len(given) > 1 and not self.many:
            raise PrunerError(
                f"pruner {self.name!r} takes one pruner, got {len(given)}: use {self.name}({self.example})"
            )
        pruners = tuple(get_pruner(pruner) for pruner in given)
        # object.__setattr__, as the dataclass is frozen. Names become pruners here, so that mmr("norm") == mmr(Norm()).
        object.__setattr__(self, "inner", pruners if self.many else pruners[0])
        # Most wrappers change which rows enter the language model: they cannot change a pruner that drops elsewhere.
        for pruner in pruners:
            if pruner.stage not in self.wraps:
                stages = " or ".join(f"the {stage}" for stage in self.wraps)
                raise PrunerError(
                    f"pruner {self.name!r} wraps pruners that drop tokens at {stages}, but {pruner.name!r} drops "
                    f"them at {pruner.stage}"
                )

    @property
    def inners(self) -> tuple[Pruner, ...]:
        """All pruners inside."""
        return self.inner if self.many else (self.inner,)

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return self.extra_needs.union(*(pruner.needs for pruner in self.inners))

    @property
    def may_exceed(self) -> bool:  # type: ignore[override]
        return len(self.inners) == 1 and self.inners[0].may_exceed

    @property
    def vision_layers(self) -> tuple[int, ...]:  # type: ignore[override]
        return tuple(sorted({layer for pruner in self.inners for layer in pruner.vision_layers}))

    def in_tower(self, block: int) -> Pruner:
        """The wrapper around what chooses there in place of the pruners inside."""
        inside = tuple(pruner.in_tower(block) for pruner in self.inners)
        same = all(one is other for one, other in zip(inside, self.inners, strict=True))
        return self if same else replace(self, inner=inside)

    def check(self, model: Any) -> None:
        for pruner in self.inners:
            # Any object with select() will do as a pruner, and may lack the rest.
            if hasattr(pruner, "check"):
                pruner.check(model)

    def allocate_budget(self, images: Sequence[VisualTokens], num_layers: int) -> Sequence[int]:
        """As the inner pruner does; `tokens.keep` of each where there are several."""
        allocate = self.inners[0].allocate_budget if len(self.inners) == 1 else super().allocate_budget
        return allocate(images, num_layers)


@dataclass(frozen=True)
class SameChoice(Wrapper):
    """A wrapper that changes what its inner pruner gets, such as the budget, and not how it chooses."""

    def select(self, tokens: VisualTokens) -> Selection:
        selection: Selection = self.inner.select(tokens)
        return selection

    def select_batch(self, images: Sequence[VisualTokens]) -> list[Selection]:
        return list(self.inner.select_batch(images))
