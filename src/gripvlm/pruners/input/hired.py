"""HiRED: the first block's attention says where to spend the budget, the last but one what to keep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gripvlm.errors import PrunerError
from gripvlm.pruners.base import ScorePruner, top_k
from gripvlm.pruners.ops.apportion import apportion
from gripvlm.pruners.ops.attention import cls_attention
from gripvlm.types import VisualTokens


@dataclass(frozen=True)
class HiRED(ScorePruner):
    """High-resolution early dropping (arXiv 2408.10945).

    score_j = the CLS token's attention on j, over all heads, in the block before the last. Of a budget
    B over a thumbnail and its tiles, the thumbnail gets floor(alpha B); each tile a share of the rest in
    proportion to how many of the thumbnail's floor((1 - alpha) n) strongest tokens, by CLS attention in
    block 0, lie in the tile's part of the picture. One picture without tiles: the k largest scores.

    1. Shares are exact (see `apportion`): the code's rounding loses tokens. Every tile keeps one.
    2. A tile's part is where the tile lies, as in the paper. The code cuts the thumbnail's raster into as many
       contiguous strips as there are tiles, for 2 x 2 tiles a quarter of the height each: of tiles that lie side by
       side, each is given a strip as wide as both.
    3. How tiles lie is not in the data a pruner gets: pass `layout`, and `thumbnail=first` where the whole view
       precedes its tiles, as in `ovis2`. It works through `allocate_budget`.

    Attributes:
        alpha: in [0, 1].
        layout: (rows, columns) of tiles, in raster order, beside one thumbnail; None for no tiles.
        thumbnail: whether it comes "last" or "first".
    """

    name = "hired"
    needs = frozenset({"vision_attention"})
    source = "HiRED, arXiv 2408.10945 (AAAI 2025)"

    alpha: float = 0.5
    layout: tuple[int, int] | None = None
    thumbnail: str = "last"

    def __post_init__(self) -> None:
        tiles = self.layout is None or (len(self.layout) == 2 and min(self.layout) >= 1)
        self.require(0 <= self.alpha <= 1 and tiles, "alpha=0.5, in [0, 1], and layout=(2,2), rows and columns")
        self.require(self.thumbnail in ("first", "last"), "thumbnail=first or thumbnail=last")

    @property
    def vision_layers(self) -> tuple[int, ...]:  # type: ignore[override]
        return (-2,) if self.layout is None else (0, -2)

    def score(self, tokens: VisualTokens) -> Tensor:
        return cls_attention(tokens, -2)

    def allocate_budget(self, images: Sequence[VisualTokens], num_layers: int) -> list[int]:
        if self.layout is None:
            return list(super().allocate_budget(images, num_layers))
        rows, columns = self.layout
        tiles = [*images]
        thumbnail = tiles.pop(0 if self.thumbnail == "first" else -1)
        if len(tiles) != rows * columns or thumbnail.grid is None:
            raise PrunerError(
                f"hired: layout={self.layout} means {rows * columns} tiles and a thumbnail, but this prompt has "
                f"{len(images)} items: pass the layout of this prompt's tiles"
            )
        budget, caps = sum(tokens.keep for tokens in images), [tokens.n for tokens in tiles]
        least, most = max(1, budget - sum(caps)), min(thumbnail.n, budget - len(tiles))
        # The thumbnail takes what the tiles have no room for, and leaves one for each.
        own = min(most, max(least, int(self.alpha * budget)))
        shares = list(apportion(budget - own, self._hits(thumbnail).tolist(), caps))
        return [own, *shares] if self.thumbnail == "first" else [*shares, own]

    def _hits(self, thumbnail: VisualTokens) -> Tensor:
        """[tiles] how many of the thumbnail's strongest tokens lie in the part of each tile."""
        assert self.layout is not None
        assert thumbnail.grid is not None
        (rows, columns), (h, w) = self.layout, thumbnail.grid
        scores = cls_attention(thumbnail, 0)
        strong = top_k(scores, int((1 - self.alpha) * thumbnail.n))
        tile = strong // w * rows // h * columns + strong % w * columns // w
        return torch.bincount(tile, minlength=rows * columns)
