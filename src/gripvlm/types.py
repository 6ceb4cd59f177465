"""The contract between pruners and everything else, in tensors: what a pruner is given, and what it returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["LLMTokens", "Merge", "Part", "Raster", "Selection", "VisionRows", "VisualTokens", "sizes_after"]


@dataclass(frozen=True, eq=False)
class VisionRows:
    """Attention and keys of one block of the vision tower, for each of an image's n rows.

    Float32, on the model's device. A row of several patches has their mean, one without any (a newline) zeros.

    Attributes:
        received: [H, n] attention the row receives, by head: the mean over all queries that see it (its image, tile
            or window), CLS included.
        cls: [H, n] attention of the CLS query; None where the tower has no CLS token.
        keys: [n, d_h] keys after rotary positions, the mean over heads.
        patch_received: [H, n] as `received`, without the CLS query. None where the tower has no CLS token (`received`
            is that), or without "vision_given" in `needs`.
        given: [H, n] the mean attention that the row gives to patches: all but what goes to the CLS token. None
            likewise: without a CLS token every row gives 1 / n.
    """

    received: Tensor
    cls: Tensor | None = None
    keys: Tensor | None = None
    patch_received: Tensor | None = None
    given: Tensor | None = None

    def at(self, rows: Tensor) -> VisionRows:
        """Those of `rows` [m] alone."""
        parts: dict[str, Tensor] = {name: value for name, value in vars(self).items() if value is not None}
        keys = {"keys": parts.pop("keys")[rows]} if "keys" in parts else {}
        return VisionRows(**{name: value[:, rows] for name, value in parts.items()}, **keys)


class Raster(NamedTuple):
    """A part of an image's rows that is an h x w raster: row (y, x) of it is row start + y * stride + x of the image.

    `stride` is w, or more where each line is followed by rows of no raster, such as a newline row.
    """

    start: int
    height: int
    width: int
    stride: int

    @property
    def n(self) -> int:
        return self.height * self.width

    def rows(self) -> Tensor:
        """[h * w] LongTensor: the image's rows that it is made of, line by line."""
        return (self.start + torch.arange(self.height)[:, None] * self.stride + torch.arange(self.width)).flatten()


class Part(NamedTuple):
    """Which of an image's rows some tokens are: row `rows[i]` of `n`, in a raster of `grid` or None."""

    rows: Tensor
    n: int
    grid: tuple[int, int] | None


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
        key: a number that depends on the image's pixels alone, the same in any batch and on any device (0 where a
            family gives none).
        vision: layer -> `VisionRows` for each of the pruner's `vision_layers`; empty unless "vision_attention" is in
            `needs`.
        patches: [n, d_v] the vision tower's output for each row, before the projector; the mean for a row of several
            patches. None unless in `needs`.
        groups: [n] LongTensor, for a `TowerPruner`: the row that each was merged into inside the tower, itself where
            it stands for its group. Features are then the group's.
        rasters: where grid is None, the rasters that the rows are made of, ascending: a whole view and the tiles of an
            image, the frames of a video. A row of none of them shows no place of the image: a newline or a separator.
            Empty where they are not known. A pruner with "grid" in `needs` gets them one at a time, each with its
            grid (`engine/by_raster.py`).
        first_queries: [t, H, d_h] queries of the question in the language model's first layer, ahead of rotary
            positions. None unless "first_layer" and "question" are in `needs`.
        first_keys: [n, H, d_h] keys of the rows likewise, for each of its query heads; with "first_layer".
        tower_rows: [k'] LongTensor, ascending, for the wrapper `tower`: the rows that were not dropped inside the
            tower. What others hold (features, patches, attention) is zero.
        part: behind the wrapper `tower`, which of the image's rows these are; grid is None then. None elsewhere.
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
    rasters: tuple[Raster, ...] = ()
    first_queries: Tensor | None = None
    first_keys: Tensor | None = None
    tower_rows: Tensor | None = None
    part: Part | None = None

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
    """[k] float32: how many of n tokens were merged into each of the kept rows `indices` [k].

    The size of a row is the sum of the sizes of its sources, whatever their weights; a source with several destinations
    is divided equally. Rows that are dropped without a merge are not counted. `before` [n]: sizes before; None: all 1.
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
        indices: [k] LongTensor, ascending and unique, rows of `VisualTokens.features`; k may be 0 of a joint pruner.
            Where rows are dropped inside the language model, those that are left in its last layer.
        n: the number of rows before.
        scores: [n] the scores that ranked the rows (higher is kept), or None.
        merge: the rows that are merged into kept rows, or None.
        layers: for each layer of the language model, a LongTensor of the rows that it sees; empty where all rows are
            dropped at the input.
        tower: rows that the last blocks of the vision tower saw; None: all.
        sound: whether indices are right by construction (`top_k`): a device may then use them before they are checked.
    """

    indices: Tensor
    n: int
    scores: Tensor | None = None
    merge: Merge | None = None
    layers: tuple[Tensor, ...] = ()
    tower: int | None = None
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
        """Rows in the language model, averaged over its layers: the number that `keep` requests."""
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
        layer: the layer that they enter, 1 or more; rows are dropped before it.
        keep: the rows to keep, 1 <= keep <= n.
        rows: [n] LongTensor, ascending: which of the image's original rows they are.
        input: what was known before the language model: `input.features[rows]`, the grid, the vision tower's rows.
        hidden: [n, d] hidden states that enter the layer.
        before: [n, d] hidden states of the same rows that entered the layer before.
        last: [H, n] attention of the prompt's last token on these tokens in the layer before, by head.
        question: [H, t, n] the same for each of the prompt's t text tokens that are no special tokens. Under causal
            attention, zeros for those ahead of the image.
        text: [t, d] hidden states of these text tokens that enter the layer; also with "question".
        after: [t] bool, which of these text tokens come after the image; with "question" or "text".
        words: [t, d] embeddings of these text tokens, as they entered the first layer.
        keys: [n, d_h] keys of the layer before, the mean over its key heads, after rotary positions.
        all_keys: [n, H d_h] the same keys of all key heads, side by side.
        key_sizes: [n] L1 norms of these, over all heads and dimensions.
        values: [n, H, d_h] values of the layer before, of each of its value heads.
        text_values: [t, H, d_h] those of the text tokens; with "values" and "question" or "text".
        rotary: [n, 2, d_r] cosines and sines of the rotary positions in the layer before; the axes of M-RoPE side by
            side.
        text_key_sizes: [t] those of the text tokens; with "key_sizes" and "question" or "text".
        norm: the language model's last norm, which makes of states [..., d] what its head reads.
    """

    layer: int
    keep: int
    rows: Tensor
    input: VisualTokens
    hidden: Tensor | None = None
    before: Tensor | None = None
    last: Tensor | None = None
    question: Tensor | None = None
    text: Tensor | None = None
    after: Tensor | None = None
    words: Tensor | None = None
    keys: Tensor | None = None
    all_keys: Tensor | None = None
    key_sizes: Tensor | None = None
    values: Tensor | None = None
    text_values: Tensor | None = None
    rotary: Tensor | None = None
    text_key_sizes: Tensor | None = None
    norm: Callable[[Tensor], Tensor] | None = None

    @property
    def n(self) -> int:
        return int(self.rows.numel())

    @property
    def device(self) -> torch.device:
        return self.rows.device
