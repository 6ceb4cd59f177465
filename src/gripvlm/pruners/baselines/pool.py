"""Average pooling to any count: every token is averaged into the nearest point of a lattice."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gripvlm.pruners.base import Pruner
from gripvlm.pruners.baselines.grid import lattice
from gripvlm.types import Merge, Selection, VisualTokens
from gripvlm.utils.batching import onto


@dataclass(frozen=True)
class Pool(Pruner):
    """x'_a = mean of x_i over the tokens i whose nearest lattice point is a.

    Plain average pooling, generalised to every k. The anchors and their positions are those of
    `Grid`; where the lattice divides the raster into equal blocks the result is block average
    pooling exactly.

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
