"""VScan, first stage: a global and a local scan of the image, and merging of what neither keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import normalize

from gripvlm.errors import PrunerError
from gripvlm.pruners.base import Pruner
from gripvlm.pruners.ops.saliency import looked_at, mean_into, rank_in_group, windows
from gripvlm.types import Selection, VisualTokens

__all__ = ["VScanVision"]


@dataclass(frozen=True)
class VScanVision(Pruner):
    """VScan's first stage (arXiv 2505.22654), after the encoder; both stages are `vscan`.

    Local scan: int(local x k) tokens, the same number from every window of `window` x `window`, those
    with the largest CLS attention in the block `shallow`. Global scan: of the other tokens, the largest
    CLS attention in the block before the last, up to k. Every token that is not kept goes to the kept
    one with the most similar row (cosine), which becomes the mean of all that it stands for.

    1. Quotas are exact: where the windows' number does not divide the local part, those with the
       highest next token give one more. The code drops the remainder.
    2. Towers without a CLS token: the mean attention received. Ties go to the lower index.

    Attributes:
        local: share of k for the local scan.
        window: cells a side.
        shallow: block of the local scan; the paper's 5 of CLIP's 24. Another tower needs another.
        merge: whether tokens that are not kept are merged in, or dropped.
    """

    name: ClassVar[str] = "vscan_vision"
    needs: ClassVar[frozenset[str]] = frozenset({"features", "grid", "vision_attention"})
    source: ClassVar[str] = "VScan (first stage), arXiv 2505.22654"

    local: float = 0.5
    window: int = 6
    shallow: int = 5
    merge: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.local <= 1 or self.window < 1:
            raise PrunerError(f"{self.name}: type local=0.5, in [0, 1], and window=6, at least 1; got {self}")

    @property
    def vision_layers(self) -> tuple[int, ...]:  # type: ignore[override]
        return (self.shallow, -2)

    def select(self, tokens: VisualTokens) -> Selection:
        return scan(tokens, self.local, self.window, self.shallow, self.merge)


def scan(tokens: VisualTokens, local: float, window: int, shallow: int, merge: bool) -> Selection:
    """The first stage as a function."""
    assert tokens.grid is not None  # promised by `needs`
    near, far = looked_at(tokens, shallow), looked_at(tokens, -2)
    group = windows(tokens.grid, (window, window), near.device)
    order = torch.sort(near, descending=True, stable=True).indices
    place = rank_in_group(near, group)
    order = order[torch.sort(place[order], stable=True).indices]  # the best of each window, the second best, ...
    part = int(local * tokens.keep + 1e-9)
    kept = torch.zeros(tokens.n, dtype=torch.bool, device=near.device)
    kept[order[:part]] = True
    order = torch.sort(far, descending=True, stable=True).indices
    kept[order[~kept[order]][: tokens.keep - part]] = True
    indices, rest = kept.nonzero().flatten(), (~kept).nonzero().flatten()
    if not merge:
        return Selection(indices, tokens.n, far)
    rows = normalize(tokens.features.float(), dim=-1)
    slot = (rows[rest] @ rows[indices].T).argmax(dim=1)
    return Selection(indices, tokens.n, far, mean_into(tokens.keep, indices, rest, slot))
