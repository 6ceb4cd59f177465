"""VisionSelector's training: the gradient of the answer's likelihood through a soft choice of the top k.

Zhu et al., "VisionSelector", arXiv 2510.16598, and their published code (JulietChoo/VisionSelector, commit 800a70f),
which is where the loss's form comes from. It is a rival of GRPO that can be trained on the same scorer, questions and
budgets: `gripvlm train visionselector`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from gripvlm.errors import TrainError
from gripvlm.grip.pruner import ScorerInputs
from gripvlm.grip.rounds import adjusted
from gripvlm.grip.scorer import Scorer
from gripvlm.grip.train.batch import Batch
from gripvlm.grip.train.config import TrainConfig
from gripvlm.grip.train.data import draw_counts
from gripvlm.grip.train.rollout import Engine
from gripvlm.grip.train.stage import Stage, Stats

__all__ = ["VisionSelector", "ranking", "scaled", "soft_top_k", "threshold"]

FIRST_WEIGHT = 0.1
"""Of the constraint, at the first step."""


class VisionSelector(Stage):
    """Loss: -log p(answer), per token, of the frozen model on rows m_i x_i, + w BCE(m, hard top-k).

    m = sigmoid(s - nu), with nu such that the mask sums to k; w rises linearly from 0.1 to `constraint_weight`. What is
    kept afterwards is the hard top-k, as everywhere.

    1. The scorer is Grip's, with the question, the budget and rounds, so that the two ways of training compare. Theirs
       reads the visual rows alone: the mean over j of q_i k_j, which `--no-question --no-budget --rounds 1` is nearest.
    2. Budgets are drawn as for GRPO. Theirs is 20 % throughout: `--keep-low 0.2 --keep-high 0.2`.
    3. With several rounds s is what the rounds leave of the logits (`rounds.adjusted`): its top k is what is kept.
    4. Rows that enter the language model at later layers (DeepStack) are scaled as well; their models have none.
    """

    name = "visionselector"

    def __init__(self, config: TrainConfig, scorer: Scorer, engine: Engine) -> None:
        if scorer.config.tower_features:
            raise TrainError("visionselector trains no stage inside the vision tower: use grpo, or another scorer")
        super().__init__(config, scorer, engine, config.max_steps, config.learning_rate)

    def losses(self, batch: Batch, progress: float, random: torch.Generator) -> Iterator[tuple[Tensor, Stats]]:
        inputs = batch.for_scorer(self.scorer.config.question, self.scorer.config.joint)
        owner = torch.tensor(batch.owner, device=batch.sizes.device)
        counts = inputs.totals(draw_counts(self.config, batch.sizes, owner, random))
        scores = ranking(self.scorer, inputs, counts)
        logits = scores - threshold(scores, counts)[:, None]
        mask = logits.sigmoid()
        soft = scaled(batch, inputs.values_by_image(mask))
        log_probs = mask.new_zeros(len(batch))
        # Questions of like length together, as rollouts run.
        for part in self.engine.parts(batch, range(len(batch)), batch.everything):
            each = soft.take(part)
            found = self.engine.forced_log_probs(each, self.engine.whole(each)).sum(-1) / each.answer_lengths
            log_probs = log_probs.index_put((torch.tensor(part, device=mask.device),), found)
        constraint = hardness_loss(logits, scores, counts, inputs.valid).mean()
        weight = FIRST_WEIGHT + (self.config.constraint_weight - FIRST_WEIGHT) * progress
        top = mask.detach().square().sum(-1) / counts
        stats = {
            "log_prob": float(log_probs.detach().mean()),
            "constraint": float(constraint.detach()),
            "hardness": float(top.mean()),
        }
        yield weight * constraint - log_probs.mean(), stats


def ranking(scorer: Scorer, inputs: ScorerInputs, counts: Tensor) -> Tensor:
    """[S, n] numbers whose `counts` [S] highest are what the scorer keeps, with a gradient; see `rounds.adjusted`.

    With one round they are the logits. With more, what a token loses by being like kept ones is taken off, so that a
    relaxation of top-k relaxes the choice that the scorer makes.
    """
    return adjusted(inputs.score(scorer, counts), counts, int(counts.max()), inputs.penalty(scorer, counts))


def threshold(scores: Tensor, k: Tensor, tau: float = 1.0) -> Tensor:
    """[B] nu with sum_i sigmoid((s_i - nu) / tau) = k, with its implicit gradient; scores [B, n], -inf at padding."""
    with torch.no_grad():
        finite = scores.isfinite()
        lowest = scores.masked_fill(~finite, torch.inf).amin(-1) - 40 * tau
        highest = scores.masked_fill(~finite, -torch.inf).amax(-1) + 40 * tau
        for _ in range(60):
            middle = (lowest + highest) / 2
            total = torch.sigmoid((scores - middle[:, None]) / tau).sum(-1)
            lowest, highest = torch.where(total > k, middle, lowest), torch.where(total > k, highest, middle)
        nu = (lowest + highest) / 2
        mask = torch.sigmoid((scores - nu[:, None]) / tau)
        slope = mask * (1 - mask)
        weight = slope / slope.sum(-1, keepdim=True).clamp(min=1e-12)
    # d nu = sum_i weight_i d s_i, since the sum stays k.
    return nu + (weight * (scores - scores.detach()).masked_fill(~finite, 0.0)).sum(-1)


def soft_top_k(scores: Tensor, k: Tensor, tau: float = 1.0) -> Tensor:
    """[B, n] soft mask of scores [B, n] (-inf: padding) that sums to k [B]; exact in the limit tau -> 0.

    Gradient: d mask = D (I - 1 1^T D / 1^T D 1) d scores / tau with D = diag(mask (1 - mask)).
    """
    return torch.sigmoid((scores - threshold(scores, k, tau)[:, None]) / tau)


def hardness_loss(logits: Tensor, scores: Tensor, k: Tensor, valid: Tensor) -> Tensor:
    """[B] cross-entropy of the soft mask sigmoid(logits) [B, n] with the k highest scores, mean over `valid` tokens."""
    rank = scores.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    hard = (rank < k[:, None]).to(logits)
    each = F.binary_cross_entropy_with_logits(logits.masked_fill(~valid, 0.0), hard, reduction="none")
    return (each * valid).sum(-1) / valid.sum(-1)


def scaled(batch: Batch, shares: Sequence[Tensor]) -> Batch:
    """The batch with row i of each image times share i of its shares [n], in order; gradients flow to the shares."""
    factors = iter(shares)
    samples = []
    for sample in batch.encoded.samples:
        items = []
        for item in sample:
            factor = next(factors)[:, None]
            rows, *planes = ((each * factor).to(each.dtype) for each in (item.features, *item.deepstack))
            items.append(replace(item, features=rows, deepstack=tuple(planes)))
        samples.append(tuple(items))
    return replace(batch, encoded=replace(batch.encoded, samples=tuple(samples)))
