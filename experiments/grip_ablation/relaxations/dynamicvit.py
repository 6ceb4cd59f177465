"""DynamicViT-style baseline: each token decides for itself, and k of them are kept on average."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from gripvlm.grip.train import Batch
from gripvlm.grip.train.stage import Stats
from gripvlm.grip.train.visionselector import threshold

from .masks import Relaxed

__all__ = ["DynamicViT", "decisions"]


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


class DynamicViT(Relaxed):
    """Loss: minus the reward (`probability` or `log_prob`) under hard per-token masks.

    Rao et al. 2021, arXiv 2106.02034. A dropped token's attention weight is 0 in every row but its own (eq. 11).

    1. The decision is made once, before the language model, by the same scorer as every other variant here; the paper
       decides at three depths of a ViT with predictors of their own. The scorer's logit is the log-odds of its
       two-way softmax, less the nu with which k tokens are kept on average.
    2. With that nu the paper's loss on the share that is kept (eq. 14) is 0 up to the noise of the decisions, and is
       left out. With the loss alone a scorer whose logits have no level, as after any warm-up here, kept thousands of
       tokens for as long as our runs lasted.
    3. k / n is drawn anew for each question and given to the scorer; the paper trains one model a ratio.
    4. Only the scorer is trained. The paper's distillation terms hold a backbone that it fine-tunes to its
       former self; ours is frozen, so there is nothing to hold.
    5. A dropped token keeps a share `floor` of its attention, so that its mask has a gradient (`Relaxed`).
    6. The temperature is tau_start throughout, 1 as in the paper by default; tau_end is not read.

    Inference is the hard top-k, as the paper's.
    """

    def losses(self, batch: Batch, progress: float, random: torch.Generator) -> Iterator[tuple[Tensor, Stats]]:
        inputs, counts, scores = self.scored(batch, random)
        uniform = torch.rand(scores.shape, generator=random, dtype=torch.float64).clamp(min=1e-12)
        odds = scores - threshold(scores, counts, 1.0)[:, None]
        mask = decisions(odds, self.config.tau_start, uniform.logit().to(scores))
        reward = self.masked_reward(batch, inputs, mask)
        kept = float((mask.detach().sum(-1) / counts).mean())
        yield -reward.mean(), {"reward": float(reward.detach().mean()), "kept": kept}
