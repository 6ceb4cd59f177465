"""Keep an even lattice of visual tokens: spatial coverage without looking at any of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gripvlm.pruners.base import Pruner
from gripvlm.types import Selection, VisualTokens
from gripvlm.utils.batching import onto


def lattice(grid: tuple[int, int], k: int) -> tuple[Tensor, Tensor]:
    """k points spread evenly over an h x w raster.

    r rows, r the integer nearest to sqrt(k h / w) that leaves no row with more than w points; row i
    gets floor((i+1) k / r) - floor(i k / r) of them. Rows and the points in a row are centred:
    the j-th of c points lies at (j + 1/2) w / c. So k points always exist, and where r divides h
    and k / r divides w they are the centres of equal blocks.

    Returns:
        indices [k] LongTensor, ascending raster indices of the cells that hold the points, and
        centres [k, 2] float (y, x) in cells, cell (a, b) covering [a, a+1) x [b, b+1).
    """
    h, w = grid
    # At least ceil(k / w) rows, else one of them would need more points than it has cells.
    rows = min(h, k, max(math.floor(math.sqrt(k * h / w) + 0.5), -(-k // w)))
    points = []
    for i in range(rows):
        columns = (i + 1) * k // rows - i * k // rows
        y = (i + 0.5) * h / rows
        points += [(y, (j + 0.5) * w / columns) for j in range(columns)]
    centres = torch.tensor(points)
    cells = centres.floor().long()
    return cells[:, 0] * w + cells[:, 1], centres


@dataclass(frozen=True)
class Grid(Pruner):
    """Rows of the image at the points of an even k-point lattice (see `lattice`).

    Uniform sub-sampling; a strong baseline in UniPruneBench, arXiv 2511.02650. It reads no feature,
    so its choice is known from the image's size alone.
    """

    name = "grid"
    needs = frozenset({"grid"})
    source = "baseline: uniform sub-sampling"

    def select(self, tokens: VisualTokens) -> Selection:
        assert tokens.grid is not None
        indices, _ = lattice(tokens.grid, tokens.keep)
        return Selection(onto(indices, tokens.features.device), tokens.n, sound=True)
