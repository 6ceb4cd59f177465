"""The contract between pruners and everything else: what a pruner is given, and what it returns.

Tensors only. Built by keyword everywhere, as most fields are optional.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["LLMTokens", "Merge", "Selection", "VisionRows", "VisualTokens", "sizes_after"]


@dataclass(frozen=True, eq=False)
class VisionRows:
    """What one block of the vision tower says about each of an image's n rows.

    A row that is made of several patches gets their mean. Float32, on the model's device. Rows with no patch behind
    them (newline rows) get zeros.

    Attributes:
        received: [H, n] attention that the row gets, head by head: the mean over all queries that see it (its image,
            tile or window), CLS included where there is one.
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
        features: [n, d] rows as the language model would receive them (after the projector), on the model's device
            and in its dtype.
        keep: k, the rows to keep, 1 <= k <= n.
        grid: (h, w) with h * w == n when the rows are a plain raster of the image, else None.
        question: [t, d] token embeddings of the question (t may be 0); None unless in `needs`.
        sample: the prompt's position in the batch.
        image: the image's position in its prompt.
        key: a number that depends on the image's pixels alone, so that it is the same in any batch and on any device
            (0 where a family gives none).
        vision: layer -> `VisionRows`, one for each of the pruner's `vision_layers`, under the number as it stands
            there; empty unless "vision_attention" is in `needs`. With "vision_given" it has what patches give to one
            another.
        patches: [n, d_v] what the vision tower made of each row before the projector; a row of several patches has
            their mean. None unless in `needs`.
        groups: [n] LongTensor, for each row the one it was merged into inside the vision tower, itself if it stands
            for its group; features are then the group's. None but for a `TowerPruner`.
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

    @property
    def device(self) -> torch.device:
        return self.features.device


@dataclass(frozen=True, eq=False)
class Merge:
    """Rows that become weighted sums: row `destination` = sum of weight x features[source].

    Attributes:
        source: [m] LongTensor of original rows, 0..n-1.
        destination: [m] LongTensor of slots in the kept rows, 0..k-1.
        weight: [m] floats; the weights of one destination sum to 1. A slot that is no destination keeps its own row.
    """

    source: Tensor
    destination: Tensor
    weight: Tensor


def sizes_after(indices: Tensor, n: int, merge: Merge | None, before: Tensor | None = None) -> Tensor:
    """[k] float32: how many tokens each kept row stands for.

    A kept row's size is that of its sources together, whatever their weights. A row that goes to several slots is
    shared equally, so that sizes add up to the rows that are in any slot; rows dropped without a merge are in none.

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
        indices: [k] LongTensor, ascending and unique, rows of `VisualTokens.features`. Where rows are dropped inside
            the language model, those that are left in its last layer.
        n: the rows there were.
        scores: [n] what the rows were ranked by (higher is kept), or None.
        merge: what the kept rows absorb, or None.
        layers: one LongTensor for each layer of the language model, the rows that it sees; empty where all rows are
            dropped before the first layer.
        sound: whether indices are right by construction, as `top_k` makes them: an accelerator may then use them
            before they are checked.
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


@dataclass(frozen=True, eq=False)
class LLMTokens:
    """The n visual tokens of one image that are left, as they enter a layer of the language model.

    Attributes:
        layer: the layer that they enter, 1 or more; rows dropped now are dropped before it.
        keep: the rows to keep, 1 <= keep <= n.
        rows: [n] LongTensor, ascending: which of the image's original rows they are.
        input: what was known before the language model: `input.features[rows]`, the grid, the vision tower's rows.
        hidden: [n, d] hidden states that enter the layer.
        last: [H, n] attention weights of the prompt's last token on these tokens in the layer before, head by head.
        question: [H, t, n] the same for each of the prompt's t text tokens (those that are not special tokens), in
            order. Under causal attention those ahead of the image do not see it: zeros.
        text: [t, d] hidden states of these text tokens that enter the layer; also with "question".
        after: [t] bool, which of these text tokens come after the image; with "question" or "text".
        words: [t, d] embeddings of these text tokens, as they entered the first layer.
        keys: [n, d_h] keys of the layer before, the mean over its key heads, after rotary positions.
        key_sizes: [n] L1 norms of the same keys over all heads and dimensions.
        text_key_sizes: [t] those of the text tokens; with "key_sizes" and "question" or "text".
        norm: the language model's last norm, which makes of states [..., d] what its head reads.
    """

    layer: int
    keep: int
    rows: Tensor
    input: VisualTokens
    hidden: Tensor | None = None
    last: Tensor | None = None
    question: Tensor | None = None
    text: Tensor | None = None
    after: Tensor | None = None
    words: Tensor | None = None
    keys: Tensor | None = None
    key_sizes: Tensor | None = None
    text_key_sizes: Tensor | None = None
    norm: Callable[[Tensor], Tensor] | None = None

    @property
    def n(self) -> int:
        """Tokens of the image that are left."""
        return int(self.rows.numel())

    @property
    def device(self) -> torch.device:
        return self.rows.device

    @property
    def sample(self) -> int:
        """The prompt's position in the batch."""
        return self.input.sample

    @property
    def image(self) -> int:
        """The image's position in its prompt."""
        return self.input.image
