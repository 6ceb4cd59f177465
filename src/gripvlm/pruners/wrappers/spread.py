"""Spread: a floor of evenly spread tokens under any pruner's choice."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from gripvlm.pruners.base import Wrapper
from gripvlm.pruners.baselines.grid import lattice
from gripvlm.pruners.ops.ranking import descending, fill_best
from gripvlm.types import Selection, VisualTokens


@dataclass(frozen=True)
class Spread(Wrapper):
    """m = floor(floor x k) tokens of an even lattice (see `grid`), and the inner pruner's choice.

    If the inner pruner ranks, the other k - m are its best among the rest. If it only chooses, it
    is asked for k - m, then for as many more as lay on the lattice, until the union has k tokens;
    should a larger choice not contain the smaller one and the union exceed k, its rows with the
    lower indices fill up.

    1. Ours; every published mixture of this kind has its own rule.
    2. Rows without a raster are spread over their order, as one line.
    3. What the inner pruner would merge is dropped: its kept rows are others.

    Attributes:
        floor: in [0, 1]; 0 is the inner pruner alone, 1 the lattice alone.
    """

    name = "spread"
    source = "wrapper: a floor of evenly spread tokens"

    floor: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(0 <= self.floor <= 1, "floor=0.25, in [0, 1]")

    def select(self, tokens: VisualTokens) -> Selection:
        n, k = tokens.n, tokens.keep
        kept = torch.zeros(n, dtype=torch.bool, device=tokens.features.device)
        if (evenly := int(self.floor * k + 1e-9)) > 0:
            kept[lattice(tokens.grid or (1, n), evenly)[0].to(kept.device)] = True
        count = k - evenly  # to ask the inner pruner for
        # Asks for more until what lay on the lattice already is made up for: a set has no second best.
        while (missing := k - int(kept.sum())) > 0:
            choice = self.inner.select(replace(tokens, keep=max(1, count)))
            if choice.scores is not None:
                fill_best(kept, descending(choice.scores.to(kept.device)), missing)
                break
            fresh = choice.indices.to(kept.device)
            fresh = fresh[~kept[fresh]]
            if fresh.numel() >= missing:
                kept[fresh[:missing]] = True
            count += missing - fresh.numel()
        return Selection(kept.nonzero().flatten(), n)
