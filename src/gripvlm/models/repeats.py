"""Which cells of a picture repeat their neighbours: found in its pixels, before the vision tower starts.

A cell is the square block of patches that becomes one visual token. PixelPrune (arXiv 2604.00886) walks over the cells
in raster order and predicts each from those on its left, above it, and above left, as JPEG-LS predicts pixels. Where
the cell above left is like the one on the left but unlike the one above, an edge runs between the columns, and the cell
is expected to be as the one above; else as the one on its left. A cell that is as expected is merged into the one that
it repeats. Only neighbours are merged, so what was dropped can be told from what is left, and where it was.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gripvlm.errors import InputError
from gripvlm.models.content_keys import PIXELS
from gripvlm.types import Merge, Selection
from gripvlm.utils.batching import onto

if TYPE_CHECKING:
    from gripvlm.models.prompts import Prompts

__all__ = ["Distinct", "RepeatRule", "distinct_cells", "find_repeats"]

Array = np.ndarray[Any, Any]


class RepeatRule(NamedTuple):
    """When a cell repeats another, and what becomes of it.

    Attributes:
        threshold: the largest difference of any of its pixel values, as the processor normalised them, from those of
            the cell that it is merged into; 0 for equal bits.
        counted: whether the tower attends to a cell as to all those that were merged into it.
    """

    threshold: float
    counted: bool


@dataclass(frozen=True, eq=False)
class Distinct:
    """The cells of one image that are left.

    Attributes:
        slot: [n] which of the cells that are left stands for each cell.
        rows: [m] the cells that are left, ascending.
    """

    slot: Array
    rows: Array

    @classmethod
    def of(cls, parents: Array) -> Distinct:
        """From the cell [n] that each is merged into, itself if it stays."""
        rows = np.flatnonzero(parents == np.arange(len(parents)))
        return cls(np.searchsorted(rows, parents), rows)

    @cached_property
    def sizes(self) -> Array:
        """[m] how many cells each of those that are left stands for."""
        return np.bincount(self.slot, minlength=len(self.rows))

    def over_all(self, selection: Selection) -> Selection:
        """A selection from the m rows that are left as one from all n."""
        device = selection.indices.device
        rows = onto(self.rows, device)

        def told(chosen: Tensor) -> Tensor:
            return rows.index_select(0, chosen.to(device))

        scores, merge = selection.scores, selection.merge
        return replace(
            selection,
            indices=told(selection.indices),
            n=len(self.slot),
            scores=None if scores is None else scores.index_select(0, onto(self.slot, scores.device)),
            merge=None if merge is None else Merge(told(merge.source), merge.destination, merge.weight),
            layers=tuple(told(layer) for layer in selection.layers),
            tower=len(self.rows),
        )


def find_repeats(prompts: Prompts, rule: RepeatRule) -> dict[str, list[Distinct]]:
    """modality -> the cells that are left of each item; empty where none repeats another.

    It waits for the device, and so belongs before the tower starts.
    """
    vision, found = prompts.model.config.vision_config, {}
    for modality, name in PIXELS.items():
        pixels, grids = prompts.inputs.get(name), prompts.host.get(f"{modality}_grid_thw")
        if pixels is None:
            continue
        if grids is None:  # a plain ViT: a cell is a patch
            whole = pixels.detach().unfold(2, vision.patch_size, vision.patch_size)
            patches = whole.unfold(3, vision.patch_size, vision.patch_size).permute(0, 2, 3, 1, 4, 5).flatten(3)
            found[modality] = [distinct_cells(each[None], rule.threshold) for each in patches]
            continue
        side = vision.spatial_merge_size
        shapes = [(t, h // side, w // side) for t, h, w in grids.tolist()]
        sizes = [math.prod(shape) for shape in shapes]
        if pixels.shape[0] != sum(sizes) * side**2:
            raise InputError(
                f"{name} have {pixels.shape[0]} patches, but the grids {sum(sizes) * side**2}: make the inputs with "
                "the model's own processor"
            )
        # Processors put the patches of a cell side by side.
        items = pixels.detach().reshape(sum(sizes), -1).split(sizes)
        found[modality] = [
            distinct_cells(item.unflatten(0, shape), rule.threshold) for item, shape in zip(items, shapes, strict=True)
        ]
    return found if any(len(d.rows) < len(d.slot) for items in found.values() for d in items) else {}


def distinct_cells(cells: Tensor, threshold: float) -> Distinct:
    """The cells of one item that are left: `cells` [t, h, w, values], each frame by itself."""
    merge = _equal if threshold == 0 else _near
    frame = cells.shape[1] * cells.shape[2]
    parents = [merge(each, threshold) + number * frame for number, each in enumerate(cells)]
    return Distinct.of(np.concatenate(parents))


def _equal(cells: Tensor, threshold: float = 0) -> Array:
    """[h * w] the cell that each cell of [h, w, values] is merged into, where equal bits are merged."""
    height, width = cells.shape[:2]
    bits = cells.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[cells.element_size()])
    left, up = np.zeros((2, height, width), dtype=bool)
    # [r, c]: equal to the cell on the left, to the cell above
    left[:, 1:] = (bits[:, 1:] == bits[:, :-1]).all(-1).cpu().numpy()
    up[1:] = (bits[1:] == bits[:-1]).all(-1).cpu().numpy()
    by_above = np.zeros_like(up)
    by_above[1:, 1:] = up[1:, :-1] & ~left[:-1, 1:]  # an edge between the two neighbours on the left, none above
    by_above[1:, 0] = True
    cell = np.arange(height * width).reshape(height, width)
    parents = np.where(by_above & up, cell - width, np.where(~by_above & left, cell - 1, cell)).ravel()
    while (further := parents[parents]).tobytes() != parents.tobytes():
        parents = further
    return parents


def _near(cells: Tensor, threshold: float) -> Array:
    """[h * w] the cell that each cell of [h, w, values] is merged into, where values may differ by `threshold`.

    All comparisons are with the cells that stay, so that small differences do not add up along a row.
    """
    height, width = cells.shape[:2]
    values = cells.float().cpu().numpy().reshape(height * width, -1)
    parents = np.arange(height * width)

    def alike(a: int, b: int) -> bool:
        return a == b or float(np.abs(values[a] - values[b]).max()) <= threshold

    for cell in range(1, height * width):
        row, column = divmod(cell, width)
        left = parents[cell - 1] if column else -1
        above = parents[cell - width] if row else -1
        if left < 0 or above < 0:
            expected = max(left, above)
        else:
            corner = parents[cell - width - 1]
            by_above = alike(corner, left) and not alike(corner, above)
            expected = above if by_above else left
        if alike(expected, cell):
            parents[cell] = expected
    return parents
