"""Density peak clustering, for pruners that merge what they drop."""

from __future__ import annotations

import torch
from torch import Tensor

from gripvlm.pruners.base import top_k

__all__ = ["density_peaks"]


def density_peaks(rows: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """Density peak clustering of [m, d] rows: centres [clusters], and the centre's place of each row [m].

    density_i = exp(-mean of the squared distances to the `clusters` nearest rows, itself among them); delta_i =
    the distance to the nearest denser row (among equals the lower index is denser), for the densest the largest
    there is. Centres have the largest density x delta; a row goes to the nearest centre. Distances are
    Euclidean over sqrt(d); products are compared in logarithms.
    """
    m, d = rows.shape
    distance = torch.cdist(rows.float(), rows.float(), compute_mode="donot_use_mm_for_euclid_dist") / d**0.5
    density = -distance.sort(dim=1).values[:, :clusters].square().mean(dim=1)  # its logarithm
    place = torch.empty(m, dtype=torch.long, device=rows.device)
    place[torch.sort(density, descending=True, stable=True).indices] = torch.arange(m, device=rows.device)
    delta = distance.masked_fill(place[None] >= place[:, None], torch.inf).amin(dim=1)
    delta = torch.where(place == 0, distance.max(), delta)
    centres = top_k(density + delta.log(), clusters)
    nearest = distance[:, centres].argmin(dim=1)
    nearest[centres] = torch.arange(clusters, device=rows.device)
    return centres, nearest
