"""Split: one budget for all images (or tiles) of a prompt, shared out by what is in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from gripvlm.errors import PrunerError
from gripvlm.pruners.base import SameChoice
from gripvlm.pruners.ops.apportion import apportion
from gripvlm.pruners.wrappers.top_p import checked_logits, scores_of
from gripvlm.types import VisualTokens
from gripvlm.utils.batching import joined


@dataclass(frozen=True)
class Split(SameChoice):
    """Image i of a prompt keeps k_i = K w_i / sum w of the prompt's budget K = sum of its images' budgets.

    So `keep` is the mean over the images of a prompt, exactly. Each keeps at least one row and at most all; rounding is
    in `apportion`. Then the inner pruner chooses k_i rows of each. For families whose items are tiles this is a split
    among tiles. The weight w_i is

    - by="rows": 1 - ||mean of the unit rows||, how much the image's rows differ;
    - by="spectrum": the effective rank of the unit rows, exp(-sum_j p_j log p_j) with p_j = s_j / sum s over their
      singular values s (Roy and Vetterli, EUSIPCO 2007), about how many directions they have;
    - by="mass": the share of the image's rows in softmax(scores) over all rows of the prompt, scores being the inner
      pruner's. Only for scores that are logits, as those of grip (of its first round, where it has several).

    1. Ours. It works through `allocate_budget`, which runs before `select`; `select` alone changes nothing.
    2. With "mass" the inner pruner runs twice, the first time with equal budgets. A joint pruner is refused: it shares
       the prompt's budget out itself.
    3. Prompts never share a budget: an answer would depend on what else is in its batch.

    Attributes:
        by: what says how much an image needs.
    """

    name = "split"
    extra_needs = frozenset({"features"})
    source = "wrapper: one budget for all images of a prompt"

    by: Literal["rows", "spectrum", "mass"] = "rows"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.by in ("rows", "spectrum", "mass"), "by=rows, by=spectrum or by=mass")
        if self.inner.joint:
            raise PrunerError(
                f"pruner {self.name!r} shares a prompt's budget out, and so does {self.inner.name!r} itself (it is "
                f"joint): use {self.inner.name!r} alone"
            )
        if self.inner.may_exceed:
            inside = self.inner.name
            raise PrunerError(f"pruner {self.name!r} would undo what {inside!r} adds: use {inside}({self.name}(...))")

        if self.by == "mass":
            checked_logits(f"pruner {self.name!r} with by=mass", self.inner)

    def allocate_budget(self, images: Sequence[VisualTokens], num_layers: int) -> list[int]:
        if self.by == "mass":
            sizes = [tokens.n for tokens in images]
            shares = joined(scores_of(self.inner, images)).softmax(0).split(sizes)
            weights = torch.stack([share.sum() for share in shares])
        else:
            weigh = variety if self.by == "rows" else effective_rank
            weights = torch.stack([weigh(tokens.features) for tokens in images])
        # One read for all images: each would wait for the device.
        return apportion(sum(tokens.keep for tokens in images), weights.tolist(), [tokens.n for tokens in images])


def variety(rows: Tensor) -> Tensor:
    """1 - ||mean of the unit rows|| of [n, d] rows; 0 where all are equal."""
    mean = normalize(rows.float(), dim=-1).mean(dim=0)
    return (1 - mean.norm()).clamp(min=0)  # where rows are equal, rounding would go below


def effective_rank(rows: Tensor) -> Tensor:
    """exp of the entropy of the singular values, as shares of their sum, of the unit rows [n, d]; 0 without any."""
    unit = normalize(rows.float(), dim=-1)
    # The smaller of the two Gram matrices has all singular values, squared.
    gram = unit @ unit.T if unit.shape[0] <= unit.shape[1] else unit.T @ unit
    values = torch.linalg.eigvalsh(gram)
    # Rounding leaves tiny values, also below 0, where there are none; their roots would add up.
    values = values.where(values > 1e-6 * values[-1], 0).clamp(min=0).sqrt()
    shares = values / values.sum().clamp(min=torch.finfo(values.dtype).tiny)
    return (-torch.special.xlogy(shares, shares).sum()).exp() * shares.sum()
