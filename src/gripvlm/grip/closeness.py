"""How close visual tokens are to kept ones, in what they show and where."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

__all__ = ["Closeness"]

REACH = 1.5
"""r, in tokens."""


class Closeness:
    """c_ij = max(cos(x_i, x_j), 0) / 2 + exp(-|p_i - p_j|^2 / (2 r^2)) / 2, the second term in one image only.

    In [0, 1], a constant for gradients. The weights and r = 1.5 tokens were chosen on validation questions of lab-dense
    among a few (experiments/grip_claim); either term alone gains nearly as much.

    Args:
        features: [B, n, d] x.
        cells: [B, n, 2] p, row and column in tokens.
        images: [B, n] the number of each token's image; None: all of one.
    """

    def __init__(self, features: Tensor, cells: Tensor, images: Tensor | None) -> None:
        self._features, self._cells, self._images = normalize(features.detach().float(), dim=-1), cells, images
        self._table: Tensor | None = None

    def tabulate(self) -> None:
        """Stores c of all pairs, [B, n, n]: for many sets of the same tokens, as in training."""
        if self._table is None:
            every = torch.arange(self._cells.shape[1], device=self._cells.device)
            self._table = self.rows(every.expand(len(self._cells), -1))

    def rows(self, index: Tensor) -> Tensor:
        """[B, m, n] float32: how close all tokens are to tokens [B, m]."""
        if self._table is not None:
            return _taken(self._table, index)
        with torch.no_grad():
            apart = torch.cdist(_taken(self._cells, index), self._cells, compute_mode="donot_use_mm_for_euclid_dist")
            beside = apart.square_().div_(-2 * REACH**2).exp_()
            if self._images is not None:
                beside *= self._images.gather(1, index)[..., None] == self._images[:, None]
            return (_taken(self._features, index) @ self._features.mT).clamp_min_(0).add_(beside).mul_(0.5)

    def nearest(self, kept: Tensor) -> Tensor:
        """[B, G, n] how close each token is to the nearest of kept [B, G, m], -1 at padding; 0 where there is none."""
        if not kept.shape[-1]:
            return self._features.new_zeros(*kept.shape[:2], self._cells.shape[1])
        rows = self.rows(kept.clamp_min(0).flatten(1)).unflatten(1, kept.shape[1:])
        return rows.masked_fill((kept < 0)[..., None], 0.0).amax(2)


def _taken(values: Tensor, index: Tensor) -> Tensor:
    """[B, m, c] rows `index` [B, m] of values [B, n, c]."""
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))
