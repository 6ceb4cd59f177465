"""GRPO for a scorer with two stages: k' of n tokens inside the vision tower, then k of these k' behind the projector.

For each question one pair of budgets and G pairs of subsets are drawn: k' tokens from the policy of the first stage,
for which the blocks of the tower behind it run again, then k of what these give from the policy of the second. Their
one reward is the answer's, and the log-probability of a pair is the sum of both, exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from gripvlm.budget import Budget
from gripvlm.grip.policy import PlackettLuce
from gripvlm.grip.pruner import ScorerInputs
from gripvlm.grip.rounds import Rounds
from gripvlm.grip.scorer import Scorer
from gripvlm.grip.train.batch import Batch, Subsets
from gripvlm.grip.train.data import draw_counts, draw_tower_counts
from gripvlm.grip.train.grpo import Draws, Grpo
from gripvlm.grip.train.policies import policy_of
from gripvlm.grip.train.rewards import needs_of
from gripvlm.grip.train.rollout import Engine
from gripvlm.pruners.wrappers.tower import left_by_tower

__all__ = ["TwoStageGrpo", "TwoStages", "best_of_two_stages"]


class TwoStages:
    """The law of pairs of subsets, of which the second is one of what the first left.

    Samples are int64 [B, G, K' + K]: an ordered sample of the first law, -1 at its padding, then one of the second.

    Args:
        first: over the n tokens of B rows, k' of each.
        second: over the k' tokens of B * G rows, those of a row's samples side by side, each in ascending order.
    """

    def __init__(self, first: PlackettLuce | Rounds, second: PlackettLuce | Rounds) -> None:
        self.first, self.second = first, second
        self._parts: tuple[Tensor, Tensor, Tensor] | None = None

    def step_log_probs(self, samples: Tensor) -> Tensor:
        """[B, G, K' + K]: of each item given those before it; 0 at padding."""
        first, second = self._split(samples)
        return self._side_by_side(self.first.step_log_probs(first), self.second.step_log_probs(second))

    def log_prob(self, samples: Tensor) -> Tensor:
        """[B, G]: of both subsets, as they were ordered."""
        return self.step_log_probs(samples).sum(-1)

    def entropy(self, samples: Tensor) -> Tensor:
        """[B, G]: see `PlackettLuce.entropy`."""
        first, second = self._split(samples)
        return self.first.entropy(first) + self.second.entropy(second).view(first.shape[:2])

    def kl(self, other: TwoStages, samples: Tensor) -> Tensor:
        """[B, G]: see `PlackettLuce.kl`."""
        first, second = self._split(samples)
        ours = self.first.kl(other.first, first)  # type: ignore[arg-type]  # of one kind
        return ours + self.second.kl(other.second, second).view(ours.shape)  # type: ignore[arg-type]

    def _split(self, samples: Tensor) -> tuple[Tensor, Tensor]:
        """[B, G, K'] and [B * G, 1, K]; the same objects for the same samples, by which `Rounds` knows them."""
        if self._parts is None or self._parts[0] is not samples:
            first, second = samples.split([self.first.k_max, self.second.k_max], -1)
            self._parts = samples, first, second.reshape(-1, 1, self.second.k_max)
        return self._parts[1:]

    def _side_by_side(self, first: Tensor, second: Tensor) -> Tensor:
        return torch.cat((first, second.view(*first.shape[:2], -1)), -1)


@dataclass(eq=False)
class _Inputs:
    """What both stages read: the first a sequence a question, the second one for each of its G draws."""

    first: ScorerInputs
    second: ScorerInputs
    tower_counts: Tensor  # [B] k'
    group: int

    @cached_property
    def owner(self) -> Tensor:
        return self.first.owner


class TwoStageGrpo(Grpo):
    """GRPO over pairs of subsets; see the module."""

    def policy(self, scorer: Scorer, inputs: _Inputs, counts: Tensor) -> TwoStages:  # type: ignore[override]
        """The distribution over pairs of subsets, of which the second has `counts` [B] tokens."""
        temperature = self.config.temperature
        return TwoStages(
            policy_of(scorer.tower, inputs.first, inputs.tower_counts, temperature),
            policy_of(scorer, inputs.second, counts.repeat_interleave(inputs.group), temperature),
        )

    @torch.no_grad()
    def _draw(self, batch: Batch, random: torch.Generator) -> Draws:
        config, scorer, group = self.config, self.scorer, self.config.num_generations
        first = batch.for_tower_stage(scorer.config.question)
        counts = draw_counts(config, batch.sizes, torch.arange(len(batch)), random)
        tower_counts = draw_tower_counts(config, batch.sizes, counts, random)
        inside = policy_of(scorer.tower, first, tower_counts, config.temperature)
        passed = inside.sample(group, generator=random)  # [B, G, K']
        rows = [question for question in range(len(batch)) for _ in range(group)]
        if "logits" in needs_of(self.reward):
            self.engine.full_logits(batch)  # of the whole tower, which the draws do not have
        left = self.engine.rerun(batch, rows, _ascending(passed.flatten(0, 1)))
        second = _second_inputs(scorer, left)
        behind = policy_of(scorer, second, counts.repeat_interleave(group), config.temperature)
        kept = behind.sample(1, generator=random)  # [B * G, 1, K], numbers of what is left
        subsets = _of_all(left, _ascending(kept[:, 0]))
        shown = [subsets[question * group] for question in range(len(batch))]
        rewards, stats = self.rewards_of(left, range(len(batch)), range(len(rows)), subsets, shown, group)
        samples = torch.cat((passed, kept.view(*passed.shape[:2], -1)), -1)
        old = TwoStages(inside, behind).step_log_probs(samples)
        inputs = _Inputs(first, second, tower_counts, group)
        share, total = counts / batch.sizes, counts + tower_counts
        stats["tower_share"] = float((tower_counts / batch.sizes).mean())
        return Draws(inputs, counts, samples, old, rewards, total.float(), share, stats)  # type: ignore[arg-type]


@torch.no_grad()
def best_of_two_stages(
    engine: Engine, scorer: Scorer, batch: Batch, keep: float, tower_keep: float, logits: bool = False
) -> tuple[Batch, Subsets]:
    """What the pruner keeps: the batch as the tower leaves it, and the subset of each of its questions.

    Args:
        keep, tower_keep: shares of all tokens; the tower keeps as many as `keep` at least.
        logits: whether the caller will compare with the unpruned model's logits.
    """
    if logits:
        engine.full_logits(batch)
    sizes = batch.sizes.tolist()
    counts = [Budget(keep).count(n) for n in sizes]
    tower_counts = [max(k, Budget(tower_keep).count(n)) for n, k in zip(sizes, counts, strict=True)]
    passed, _ = batch.for_tower_stage(scorer.config.question).choose(scorer.tower, tower_counts)
    left = engine.rerun(batch, range(len(batch)), passed)
    kept, _ = _second_inputs(scorer, left).choose(scorer, counts)
    return left, _of_all(left, kept)


def _second_inputs(scorer: Scorer, left: Batch) -> ScorerInputs:
    """What the second stage reads of questions whose pictures the tower left in part."""
    return ScorerInputs.of([left_by_tower(own[0]) for own in left.tokens], scorer.config.question)


def _ascending(samples: Tensor) -> list[Tensor]:
    """[R] lists of the items of samples [R, K], -1 at the end, ascending."""
    return [row[row >= 0].sort().values for row in samples]


def _of_all(left: Batch, kept: list[Tensor]) -> Subsets:
    """[R] lists of one tensor: numbers of what the tower left, as numbers of all tokens."""
    return [[own[0].tower_rows[rows]] for own, rows in zip(left.tokens, kept, strict=True)]  # type: ignore[index]
