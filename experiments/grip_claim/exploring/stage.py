"""GRPO with fewer or better rollouts. Each idea is a few lines of `_draw`, or of `surrogate`."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from gripvlm.grip.pruner import ScorerInputs
from gripvlm.grip.scorer import Scorer
from gripvlm.grip.train import Batch, Engine
from gripvlm.grip.train.grpo import Draws, Grpo, sum_by
from gripvlm.grip.train.stage import Stats

from .bands import Bands
from .config import ExploringConfig
from .set_value import SetValue

__all__ = ["Exploring"]

FIT_WEIGHT = 0.01
"""Of the guess's own loss: its gradients must not use up the norm that gradients are clipped to."""


class Exploring(Grpo):
    """Loss: `Grpo`'s, on draws that are made so (for B questions, up to G draws each):

    1. budget_moves (CaCoVID, arXiv 2602.01649, "difficulty-adaptive budget"): a question whose rewards do not differ is
       drawn again at half the budget where their mean is 0.5 or more, else at twice; up to so many times. In CaCoVID
       rewards are 0 or 1, and all of a group are alike. What was drawn before is not used, and is paid for.
    2. probes: every question has so many draws; the half whose probes have the larger standard deviation has the rest
       of the G. That choice looks at the same rewards, so that it prefers questions whose probes differ by chance.
    3. greedy: the first draw of a group is the policy's mode, as in CaCoVID, where it is treated as if it had been
       drawn. Here it has a part in the group's mean, and no gradient of its own, which would be a bias.
    4. virtual_draws: a guess V(set) of the advantage, learned from all rollouts so far, is a control variate. The
       advantage less the guess, plus the guess's own gradient over draws that no model sees, has the same mean for any
       V that does not know this step's rewards, and less variance the better V is.
    5. bands: every subset is drawn from one band of tokens with like scores (CaCoVID; see `Bands`). The loss holds the
       bands of the policy that drew.

    Draws that are not there have the reward of their group's mean, and so no advantage; the others weigh G over their
    number. The scale of the advantages counts both, and is that much smaller.
    """

    config: ExploringConfig

    def __init__(self, config: ExploringConfig, scorer: Scorer, engine: Engine) -> None:
        super().__init__(config, scorer, engine)
        self.value = SetValue(scorer.config.features, scorer.config.width) if config.virtual_draws else None
        self._random: WeakKeyDictionary[Draws, torch.Generator] = WeakKeyDictionary()  # for the virtual draws of each
        self._bands: WeakKeyDictionary[ScorerInputs, Tensor] = WeakKeyDictionary()  # in which they were drawn

    def modules(self) -> dict[str, nn.Module]:
        return super().modules() | ({} if self.value is None else {"value": self.value})

    def policy(self, scorer: Scorer, inputs: ScorerInputs, counts: Tensor) -> Any:
        law = super().policy(scorer, inputs, counts)
        if not self.config.bands:
            return law
        return Bands(law, inputs.valid, self._bands.get(inputs) if torch.is_grad_enabled() else None)

    @torch.no_grad()
    def _draw(self, batch: Batch, random: torch.Generator) -> Draws:
        config = self.config
        inputs, counts = self._budgets(batch, random)
        group = config.num_generations
        first = config.probes or group
        samples, rewards, stats = self._group(batch, inputs, counts, first, random, [*range(len(batch))])
        for _ in range(config.budget_moves):
            moved = self._moved(inputs, counts, rewards)
            again = sum_by((moved != counts).float(), inputs.owner, len(batch)).nonzero().flatten()
            if not len(again):
                break
            counts = moved
            drawn, rewards[again], _ = self._group(batch, inputs, counts, first, random, again.tolist())
            samples = _replaced(samples, drawn, torch.isin(inputs.owner, again))
        there = torch.ones_like(rewards)
        if config.probes:
            chosen = rewards.std(-1).argsort(descending=True)[: -(-len(batch) // 2)].sort().values.tolist()
            more = self.policy(self.scorer, inputs, counts).sample(group - first, generator=random)
            found, _ = self.rewards(batch, inputs, more, chosen)
            extra = rewards.mean(-1, keepdim=True).repeat(1, group - first)
            extra[chosen] = found
            with_more = torch.zeros_like(extra)
            with_more[chosen] = 1
            samples, there = torch.cat((samples, more), 1), torch.cat((there, with_more), 1)
            rewards = torch.cat((rewards, extra), 1)
        if config.greedy:
            there[:, 0] = 0  # in the mean, but without a gradient
        policy = self.policy(self.scorer, inputs, counts)
        if self.config.bands:
            self._bands[inputs] = policy.band
        draws = self._drawn_from(policy, inputs, counts, samples, rewards, stats)
        draws.weights = there * group / there.sum(-1, keepdim=True)
        if self.value is not None:
            seed = int(torch.randint(2**62, (), generator=random))
            self._random[draws] = torch.Generator().manual_seed(seed)
        return draws

    def _group(
        self,
        batch: Batch,
        inputs: ScorerInputs,
        counts: Tensor,
        group: int,
        random: torch.Generator,
        questions: list[int],
    ) -> tuple[Tensor, Tensor, Stats]:
        """Draws [S, group, K] of all questions, and rewards [questions, group] and what to log of some."""
        policy = self.policy(self.scorer, inputs, counts)
        samples = policy.sample(group, generator=random)
        if self.config.greedy:
            samples[:, 0] = policy.mode()
        rewards, stats = self.rewards(batch, inputs, samples, questions)
        return samples, rewards, stats

    def _moved(self, inputs: ScorerInputs, counts: Tensor, rewards: Tensor) -> Tensor:
        """[S] budgets: half or twice where the rewards [B, G] of a question do not differ."""
        flat, good = (rewards.std(-1) < self.config.flat)[inputs.owner], (rewards.mean(-1) >= 0.5)[inputs.owner]
        moved = torch.where(good, (counts // 2).clamp(min=1), (2 * counts).minimum(inputs.sizes))
        return torch.where(flat, moved, counts)

    def surrogate(self, policy: Any, draws: Draws, advantage: Tensor) -> tuple[Tensor, Stats]:
        if self.value is None:
            return super().surrogate(policy, draws, advantage)
        inputs, owner, size = draws.inputs, draws.inputs.owner, len(draws.total)
        weights = torch.ones_like(advantage) if draws.weights is None else draws.weights
        real = (weights > 0).float()
        guess = self.value(inputs, draws.samples, size)  # [B, G]
        centred = guess - (guess * real).sum(-1, keepdim=True) / real.sum(-1, keepdim=True)
        # Advantages hold their weights.
        loss, moved = super().surrogate(policy, draws, advantage - centred.detach() * weights)
        with torch.no_grad():
            virtual = policy.sample(self.config.virtual_draws, generator=self._random[draws])
            judged = self.value(inputs, virtual, size)
        number = real.sum(-1, keepdim=True)
        # So that the two centred means cancel exactly: each is too small by one part in its number.
        fair = self.config.virtual_draws / (self.config.virtual_draws - 1) * (number - 1) / number
        credit = (judged - judged.mean(-1, keepdim=True)) * fair
        log_prob = sum_by(policy.log_prob(virtual), owner, size) / draws.total[:, None]
        fit = ((centred - advantage / weights.clamp(min=1e-9)).square() * real).sum(-1) / number[:, 0]
        stats = {"explained": _explained(advantage.detach(), centred.detach(), real)}
        return loss - (credit * log_prob).mean(-1)[:, None] + FIT_WEIGHT * fit[:, None], moved | stats


def _replaced(samples: Tensor, others: Tensor, rows: Tensor) -> Tensor:
    """[S, G, K] samples, or others where `rows` [S]; as wide as the wider."""
    wide = max(samples.shape[-1], others.shape[-1])
    both = [pad(each, (0, wide - each.shape[-1]), value=-1) for each in (samples, others)]
    return torch.where(rows[:, None, None], both[1], both[0])


def _explained(advantage: Tensor, guess: Tensor, real: Tensor) -> float:
    """The share of the advantages' variance that the guess takes away; below 0 where it adds to it."""
    left, whole = (((each**2) * real).sum() for each in (advantage - guess, advantage))
    return float(1 - left / whole.clamp(min=1e-12))
