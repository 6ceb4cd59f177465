"""How the budget of each group is drawn."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gripvlm.grip.train.config import TrainConfig, shares

__all__ = ["draw_keeps"]

LADDER = 8
"""Rungs of the annealed schedule."""


def draw_keeps(config: TrainConfig, sizes: Tensor, owner: Tensor, progress: float, random: torch.Generator) -> Tensor:
    """[I] tokens to keep of each image; the images of one question share a fraction.

    Args:
        sizes: [I] tokens of each image.
        owner: [I] the question each image belongs to.
        progress: share of the training that is over, for `annealed`.

    `log_uniform` and `uniform` draw between keep_low and keep_high; `annealed` draws rung i of a ladder of
    equal ratios from keep_low up with P(i) ~ exp(-8 progress^2 i), uniform at first and all at keep_low in the
    end (TwigVLM++, arXiv 2503.14075); `fixed` is always keep_low; `choices` draws
    one of keep_choices.
    """
    groups = int(owner.max()) + 1
    low, high = config.keep_low, config.keep_high
    u = torch.rand(groups, generator=random, dtype=torch.float64)
    if config.budgets == "uniform":
        fraction = low + u * (high - low)
    elif config.budgets == "log_uniform":
        fraction = low * (high / low) ** u
    elif config.budgets == "annealed":
        rungs = torch.arange(1, LADDER + 1, dtype=torch.float64)
        cumulative = torch.softmax(-8 * progress**2 * rungs, 0).cumsum(0)
        rung = torch.searchsorted(cumulative, u).clamp(max=LADDER - 1)
        fraction = low * math.exp(math.log(high / low) / (LADDER - 1)) ** rung
    elif config.budgets == "choices":
        choices = torch.tensor(shares(config.keep_choices, "keep_choices"), dtype=torch.float64)
        fraction = choices[(u * len(choices)).long()]
    else:
        fraction = torch.full((groups,), low, dtype=torch.float64)
    kept = (fraction[owner.cpu()] * sizes.cpu() + 0.5).floor().long()  # as `Budget.count`
    return kept.clamp(min=1).minimum(sizes.cpu()).to(sizes.device)
