"""PTP, its two visual levels: a budget for every region, then the salient tokens of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from gripvlm.pruners.base import Pruner
from gripvlm.pruners.ops.apportion import apportion
from gripvlm.pruners.ops.attention import cls_attention
from gripvlm.pruners.ops.ranking import min_max, rank_in_group, window_numbers
from gripvlm.types import Selection, VisualTokens

RULES = ("mean_saliency", "global_similarity")


def saliency(tokens: VisualTokens) -> Tensor:
    """[n] b in [0, 1]: CLS attention in the block before the last, min-max scaled over the tile."""
    return min_max(cls_attention(tokens, -2))


def best_of_regions(scores: Tensor, base: Tensor, k: int, grid: tuple[int, int] | None, windows: int) -> Tensor:
    """[n] bool: the best of [n] scores, windows x windows regions getting shares of k by the mean of `base`."""
    h, w = grid or (1, scores.numel())
    region = window_numbers((h, w), (-(-h // windows), -(-w // windows)), scores.device)
    size = torch.bincount(region)
    mass = torch.zeros_like(size, dtype=torch.float).index_add_(0, region, base) / size
    # With fewer tokens than regions some regions get none.
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

    name = "ptp_vision"
    vision_layers = (-2,)
    source = "PTP (region and token levels), arXiv 2509.15704"

    region_rule: str = "mean_saliency"
    thumbnail: int = -1
    windows: int = 1

    def __post_init__(self) -> None:
        self.require(self.region_rule in RULES, "region_rule=mean_saliency or region_rule=global_similarity")
        self.require(self.windows >= 1, "windows=4, at least 1")

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({"features", "vision_attention"} | ({"grid"} if self.windows > 1 else set()))

    def allocate_budget(self, images: Sequence[VisualTokens], num_layers: int) -> list[int]:
        if self.region_rule == "mean_saliency":
            weights = [float(saliency(tokens).mean()) for tokens in images]
        else:
            means = torch.stack([tokens.features.float().mean(dim=0) for tokens in images])
            weights = cosine_similarity(means, means[self.thumbnail][None], dim=-1).softmax(dim=0).tolist()
        return apportion(sum(tokens.keep for tokens in images), weights, [tokens.n for tokens in images])

    def select(self, tokens: VisualTokens) -> Selection:
        scores = saliency(tokens)
        kept = best_of_regions(scores, scores, tokens.keep, tokens.grid, self.windows)
        return Selection(kept.nonzero().flatten(), tokens.n, scores)
