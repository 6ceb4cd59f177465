"""GRPO over sets instead of sequences: the same logits, a conditional Bernoulli policy."""

from __future__ import annotations

import torch
from torch import Tensor

from gripvlm.grip.pruner import ScorerInputs
from gripvlm.grip.scorer import Scorer
from gripvlm.grip.train.grpo import Grpo
from gripvlm.grip.train.visionselector import ranking

from .conditional_bernoulli import ConditionalBernoulli

__all__ = ["ConditionalGrpo"]


class _SetPolicy(ConditionalBernoulli):
    """The closed forms of the sets' entropy and KL, one number for all samples of a row.

    A set has no order; its log-probability is divided evenly among its k items.
    """

    def step_log_probs(self, samples: Tensor) -> Tensor:
        """[B, G, K]."""
        return (self.log_prob(samples) / self.k[:, None])[..., None] * (samples >= 0)

    def entropy(self, samples: Tensor | None = None) -> Tensor:
        """[B, 1]."""
        return super().entropy()[:, None]

    def kl(self, other: ConditionalBernoulli, samples: Tensor | None = None) -> Tensor:
        """[B, 1]."""
        return super().kl(other)[:, None]


class ConditionalGrpo(Grpo):
    """Loss: `Grpo`'s; the ratio is that of sets, and its entropy and KL are exact."""

    name = "conditional"
    random_stream = "grpo"  # the published runs were GRPO's with another policy

    def policy(self, scorer: Scorer, inputs: ScorerInputs, counts: Tensor) -> _SetPolicy:  # type: ignore[override]
        logits = ranking(scorer, inputs, counts) / self.config.temperature
        return _SetPolicy(logits, torch.as_tensor(counts), inputs.valid)
