"""PruMerge+: evenly spread tokens beside the salient ones, and what resembles them merged in."""

from __future__ import annotations

from dataclasses import dataclass

from gripvlm.pruners.input.prumerge import PruMerge


@dataclass(frozen=True)
class PruMergePlus(PruMerge):
    """PruMerge+ (arXiv 2403.15388): `uniform` x k of the kept tokens lie evenly over the others.

    The paper adds to the outliers, a share r of the tokens, every floor(step / 3)-th token, step =
    floor(1 / r): about three for each outlier, so three quarters of k here.

    1. k is exact, so the even tokens are spread over those that are not outliers, in raster order;
       the paper's may fall on outliers, and then there are fewer.
    """

    name = "prumerge_plus"
    source = "PruMerge+, arXiv 2403.15388 (ICCV 2025)"

    uniform: float = 0.75
