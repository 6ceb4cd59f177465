"""How close visual tokens are to kept ones, in what they show and where."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

__all__ = ["closeness", "nearest"]

REACH = 1.5
"""Tokens: the standard deviation of what a token's place is close to."""


def closeness(features: Tensor, cells: Tensor, images: Tensor | None) -> Tensor:
    """[B, n, n] float32, a constant: how close tokens are, in [0, 1].

    c_ij = max(cos(x_i, x_j), 0) / 2 + exp(-|p_i - p_j|^2 / (2 r^2)) / 2, the second term in one image only. Weights and
    reach r (1.5 tokens) were chosen on validation questions of lab-dense among a few (experiments/grip_claim); either
    term alone gains nearly as much.

    Args:
        features: [B, n, d] x.
        cells: [B, n, 2] p, row and column in tokens.
        images: [B, n] the number of each token's image; None: all of one.
    """
    with torch.no_grad():
        rows = normalize(features.float(), dim=-1)
        square = sum((line[:, :, None] - line[:, None]).square() for line in cells.float().unbind(-1))
        beside = (square / (-2 * REACH**2)).exp_()
        if images is not None:
            beside *= images[:, :, None] == images[:, None]
        return (rows @ rows.mT).clamp_min_(0).add_(beside).mul_(0.5)


def nearest(close: Tensor, kept: Tensor) -> Tensor:
    """[B, G, n] the closeness [B, n, n] of each token to the nearest of kept [B, G, m], -1 at padding; 0 for none."""
    near = close.new_zeros(*kept.shape[:2], close.shape[-1])
    rows = torch.arange(len(kept), device=kept.device)[:, None]
    for token in kept.unbind(-1):
        near = torch.maximum(near, close[rows, token.clamp_min(0)] * (token >= 0)[..., None])
    return near
