"""Gradient baselines: the same scorer, trained through a continuous relaxation of "keep the top k".

Those here run the frozen model on every token with a soft mask in (0, 1) on attention (`masked_forward`) and follow
the gradient of the reward, `probability` or `log_prob`; inference is the same hard top-k as Grip's. That mask is

- soft_topk: sigmoid((s - nu) / tau), with nu solved so that the mask sums to k exactly; tau annealed from
  tau_start to tau_end (DiffPrune's budgeted map without its denoiser);
- straight_through: the hard top-k of s + tau g forward, g Gumbel noise (so it fades as tau does), the gradient of
  soft_topk backward;
- perturbed: the mean hard top-k over Gaussian perturbations, with the Jacobian of Berthet et al. 2020.

Two more are in files of their own: `dynamicvit.py`, a decision for each token, and `diffprune.py`, which adds noise
instead of masking.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from gripvlm.grip.pruner import ScorerInputs
from gripvlm.grip.scorer import Scorer
from gripvlm.grip.train import Batch, Engine, Stage
from gripvlm.grip.train.data import draw_counts
from gripvlm.grip.train.distill import masked_forward
from gripvlm.grip.train.stage import Stats

from .config import RelaxedConfig

__all__ = ["Relaxed", "perturbed_top_k", "soft_top_k", "straight_through_top_k"]

FLOOR = 1e-4
"""Smallest factor on attention: keeps the gradient of a dropped token's mask finite."""


class _Budgeted(torch.autograd.Function):
    """sigmoid((s - nu) / tau) with sum k; the gradient of nu is implicit."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, k: Tensor, tau: float) -> Tensor:
        finite = scores.isfinite()
        lowest = scores.masked_fill(~finite, torch.inf).amin(-1) - 40 * tau
        highest = scores.masked_fill(~finite, -torch.inf).amax(-1) + 40 * tau
        for _ in range(60):
            middle = (lowest + highest) / 2
            total = torch.sigmoid((scores - middle[:, None]) / tau).sum(-1)
            lowest, highest = torch.where(total > k, middle, lowest), torch.where(total > k, highest, middle)
        mask = torch.sigmoid((scores - ((lowest + highest) / 2)[:, None]) / tau)
        ctx.save_for_backward(mask)
        ctx.tau = tau
        return mask

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (mask,) = ctx.saved_tensors
        slope = mask * (1 - mask)
        mean = (slope * grads[0]).sum(-1, keepdim=True) / slope.sum(-1, keepdim=True).clamp(min=1e-12)
        return slope * (grads[0] - mean) / ctx.tau, None, None


def soft_top_k(scores: Tensor, k: Tensor, tau: float) -> Tensor:
    """[B, n] soft mask of scores [B, n] (-inf: padding) that sums to k [B]; exact in the limit tau -> 0.

    Gradient: d mask = D (I - 1 1^T D / 1^T D 1) d scores / tau with D = diag(mask (1 - mask)).
    """
    mask: Tensor = _Budgeted.apply(scores, k.to(scores), tau)
    return mask


def straight_through_top_k(scores: Tensor, k: Tensor, tau: float, noise: Tensor) -> Tensor:
    """[B, n] the hard top-k of scores + noise, with `soft_top_k`'s gradient."""
    soft = soft_top_k(scores + noise, k, tau)
    return _hard(scores.detach() + noise, k) + (soft - soft.detach())  # exactly hard: the brackets matter


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
    rank = scores.argsort(dim=-1, descending=True, stable=True).argsort(-1)
    return (rank < k[:, None]).to(scores)


class Relaxed(Stage):
    """Loss: minus the reward under the soft mask, of which there are two with a gradient: `probability`, `log_prob`."""

    name = "relaxed"
    config: RelaxedConfig

    def __init__(self, config: RelaxedConfig, scorer: Scorer, engine: Engine) -> None:
        super().__init__(config, scorer, engine, config.max_steps, config.learning_rate)

    def losses(self, batch: Batch, progress: float, random: torch.Generator) -> Iterator[tuple[Tensor, Stats]]:
        config = self.config
        inputs = batch.for_scorer(self.scorer.config.question)
        counts = draw_counts(config, inputs.sizes, inputs.owner, random)
        scores = inputs.score(self.scorer, counts)
        tau = config.tau_end * math.exp(math.log(config.tau_start / config.tau_end) * (1 - progress))
        if config.relaxation == "soft_topk":
            mask = soft_top_k(scores, counts, tau)
        elif config.relaxation == "straight_through":
            noise = -torch.empty(scores.shape).exponential_(generator=random).log().to(scores)
            mask = straight_through_top_k(scores, counts, tau, noise * tau)
        else:
            normal = torch.randn(config.noise_samples, *scores.shape, generator=random).to(scores)
            mask = perturbed_top_k(scores, counts, tau, normal)
        reward = self.masked_reward(batch, inputs, mask)
        top = mask.detach().masked_fill(~inputs.valid, 0.0).square().sum(-1) / counts
        yield -reward.mean(), {"reward": float(reward.detach().mean()), "hardness": float(top.mean()), "tau": tau}

    def masked_reward(self, batch: Batch, inputs: ScorerInputs, mask: Tensor) -> Tensor:
        """[B] reward of each answer when attention on the images is scaled by mask [I, n]."""
        bias = (mask * (1 - FLOOR) + FLOOR).log()
        biases = [row[:n] for row, n in zip(bias, inputs.sizes.tolist(), strict=True)]
        return self.reward_of(masked_forward(self.engine, batch, biases), batch)

    def reward_of(self, log_probs: Tensor, batch: Batch) -> Tensor:
        """[B] as `rewards.probability` or `rewards.log_prob` say, from log-probabilities [B, T], with a gradient."""
        mean = log_probs.sum(-1) / batch.answer_lengths
        return mean.exp() if self.config.reward_funcs == "probability" else mean
