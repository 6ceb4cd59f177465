"""PTP, its two visual levels: a budget for every region, then the salient tokens of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from gripvlm.errors import PrunerError
from gripvlm.pruners.base import Pruner
from gripvlm.pruners.ops.apportion import apportion
from gripvlm.pruners.ops.saliency import looked_at, min_max, rank_in_group
from gripvlm.pruners.ops.saliency import windows as window_numbers
from gripvlm.types import Selection, VisualTokens

__all__ = ["PTPVision", "best_of_regions", "region_budgets", "saliency"]


def saliency(tokens: VisualTokens) -> Tensor:
    """[n] b in [0, 1]: CLS attention in the block before the last, min-max scaled over the tile."""
    return min_max(looked_at(tokens, -2))


def region_budgets(sample: Sequence[VisualTokens], rule: str, thumbnail: int) -> list[int]:
    """Rows of each tile, with the sum of the budgets that were asked for."""
    if rule == "mean_saliency":
        weights = [float(saliency(tokens).mean()) for tokens in sample]
    else:
        means = torch.stack([tokens.features.float().mean(dim=0) for tokens in sample])
        weights = cosine_similarity(means, means[thumbnail][None], dim=-1).softmax(dim=0).tolist()
    return apportion(sum(tokens.keep for tokens in sample), weights, [tokens.n for tokens in sample])


def best_of_regions(scores: Tensor, base: Tensor, k: int, grid: tuple[int, int] | None, windows: int) -> Tensor:
    """[n] bool: the best of [n] scores, windows x windows regions getting shares of k by the mean of `base`."""
    h, w = grid or (1, scores.numel())
    region = window_numbers((h, w), (-(-h // windows), -(-w // windows)), scores.device)
    size = torch.bincount(region)
    mass = torch.zeros_like(size, dtype=torch.float).index_add_(0, region, base) / size
    quota = torch.tensor(apportion(k, mass.tolist(), size.tolist(), least=int(k >= size.numel())))
    return rank_in_group(scores, region) < quota.to(region.device)[region]


@dataclass(frozen=True)
class PTPVision(Pruner):
    """Pyramid token pruning (arXiv 2509.15704), region and token levels; with the third it is `ptp`.

    Region: tile t of a prompt's budget K gets K z_t / sum z, z_t the mean saliency of its tokens, at
    least 1. Token: inside a tile, the tokens with the largest saliency b, the CLS attention in the block
    before the last scaled to [0, 1].

    1. How the paper weighs regions is not known for certain. Raw attention sums to 1 in every tile, so
       its mean says nothing; z_t is the mean of b. `region_rule="global_similarity"` instead takes the
       softmax over tiles of the cosine between a tile's mean row and the thumbnail's.
    2. The tiles are the images of the prompt (for tiled families one item each); it works through `allocate_budget`.
       A picture of one tile can be cut into `windows` x `windows` regions instead.
    3. Shares are exact (see `apportion`). Towers without a CLS token: the mean attention received.

    Attributes:
        region_rule: "mean_saliency" or "global_similarity".
        thumbnail: which item of the prompt is the thumbnail, for "global_similarity".
        windows: regions a side inside one item; 1 for none.
    """

    name: ClassVar[str] = "ptp_vision"
    vision_layers: ClassVar[tuple[int, ...]] = (-2,)
    source: ClassVar[str] = "PTP (region and token levels), arXiv 2509.15704"

    region_rule: str = "mean_saliency"
    thumbnail: int = -1
    windows: int = 1

    def __post_init__(self) -> None:
        checked(self.name, self.region_rule, self.windows)

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({"features", "vision_attention"} | ({"grid"} if self.windows > 1 else set()))

    def allocate_budget(self, sample: Sequence[VisualTokens]) -> list[int]:
        return region_budgets(sample, self.region_rule, self.thumbnail)

    def select(self, tokens: VisualTokens) -> Selection:
        scores = saliency(tokens)
        kept = best_of_regions(scores, scores, tokens.keep, tokens.grid, self.windows)
        return Selection(kept.nonzero().flatten(), tokens.n, scores)


def checked(name: str, rule: str, windows: int) -> None:
    """Refuses what neither of the two can do."""
    if rule not in ("mean_saliency", "global_similarity") or windows < 1:
        raise PrunerError(
            f"{name}: type region_rule=mean_saliency or region_rule=global_similarity, and windows=4, at least 1; "
            f"got region_rule={rule!r}, windows={windows}"
        )
