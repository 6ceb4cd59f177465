"""The output of the vision encoder for a batch, stored for reuse."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from torch import Tensor

from gripvlm.models.grids import Grid, Rasters
from gripvlm.models.repeats import Distinct
from gripvlm.models.tower_rows import FEATURES_ONLY, TowerRequest
from gripvlm.types import VisionRows, VisualTokens
from gripvlm.utils.timing import Stopwatch

__all__ = ["Encoded", "Item", "Output", "Span"]


@dataclass(frozen=True, eq=False)
class Item:
    """One visual item as encoded: an image, for most families; a tile or a video for some.

    Attributes:
        modality: "image" or "video".
        features: [n, d] rows as the language model receives them.
        deepstack: further planes [n, d], one for each layer they are added at; mostly none.
        tail: [t, d] rows behind these that stay whatever is selected, such as a separator; None for most families.
        grid: (h, w) of a plain raster, else None.
        key: a number from the pixels alone (see `VisualTokens.key`).
        patch_grid: (t, h, w) or (h, w) in patches before merging, for families whose positions are made from it, else
            None.
        vision: layer as requested -> what that block of the vision tower gave for each row; mostly empty.
        patches: [n, d_v] what the tower made of each row before the projector, where requested.
        groups: [n] the row that each was merged into inside the tower, where it merged; features are the group's.
        tower_rows: [k'] the rows that were not dropped inside the tower, where it dropped; others are zero.
        distinct: where repeats were merged ahead of the tower, which rows are left: the n of all other fields.
        rasters: where grid is None, the rasters that the rows are made of (see `VisualTokens.rasters`).
        seconds: between two temporal patches of a video, for families whose positions are made from it, else None.
    """

    modality: str
    features: Tensor
    deepstack: tuple[Tensor, ...]
    grid: Grid
    key: int
    tail: Tensor | None = None
    patch_grid: tuple[int, ...] | None = None
    vision: Mapping[int, VisionRows] = field(default_factory=dict)
    patches: Tensor | None = None
    groups: Tensor | None = None
    tower_rows: Tensor | None = None
    distinct: Distinct | None = None
    seconds: float | None = None
    rasters: Rasters = ()

    @property
    def placeholders(self) -> int:
        """How many it has in its prompt."""
        return self.behind + (self.features.shape[0] if self.distinct is None else len(self.distinct.slot))

    @property
    def behind(self) -> int:
        """How many of them are of rows that stay."""
        return 0 if self.tail is None else self.tail.shape[0]

    def tokens(self, keep: int, question: Tensor | None, sample: int, image: int) -> VisualTokens:
        """What a pruner gets to choose `keep` rows of it."""
        return VisualTokens(
            features=self.features,
            keep=keep,
            grid=self.grid if self.distinct is None else None,
            question=question,
            sample=sample,
            image=image,
            key=self.key,
            vision=self.vision,
            patches=self.patches,
            groups=self.groups,
            rasters=self.rasters if self.distinct is None else (),
            tower_rows=self.tower_rows,
        )


class Output(NamedTuple):
    """What is needed to make an encoder's output again, with other rows.

    Attributes:
        kind: the class of the encoder's output.
        one_tensor: whether its rows were one tensor for all items, not a list.
        extras: further fields that `forward` reads, the same whatever rows are kept.
    """

    kind: type
    one_tensor: bool
    extras: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Encoded:
    """The output of encoder and projector for a batch, reusable across prunings and questions.

    Attributes:
        model_type: the family that made it.
        samples: a tuple (batch) of tuples of `Item`, in prompt order; () for a prompt without any.
        outputs: modality -> `Output`.
        watch: the time of the encoder, if it was measured.
        tower_request: which tensors of the vision tower were captured.
    """

    model_type: str
    samples: tuple[tuple[Item, ...], ...]
    outputs: Mapping[str, Output]
    watch: Stopwatch | None = None
    tower_request: TowerRequest = FEATURES_ONLY

    @property
    def seconds(self) -> float:
        """Time that encoding took; on an accelerator, reading this waits until it is done."""
        return 0.0 if self.watch is None else self.watch.seconds()["vision"]

    def __len__(self) -> int:
        return len(self.samples)

    def take(self, samples: Iterable[int]) -> Encoded:
        """The given samples, in the given order, repeats allowed; shares all memory.

        `encoded.take([0] * 8)` serves eight rollouts of the first prompt.
        """
        return replace(self, samples=tuple(self.samples[i] for i in samples))


@dataclass(frozen=True, eq=False)
class Span:
    """An item and where it lies in its prompt.

    Attributes:
        item: of n rows.
        columns: [placeholders] all of its placeholders, ascending.
        real: how many of these are not masked.
    """

    item: Item
    columns: Tensor
    real: int

    @property
    def positions(self) -> Tensor:
        """[n] the placeholders of its rows."""
        return self.columns if self.item.distinct is None else self.columns[self.item.distinct.rows]
