"""Even coverage of the image without looking at any token: a lattice of points, and pooling into them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gripvlm.pruners.base import Pruner
from gripvlm.types import Merge, Selection, VisualTokens
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
    """Keep an even lattice of visual tokens: spatial coverage without looking at any of them.

    The tokens at the points of `lattice`. Uniform sub-sampling; a strong baseline in UniPruneBench, arXiv 2511.02650.
    """

    name = "grid"
    needs = frozenset({"grid"})
    source = "baseline: uniform sub-sampling"

    def select(self, tokens: VisualTokens) -> Selection:
        assert tokens.grid is not None
        indices, _ = lattice(tokens.grid, tokens.keep)
        return Selection(onto(indices, tokens.features.device), tokens.n, sound=True)


@dataclass(frozen=True)
class Pool(Pruner):
    """Average pooling to any count: every token is averaged into the nearest point of a lattice.

    x'_a = mean of x_i over the tokens i whose nearest lattice point is a. The points are those of `Grid`; where they
    divide the raster into equal blocks the result is block average pooling exactly.

    1. Distance is Euclidean between cell centres and lattice points, in cells; ties go to the
       anchor with the lower index.
    2. An anchor's own cell always belongs to it, so no mean is empty.
    """

    name = "pool"
    needs = frozenset({"features", "grid"})
    source = "baseline: average pooling"

    def select(self, tokens: VisualTokens) -> Selection:
        assert tokens.grid is not None
        h, w = tokens.grid
        # All on the host: sizes alone decide, and nothing has to wait for the device.
        anchors, centres = lattice(tokens.grid, tokens.keep)
        y, x = torch.meshgrid(torch.arange(h) + 0.5, torch.arange(w) + 0.5, indexing="ij")
        cells = torch.stack((y.flatten(), x.flatten()), dim=-1)  # [n, 2]
        squared = (cells[:, None] - centres[None]).square().sum(-1)  # [n, k]
        slot = squared.argmin(dim=-1)  # [n]
        # On a crowded lattice an anchor's own cell may lie nearer to another point: its mean would be empty.
        slot[anchors] = torch.arange(tokens.keep)
        size = torch.bincount(slot, minlength=tokens.keep)
        device = tokens.features.device
        merge = Merge(
            source=torch.arange(tokens.n, device=device),
            destination=onto(slot, device),
            weight=onto(size[slot].reciprocal(), device),
        )
        return Selection(onto(anchors, device), tokens.n, merge=merge)
