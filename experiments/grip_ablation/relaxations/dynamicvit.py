"""DynamicViT-style baseline: each token decides for itself, and a loss holds the share that is kept to the budget."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from gripvlm.grip.train import Batch
from gripvlm.grip.train.data import draw_counts
from gripvlm.grip.train.stage import Stats

from .masks import Relaxed

__all__ = ["DynamicViT", "decisions", "ratio_loss"]


def decisions(scores: Tensor, tau: float, noise: Tensor) -> Tensor:
    """[B, n] 0.0 or 1.0, the hard Gumbel-softmax of (keep, drop) log-probabilities (arXiv 2106.02034, eq. 8).

    Args:
        scores: [B, n] log-odds of keeping a token; -inf (padding) is never kept.
        noise: [B, n] the difference of two standard Gumbel draws, a standard logistic one: a token is kept
            with probability sigmoid(score).

    Forward: 1 where score + noise > 0. Backward: the gradient of sigmoid((score + noise) / tau).
    """
    odds = (scores + noise) / tau
    soft = torch.sigmoid(odds)
    return (odds > 0).to(soft) + (soft - soft.detach())  # exactly hard: the brackets matter


def ratio_loss(mask: Tensor, counts: Tensor, sizes: Tensor) -> Tensor:
    """Mean over images of (mean of mask - k / n)^2 (eq. 14); mask [B, n] is 0 at padding, k and n are [B]."""
    return (mask.sum(-1) / sizes - counts / sizes).square().mean()


class DynamicViT(Relaxed):
    """Loss: minus the reward (`probability` or `log_prob`) under hard per-token masks, + ratio_weight x `ratio_loss`.

    Rao et al. 2021, arXiv 2106.02034. A dropped token's attention weight is 0 in every row but its own (eq. 11).

    1. The decision is made once, before the language model, by the same scorer as every other variant here; the paper
       decides at three depths of a ViT with predictors of their own. The scorer's logit is the log-odds of its
       two-way softmax.
    2. k / n is drawn anew for each question and given to the scorer; the paper trains one model a ratio.
    3. Only the scorer is trained. The paper's distillation terms hold a backbone that it fine-tunes to its
       former self; ours is frozen, so there is nothing to hold.
    4. A dropped token leaks 1e-4 of its attention (`masks.FLOOR`), so that its mask has a gradient.
    5. The temperature is tau_start throughout, 1 as in the paper by default; tau_end is not read.

    Inference is the hard top-k, as the paper's.
    """

    def losses(self, batch: Batch, progress: float, random: torch.Generator) -> Iterator[tuple[Tensor, Stats]]:
        config = self.config
        inputs = batch.for_scorer(self.scorer.config.question)
        counts = draw_counts(config, inputs.sizes, inputs.owner, random)
        scores = inputs.score(self.scorer, counts)
        uniform = torch.rand(scores.shape, generator=random, dtype=torch.float64).clamp(min=1e-12)
        mask = decisions(scores, config.tau_start, uniform.logit().to(scores))
        reward = self.masked_reward(batch, inputs, mask)
        ratio = ratio_loss(mask, counts, inputs.sizes)
        yield (
            config.ratio_weight * ratio - reward.mean(),
            {
                "reward": float(reward.detach().mean()),
                "ratio": float(ratio.detach()),
                "kept": float((mask.detach().sum(-1) / counts).mean()),
            },
        )
