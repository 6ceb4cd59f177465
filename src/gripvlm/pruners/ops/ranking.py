"""Ranks, scales and windows: what several pruners do with scores."""

from __future__ import annotations

import torch
from torch import Tensor


def descending(scores: Tensor) -> Tensor:
    """[n] indices by falling score; among equals the lower first, on every device."""
    return torch.sort(scores, descending=True, stable=True).indices


def mask_of(indices: Tensor, n: int) -> Tensor:
    """[n] bool, True at the indices."""
    mask = torch.zeros(n, dtype=torch.bool, device=indices.device)
    mask[indices] = True
    return mask


def fill_best(kept: Tensor, order: Tensor, count: int) -> None:
    """Sets `count` more of the [n] bools `kept`: the first in `order`, [n] indices, that are not set yet."""
    kept[order[~kept[order]][:count]] = True


def min_max(values: Tensor) -> Tensor:
    """[n] scaled to [0, 1]; all 0 where all are equal."""
    low, high = values.aminmax()
    return (values - low) / (high - low) if high > low else torch.zeros_like(values)


def rank_in_group(scores: Tensor, group: Tensor) -> Tensor:
    """[n] places, 0 for the highest of [n] scores in its group ([n] numbers); ties: the lower index first."""
    order = descending(scores)
    order = order[torch.sort(group[order], stable=True).indices]  # by group, then by score
    size = torch.bincount(group)
    start = size.cumsum(0) - size
    place = torch.empty_like(order)
    place[order] = torch.arange(order.numel(), device=order.device) - start[group[order]]
    return place


def window_numbers(grid: tuple[int, int], size: tuple[int, int], device: torch.device | str = "cpu") -> Tensor:
    """[n] number of the window, of `size` cells from the top left, that each cell of a raster lies in."""
    (h, w), (high, wide) = grid, size
    # Windows at the right and at the bottom may be smaller.
    y, x = torch.arange(h, device=device) // high, torch.arange(w, device=device) // wide
    return (y[:, None] * -(-w // wide) + x).flatten()
