"""Gradient baselines: the same scorer, trained through a continuous relaxation of "keep the top k".

Those here run the frozen model on every token with a mask in [0, 1] on attention (`masked_forward`) and follow the
gradient of the reward, `probability` or `log_prob`; inference chooses as Grip does. The mask, of s, the
scorer's `ranking`, is

- soft_topk: sigmoid((s - nu) / tau), with nu solved so that the mask sums to k exactly; tau annealed from tau_start to
  tau_end. With tau 1 throughout and `binarity_weight`, whose weight rises from 0, it is near VisionSelector's (arXiv
  2510.16598). `gripvlm train visionselector` follows their code: the mask scales rows, and the loss that brings it to
  the hard one is a cross-entropy;
- straight_through: the hard top-k of s + tau g forward, g Gumbel noise (so it fades as tau does), the gradient of
  soft_topk at tau_start backward;
- perturbed: the mean hard top-k over Gaussian perturbations of size tau_start, with the Jacobian of Berthet et al.
  2020;
- simple: an exact sample forward, the Jacobian of its marginals backward (Ahmed et al. 2023).

Two more are in files of their own: `dynamicvit.py`, a decision for each token, and `diffprune.py`, which adds noise
instead of masking.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from gripvlm.grip.policy import samples_to_mask
from gripvlm.grip.pruner import ScorerInputs
from gripvlm.grip.scorer import Scorer
from gripvlm.grip.train import Batch, Engine, Stage
from gripvlm.grip.train.data import draw_counts
from gripvlm.grip.train.distill import masked_forward
from gripvlm.grip.train.stage import Stats
from gripvlm.grip.train.visionselector import ranking, soft_top_k

from .conditional_bernoulli import ConditionalBernoulli
from .config import RelaxedConfig

__all__ = ["Relaxed", "binarity", "perturbed_top_k", "simple_top_k", "straight_through_top_k"]


def binarity(mask: Tensor, k: Tensor) -> Tensor:
    """Mean over rows of sum_i m_i (1 - m_i) / k: 0 for a hard mask [B, n] of k [B] tokens, near 1 for an even one."""
    return ((mask * (1 - mask)).sum(-1) / k).mean()


def straight_through_top_k(scores: Tensor, k: Tensor, tau: float, noise: Tensor) -> Tensor:
    """[B, n] the hard top-k of scores + noise, with `soft_top_k`'s gradient."""
    soft = soft_top_k(scores + noise, k, tau)
    return _hard(scores.detach() + noise, k) + (soft - soft.detach())  # exactly hard: the brackets matter


def simple_top_k(scores: Tensor, k: Tensor, valid: Tensor, random: torch.Generator) -> Tensor:
    """[B, n] an exact sample of k [B] tokens, with the gradient of the probabilities that tokens are in one.

    Ahmed et al., "SIMPLE: a gradient estimator for k-subset sampling", arXiv 2210.01941, eq. 4: the law is the
    conditional Bernoulli one, and its marginals stand for the sample in the backward pass.
    """
    law = ConditionalBernoulli(scores, k, valid)
    sample = samples_to_mask(law.sample(1, generator=random)[:, 0], scores.shape[1]).to(scores)
    inside = law.inclusion()
    return sample + (inside - inside.detach())


