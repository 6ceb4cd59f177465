"""Scorers of one model as starting points for another's.

What changes from model to model is how a token enters the scorer; the rest of it sees only its own channels.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from gripvlm.grip.scorer import ModelFingerprint, Scorer

Start = Literal["kept", "aligned", "new", "random"]


class Pairs:
    """Tokens [m, d] of the target model, and of the source model [m, d'] what stands for the same patch or word."""

    def __init__(self) -> None:
        self.target: list[Tensor] = []
        self.source: list[Tensor] = []

    def add(self, target: Tensor, source: Tensor) -> None:
        self.target.append(target.float())
        self.source.append(source.float())


def transferred(source: Scorer, base: ModelFingerprint, rounds: int, start: Start, pairs: Pairs) -> Scorer:
    """A joint scorer for the model `base` with the source's weights, and parts that the source lacks new.

    Args:
        rounds: of the new scorer; its lambda begins as a new scorer's.
        start: "kept": tokens enter as in the source, which needs features of one width; "aligned": as `pairs` say;
            "new": with new weights; "random": all weights are new.
    """
    scorer = Scorer(replace(source.config, features=base.features, joint=True, rounds=rounds), base)
    if start == "random":
        return scorer
    weights = source.state_dict()
    if start != "kept":
        weights = {name: value for name, value in weights.items() if not name.startswith("enter.")}
    scorer.load_state_dict(weights, strict=False)
    if start == "aligned":
        _align(scorer, source, pairs)
    return scorer


@torch.no_grad()
def _align(scorer: Scorer, source: Scorer, pairs: Pairs, ridge: float = 1e-2) -> None:
    """The least squares fit of what enters the source's trunk, from normalised features of the target.

    Args:
        ridge: in mean squares of the normalised features, which are 1.
    """
    x = F.layer_norm(torch.cat(pairs.target), (scorer.config.features,)).double()
    y = source.enter(torch.cat(pairs.source)).double()
    x, y_mean, x_mean = x - x.mean(0), y.mean(0), x.mean(0)
    gram = x.T @ x + ridge * len(x) * torch.eye(x.shape[1], dtype=x.dtype)
    weight = torch.linalg.solve(gram, x.T @ (y - y_mean)).T
    norm, linear = scorer.enter
    norm.weight.fill_(1.0)
    norm.bias.fill_(0.0)
    linear.weight.copy_(weight)
    linear.bias.copy_(y_mean - weight @ x_mean)
