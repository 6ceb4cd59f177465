"""Bipartite soft matching, for pruners that merge what is alike."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

__all__ = ["soft_matching"]


def soft_matching(keys: Tensor, merges: int, fixed: int = 0) -> tuple[Tensor, Tensor]:
    """(source, destination), both [..., merges], of [..., m, d] keys in an order: even places go to odd ones.

    Each even place has one edge, to the odd place with the largest cosine; the `merges` strongest are taken.
    The place 0 is no source if `fixed` is 1. Ties go to the lower place.
    """
    rows = normalize(keys.float(), dim=-1)
    best = (rows[..., ::2, :] @ rows[..., 1::2, :].transpose(-1, -2)).max(dim=-1)
    edges = best.values
    if fixed:
        edges = torch.cat((torch.full_like(edges[..., :1], -torch.inf), edges[..., 1:]), dim=-1)
    even = torch.sort(edges, dim=-1, descending=True, stable=True).indices[..., :merges]
    return 2 * even, 2 * best.indices.gather(-1, even) + 1