class _Perturbed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, k: Tensor, sigma: float, noise: Tensor) -> Tensor:
        hard = _hard(scores + sigma * noise, k)
        ctx.save_for_backward(hard, noise)
        ctx.sigma = sigma
        return hard.mean(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        hard, noise = ctx.saved_tensors
        centred = hard - hard.mean(0)
        scale = len(hard) / max(len(hard) - 1, 1)
        along = (centred * grads[0]).sum(-1, keepdim=True)  # [M, B, 1]
        return scale * (along * noise).mean(0) / ctx.sigma, None, None, None


def perturbed_top_k(scores: Tensor, k: Tensor, sigma: float, noise: Tensor) -> Tensor:
    """[B, n] mean over M of the hard top-k of scores + sigma * noise [M, B, n], noise standard normal.

    Gradient: E[y (noise^T g)] / sigma (Berthet et al., "Learning with differentiable perturbed optimizers",
    2020, prop. 3.1), with the samples' mean as a control variate.
    """
    mask: Tensor = _Perturbed.apply(scores, k, sigma, noise)
    return mask


def _hard(scores: Tensor, k: Tensor) -> Tensor:
    """[..., B, n] 1.0 at the k [B] largest."""
    rank = torch.arange(scores.shape[-1], device=scores.device) < k[:, None]
    order = scores.argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(scores).scatter(-1, order, rank.to(scores).expand_as(scores))


class Relaxed(Stage):
    """Loss: minus the reward under the soft mask, of which there are two with a gradient: `probability`, `log_prob`.

    The mask is a factor on attention; a dropped token keeps a share `floor` of its own. The slope of the factor at 0
    says what the very first bit of a token brings, which is far more than all the rest of it: with a floor of 1e-4 the
    slopes of dropped tokens were hundreds of times too large.
    """

    name = "relaxed"
    config: RelaxedConfig

    def __init__(self, config: RelaxedConfig, scorer: Scorer, engine: Engine) -> None:
        super().__init__(config, scorer, engine, config.max_steps, config.learning_rate)

    def losses(self, batch: Batch, progress: float, random: torch.Generator) -> Iterator[tuple[Tensor, Stats]]:
        config = self.config
        inputs, counts, scores = self.scored(batch, random)
        tau = config.tau_end * math.exp(math.log(config.tau_start / config.tau_end) * (1 - progress))
        if config.relaxation == "soft_topk":
            mask = soft_top_k(scores, counts, tau)
        elif config.relaxation == "straight_through":
            # The noise fades; the backward pass keeps its temperature, or a few tokens alone would have a gradient.
            noise = -torch.empty(scores.shape).exponential_(generator=random).log().to(scores)
            mask = straight_through_top_k(scores, counts, config.tau_start, noise * tau)
        elif config.relaxation == "simple":
            mask = simple_top_k(scores, counts, inputs.valid, random)
        else:
            # The noise keeps its size: the estimate's variance grows as its inverse square.
            tau = config.tau_start
            normal = torch.randn(config.noise_samples, *scores.shape, generator=random).to(scores)
            mask = perturbed_top_k(scores, counts, tau, normal)
        reward = self.masked_reward(batch, inputs, mask)
        loss = -reward.mean() + config.binarity_weight * progress * binarity(mask, counts)
        top = mask.detach().square().sum(-1) / counts
        yield loss, {"reward": float(reward.detach().mean()), "hardness": float(top.mean()), "tau": tau}

    def scored(self, batch: Batch, random: torch.Generator) -> tuple[ScorerInputs, Tensor, Tensor]:
        """What the scorer reads, the budgets [S] that are drawn, and its `ranking` [S, n]."""
        inputs = batch.for_scorer(self.scorer.config.question, self.scorer.config.joint)
        owner = torch.tensor(batch.owner, device=batch.sizes.device)
        counts = inputs.totals(draw_counts(self.config, batch.sizes, owner, random))
        return inputs, counts, ranking(self.scorer, inputs, counts)

    def masked_reward(self, batch: Batch, inputs: ScorerInputs, mask: Tensor) -> Tensor:
        """[B] reward of each answer when attention on the images is scaled by mask [S, n].

        The engine counts the tokens of its forwards; the backward pass, twice the arithmetic, is not counted.
        """
        floor = self.config.floor
        biases = batch.by_question(inputs.values_by_image((mask * (1 - floor) + floor).log()))
        rewards = mask.new_zeros(len(batch))
        # Questions of like length together, as rollouts run.
        for part in self.engine.parts(batch, range(len(batch)), batch.everything):
            each = batch.take(part)
            log_probs = masked_forward(self.engine, each, [image for row in part for image in biases[row]])
            rewards = rewards.index_put((torch.tensor(part, device=mask.device),), self.reward_of(log_probs, each))
        return rewards

    def reward_of(self, log_probs: Tensor, batch: Batch) -> Tensor:
        """[B] as `rewards.probability` or `rewards.log_prob` say, from log-probabilities [B, T], with a gradient."""
        mean = log_probs.sum(-1) / batch.answer_lengths
        return mean.exp() if self.config.reward_funcs == "probability" else mean
