"""How close visual tokens are to kept ones, in what they show and where."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import normalize

__all__ = ["Closeness", "closeness"]

Closeness: TypeAlias = Callable[[Tensor], Tensor]
"""Items [B, G, m], -1 at padding -> [B, G, n] each item's closeness to the nearest of them, 0 where there is none."""

REACH = 1.5
"""Tokens: the standard deviation of what a token's place is close to."""


def closeness(features: Tensor, cells: Tensor, images: Tensor | None) -> Closeness:
    """c_ij = max(cos(x_i, x_j), 0) / 2 + exp(-|p_i - p_j|^2 / (2 r^2)) / 2, the second term in one image only.

    Weights and reach r (1.5 tokens) were chosen on validation questions of lab-dense among a few
    (experiments/grip_claim); either term alone gains nearly as much.

    Args:
        features: [B, n, d] x.
        cells: [B, n, 2] p, row and column in tokens.
        images: [B, n] the number of each token's image; None: all of one.
    """
    rows = normalize(features.detach().float(), dim=-1)

    def nearest(kept: Tensor) -> Tensor:
        if not kept.shape[-1]:
            return rows.new_zeros(*kept.shape[:2], rows.shape[1])
        index = kept.clamp_min(0).flatten(1)  # [B, G m]
        alike = (_of(rows, index) @ rows.mT).clamp_min(0)
        gap = _of(cells, index)[:, :, None] - cells[:, None]  # [B, G m, n, 2]
        beside = (gap.square().sum(-1) / (-2 * REACH**2)).exp()
        if images is not None:
            beside = beside * (images.gather(1, index)[..., None] == images[:, None])
        value = (alike + beside).mul(0.5).unflatten(1, kept.shape[1:])
        return value.masked_fill((kept < 0)[..., None], 0.0).amax(2)

    return nearest


def _of(values: Tensor, index: Tensor) -> Tensor:
    """[B, m, c] rows `index` [B, m] of values [B, n, c]."""
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))
