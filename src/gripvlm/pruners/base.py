"""What a pruner is given (`VisualTokens`), what it returns (`Selection`), and the base classes.

Tensors only: nothing in this folder knows transformers or any model family.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from gripvlm.errors import PrunerError
from gripvlm.ragged import onto

__all__ = [
    "NEEDS",
    "Merge",
    "Pruner",
    "ScorePruner",
    "Selection",
    "VisionRows",
    "VisualTokens",
    "sizes_after",
    "top_k",
    "top_k_of_each",
]

NEEDS = frozenset({"features", "grid", "question", "key", "vision_attention", "vision_given", "patches", "groups"})
"""Everything a pruner may name in `needs`; what it does not name may be None, 0 or empty."""


@dataclass(frozen=True, eq=False)
class VisionRows:
    """What one block of the vision tower says about each of an image's n rows.

    A row that is made of several patches gets their mean. Float32, on the model's device. Rows with
    no patch behind them (newline rows) get zeros.

    Attributes:
        received: [H, n] attention that the row gets, head by head: the mean over all queries that
            see it (its image, tile or window), CLS included where there is one.
        cls: [H, n] attention of the CLS query; None where the tower has no CLS token.
        keys: [n, d_h] keys, the mean over heads, as attention takes them (after rotary positions).
        patch_received: [H, n] attention received from patches alone, the mean over them: without the CLS query.
            None where the tower has no CLS token (`received` is that), or without "vision_given" in `needs`.
        given: [H, n] attention given to patches, the mean over them: all but what goes to the CLS token. None
            likewise: where there is none, every row gives 1 / n.
    """

    received: Tensor
    cls: Tensor | None = None
    keys: Tensor | None = None
    patch_received: Tensor | None = None
    given: Tensor | None = None


@dataclass(frozen=True, eq=False)
class VisualTokens:
    """The visual tokens of one image, as a pruner sees them.

    Attributes:
        features: [n, d] rows as the language model would receive them (after the projector), on the
            model's device and in its dtype.
        keep: k, the rows to keep, 1 <= k <= n.
        grid: (h, w) with h * w == n when the rows are a plain raster of the image, else None.
        question: [t, d] token embeddings of the question (t may be 0); None unless in `needs`.
        sample: the prompt's position in the batch.
        image: the image's position in its prompt.
        key: a number that depends on the image's pixels alone, so that it is the same in any batch
            and on any device (0 where a family gives none).
        vision: layer -> `VisionRows`, one for each of the pruner's `vision_layers`, under the number as
            it stands there; empty unless "vision_attention" is in `needs`. What patches give to one another is
            in it with "vision_given".
        patches: [n, d_v] what the vision tower made of each row before the projector; a row of several
            patches has their mean. None unless in `needs`.
        groups: [n] LongTensor, for each row the one it was merged into inside the vision tower, itself if it
            stands for its group; features are then the group's. None but for a `TowerPruner`.
    """

    features: Tensor
    keep: int
    grid: tuple[int, int] | None = None
    question: Tensor | None = None
    sample: int = 0
    image: int = 0
    key: int = 0
    vision: Mapping[int, VisionRows] = field(default_factory=dict)
    patches: Tensor | None = None
    groups: Tensor | None = None

    @property
    def n(self) -> int:
        """Visual tokens of the image before pruning."""
        return self.features.shape[0]


@dataclass(frozen=True, eq=False)
class Merge:
    """Rows that become weighted sums: row `destination` = sum of weight x features[source].

    Attributes:
        source: [m] LongTensor of original rows, 0..n-1.
        destination: [m] LongTensor of slots in the kept rows, 0..k-1.
        weight: [m] floats; the weights of one destination sum to 1. A slot that is no destination
            keeps its own row unchanged.
    """

    source: Tensor
    destination: Tensor
    weight: Tensor


def sizes_after(indices: Tensor, n: int, merge: Merge | None, before: Tensor | None = None) -> Tensor:
    """[k] float32: how many tokens each kept row stands for.

    A kept row's size is that of its sources together, whatever their weights; of a row that goes to several
    slots each has an equal share, so that sizes add up to the rows that are in any. Rows dropped without a
    merge are in none.

    Args:
        indices: [k] kept rows.
        n: the rows there were.
        merge: what the kept rows absorb; a slot that is no destination is its own row.
        before: [n] sizes the rows had; 1 each if None.
    """
    before = torch.ones(n, device=indices.device) if before is None else before.to(indices.device)
    if merge is None:
        return before[indices]
    source, slot = merge.source.to(indices.device), merge.destination.to(indices.device)
    own = torch.ones_like(indices, dtype=torch.bool)
    own[slot] = False
    source = torch.cat((source, indices[own]))
    slot = torch.cat((slot, own.nonzero().flatten()))
    share = before[source] / torch.bincount(source, minlength=n)[source]
    return torch.zeros(indices.numel(), device=indices.device).index_add(0, slot, share)


@dataclass(frozen=True, eq=False, repr=False)
class Selection:
    """The kept rows of one image.

    Attributes:
        indices: [k] LongTensor, ascending and unique, rows of `VisualTokens.features`. Where rows are
            dropped inside the language model, those that are left in its last layer.
        n: the rows there were.
        scores: [n] what the rows were ranked by (higher is kept), or None.
        merge: what the kept rows absorb, or None.
        layers: one LongTensor for each layer of the language model, the rows that it sees; empty where
            all rows are dropped before the first layer.
        sound: whether indices are right by construction, as `top_k` makes them: an accelerator may then use
            them before they are checked.
    """

    indices: Tensor
    n: int
    scores: Tensor | None = None
    merge: Merge | None = None
    layers: tuple[Tensor, ...] = ()
    sound: bool = field(default=False, repr=False)

    def __repr__(self) -> str:
        inside = f", {len(self.layers)} layers" if self.layers else ""
        return f"Selection({self.k} of {self.n} rows{', merged' if self.merge is not None else ''}{inside})"

    @property
    def k(self) -> int:
        """Rows kept (to the last layer)."""
        return int(self.indices.numel())

    @property
    def counts(self) -> list[int]:
        """Rows in each layer of the language model; [k] where the count is the same in all."""
        return [int(rows.numel()) for rows in self.layers] or [self.k]

    @property
    def paid(self) -> float:
        """Rows the language model pays for, averaged over its layers: what `keep` asks for."""
        return sum(self.counts) / len(self.counts)

    def mask(self) -> Tensor:
        """[n] bool, True where the row is kept."""
        mask = torch.zeros(self.n, dtype=torch.bool, device=self.indices.device)
        mask[self.indices] = True
        return mask


def top_k(scores: Tensor, k: int) -> Tensor:
    """[k] indices of the k largest of [n] scores, ascending; among equals the lower index wins."""
    order = torch.sort(scores, descending=True, stable=True).indices
    return order[:k].sort().values


def top_k_of_each(scores: Tensor, counts: Sequence[int]) -> list[Tensor]:
    """`top_k` of each row of [B, n] scores, with a count of its own, in two sorts for all rows."""
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices
    ranks = torch.arange(scores.shape[1], device=scores.device)
    dropped = torch.ones_like(order).scatter_(-1, order, (ranks >= onto(list(counts), scores.device)[:, None]).long())
    places = torch.sort(dropped, dim=-1, stable=True).indices
    return [row[:count] for row, count in zip(places, counts, strict=True)]


class Pruner(ABC):
    """Chooses k of n visual tokens, one image at a time.

    Subclasses are frozen dataclasses, one a file, and state their class attributes:

    name: the registry name, snake_case.
    needs: which fields of `VisualTokens` they read (see `NEEDS`).
    vision_layers: blocks of the vision tower whose attention they read (with "vision_attention" in
        `needs`); negative numbers count from the last. LLaVA's features come out of -2.
    stage: where rows are dropped; "input" means before the language model's first layer, "llm" inside
        it (see `LayerPruner`), "vision" inside the vision tower (see `TowerPruner`).
    source: the paper, in one line.
    trained: whether it has weights that were trained for pruning.
    default_keep: the budget when `keep` is left away; None means that `keep` must be given.
    """

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset({"features"})
    vision_layers: ClassVar[tuple[int, ...]] = ()
    stage: ClassVar[str] = "input"
    source: ClassVar[str] = ""
    trained: ClassVar[bool] = False
    default_keep: ClassVar[float | None] = None

    def check(self, model: Any) -> None:  # noqa: B027
        """Raises a `GripError` where this pruner cannot serve `model`. Called when it is attached."""

    @abstractmethod
    def select(self, tokens: VisualTokens) -> Selection:
        """Exactly `tokens.keep` rows of `tokens`. The caller checks the result, for all pruners."""

    def allot(self, sample: Sequence[VisualTokens]) -> Sequence[int]:
        """The rows to keep of each of a prompt's images; their sum is that of the budgets asked for.

        By default what was asked for. Pruners that split a budget among images or tiles override it.
        """
        return [tokens.keep for tokens in sample]

    def select_batch(self, images: Sequence[VisualTokens]) -> list[Selection]:
        """`select` for all images of a batch; override it where they are faster together."""
        return [self.select(tokens) for tokens in images]


class ScorePruner(Pruner):
    """A pruner that ranks: implement `score`, and the k highest are kept."""

    @abstractmethod
    def score(self, tokens: VisualTokens) -> Tensor:
        """[n] floats, higher is kept. Ties go to the lower index."""

    def select(self, tokens: VisualTokens) -> Selection:
        scores = self.score(tokens)
        if not isinstance(scores, Tensor) or scores.shape != (tokens.n,):
            got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise PrunerError(f"pruner {self.name!r}: score() must return a tensor ({tokens.n},), got {got}")
        return Selection(top_k(scores, tokens.keep), tokens.n, scores, sound=True)
