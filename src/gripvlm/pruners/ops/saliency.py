"""What several pruners read off attention: saliency, ranks inside groups, windows, mean merges."""

from __future__ import annotations

import torch
from torch import Tensor

from gripvlm.types import Merge, VisualTokens

__all__ = ["keys_of", "looked_at", "mean_into", "min_max", "rank_in_group", "received", "windows"]


def looked_at(tokens: VisualTokens, layer: int) -> Tensor:
    """[n] attention of the vision tower's CLS token in `layer`, the mean over heads.

    In towers without a CLS token, the attention that each token receives, the mean over queries too.
    """
    rows = tokens.vision[layer]
    return (rows.received if rows.cls is None else rows.cls).float().mean(dim=0)


def received(tokens: VisualTokens, layer: int) -> Tensor:
    """[n] attention received in `layer`, the mean over heads and queries."""
    return tokens.vision[layer].received.float().mean(dim=0)


def keys_of(tokens: VisualTokens, layer: int) -> Tensor:
    """[n, d_h] keys in `layer`, the mean over heads; the projected rows where the tower shows no keys."""
    keys = tokens.vision[layer].keys
    return (tokens.features if keys is None else keys).float()


def min_max(values: Tensor) -> Tensor:
    """[n] scaled to [0, 1]; all 0 where all are equal."""
    low, high = values.aminmax()
    return (values - low) / (high - low) if high > low else torch.zeros_like(values)


def rank_in_group(scores: Tensor, group: Tensor) -> Tensor:
    """[n] places, 0 for the highest of [n] scores in its group ([n] numbers); ties: the lower index first."""
    order = torch.sort(scores, descending=True, stable=True).indices
    order = order[torch.sort(group[order], stable=True).indices]  # by group, then by score
    size = torch.bincount(group)
    start = size.cumsum(0) - size
    place = torch.empty_like(order)
    place[order] = torch.arange(order.numel(), device=order.device) - start[group[order]]
    return place


def windows(grid: tuple[int, int], size: tuple[int, int], device: torch.device | str = "cpu") -> Tensor:
    """[n] number of the window, of `size` cells from the top left, that each cell of a raster lies in."""
    (h, w), (high, wide) = grid, size
    y, x = torch.arange(h, device=device) // high, torch.arange(w, device=device) // wide
    return (y[:, None] * -(-w // wide) + x).flatten()


def mean_into(kept: int, own: Tensor, source: Tensor, slot: Tensor) -> Merge | None:
    """Every slot that a source goes to becomes the mean of its own row and its sources.

    Args:
        kept: slots there are.
        own: [kept] the row of each slot.
        source, slot: [m] rows and the slots they go to.
    """
    if not source.numel():
        return None
    size = torch.bincount(slot, minlength=kept)
    into = size.nonzero().flatten()
    destination = torch.cat((into, slot))
    return Merge(torch.cat((own[into], source)), destination, (size[destination] + 1).float().reciprocal())
