"""Which tokens merge into which, for pruners that merge what they drop."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from gripvlm.pruners.base import top_k
from gripvlm.pruners.ops.ranking import descending
from gripvlm.types import Merge


def soft_matching(keys: Tensor, merges: int, fixed: int = 0) -> tuple[Tensor, Tensor]:
    """(source, destination), both [..., merges], of [..., m, d] keys in an order: even places go to odd ones.

    Each even place has one edge, to the odd place with the largest cosine; the `merges` strongest are taken.
    The place 0 is no source if `fixed` is 1. Ties go to the lower place.
    """
    rows = normalize(keys.float(), dim=-1)
    best = (rows[..., ::2, :] @ rows[..., 1::2, :].transpose(-1, -2)).max(dim=-1)
    edges = best.values
    # The special token stands at place 0, an even one.
    if fixed:
        edges = torch.cat((torch.full_like(edges[..., :1], -torch.inf), edges[..., 1:]), dim=-1)
    # A stable sort: torch.topk breaks ties differently on every device.
    even = torch.sort(edges, dim=-1, descending=True, stable=True).indices[..., :merges]
    return 2 * even, 2 * best.indices.gather(-1, even) + 1


def density_peaks(rows: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """Density peak clustering of [m, d] rows: centres [clusters], and the centre's place of each row [m].

    density_i = exp(-mean of the squared distances to the `clusters` nearest rows, itself among them); delta_i =
    the distance to the nearest denser row (among equals the lower index is denser), for the densest the largest
    there is. Centres have the largest density x delta; a row goes to the nearest centre. Distances are
    Euclidean over sqrt(d); products are compared in logarithms.
    """
    m, d = rows.shape
    # The matrix-product form of cdist rounds so much that a row is not at distance 0 from itself.
    distance = torch.cdist(rows.float(), rows.float(), compute_mode="donot_use_mm_for_euclid_dist") / d**0.5
    # Its logarithm: exp of a large distance would be 0 for all.
    density = -distance.sort(dim=1).values[:, :clusters].square().mean(dim=1)
    place = torch.empty(m, dtype=torch.long, device=rows.device)
    place[descending(density)] = torch.arange(m, device=rows.device)
    delta = distance.masked_fill(place[None] >= place[:, None], torch.inf).amin(dim=1)
    delta = torch.where(place == 0, distance.max(), delta)
    centres = top_k(density + delta.log(), clusters)
    nearest = distance[:, centres].argmin(dim=1)
    # Also where another centre lies at distance 0.
    nearest[centres] = torch.arange(clusters, device=rows.device)
    return centres, nearest


def mean_merge(indices: Tensor, source: Tensor, slot: Tensor) -> Merge | None:
    """Every slot that a source goes to becomes the mean of its own row and its sources.

    Args:
        indices: [k] the row of each slot.
        source, slot: [m] rows and the slots they go to.
    """
    if not source.numel():
        return None
    size = torch.bincount(slot, minlength=indices.numel())
    # A slot's own row is a source too. Slots that nothing goes to stay out of the merge, and the same bit for bit.
    into = size.nonzero().flatten()
    destination = torch.cat((into, slot))
    return Merge(torch.cat((indices[into], source)), destination, (size[destination] + 1).float().reciprocal())
