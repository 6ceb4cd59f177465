"""Stage 2: Group Relative Policy Optimization over k-subsets (Shao et al., DeepSeekMath, arXiv 2402.03300).

The MDP of GRIP-VLM (arXiv 2605.13375) as we read it: the state is image, question, budget and what is kept so
far; an action keeps one more token; the only reward comes at the end, from the frozen model. Logits are computed
once, so an episode is one draw from a Plackett-Luce law. For each question: one budget, G subsets, G rewards, and

    loss = -mean_g min(ratio_g A_g, clip(ratio_g) A_g),   A_g = (r_g - mean r) / std r,

with the ratio to the policy that drew the subsets, taken per kept token (k-normalised as in GSPO, arXiv 2507.18071).
On-policy (`num_iterations=1`, the default, as TwigVLM++) the ratio is 1 and clipping never acts.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TypeAlias

import torch
from torch import Tensor, nn

from gripvlm.errors import TrainError
from gripvlm.grip.policy import ConditionalBernoulli, PlackettLuce, band_mask, picks_to_mask
from gripvlm.grip.scorer import Scorer
from gripvlm.grip.train.budgets import draw_keeps
from gripvlm.grip.train.config import TrainConfig
from gripvlm.grip.train.loop import Stage, Stats
from gripvlm.grip.train.rewards import checked, get_reward, reads_logits
from gripvlm.grip.train.rollout import Batch, Engine

__all__ = ["Grpo", "advantages"]

Law: TypeAlias = PlackettLuce | ConditionalBernoulli


def advantages(
    rewards: Tensor, scale: str, baseline: Tensor | None = None, share: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Advantages [B, G] of rewards [B, G], and which groups [B] have any variance.

    Args:
        scale: `group` divides by each group's standard deviation, `batch` by that of all rewards after the
            baseline, `budget` by that of the groups with about the same budget, `none` not at all (Dr. GRPO,
            arXiv 2503.20783). Groups without variance are left out of `batch` and `budget`.
        baseline: [B] what rewards are compared with; by default the group's mean.
        share: [B] of the tokens that are kept; `budget` needs it.

    With one scale for all, the budgets at which rewards differ most have most of the gradient; with a scale of its
    own, a group that hardly differs is noise made loud. `budget`, ours, is between them: mean squares of all groups,
    weighted by a Gaussian in the logarithm of the share with a standard deviation of half an octave.
    """
    centred = rewards - (rewards.mean(-1) if baseline is None else baseline)[:, None]
    useful = centred.abs().amax(-1) > 1e-6
    if scale == "group":
        useful &= rewards.amax(-1) - rewards.amin(-1) > 1e-6  # nothing to divide by, whatever the baseline
        centred = centred / (rewards.std(-1, keepdim=True) + 1e-4)
    elif scale == "batch" and bool(useful.any()):
        centred = centred / (centred[useful].std() + 1e-4)
    elif scale == "budget":
        if share is None:
            raise ValueError("advantages(..., scale='budget') needs share, the tokens kept over the image's, [B]")
        octaves = share.log2()
        near = (-2 * (octaves[:, None] - octaves).square()).exp() * useful  # [B, B]
        usual = (near @ centred.square().mean(-1)) / near.sum(-1).clamp(min=1e-9)
        centred = centred / (usual.sqrt()[:, None] + 1e-4)
    return centred * useful[:, None], useful


class Grpo(Stage):
    """See the module. Departures from TRL's GRPOTrainer: the policy is a law over subsets, not over text."""

    name = "grpo"

    def __init__(self, config: TrainConfig, scorer: Scorer, engine: Engine) -> None:
        super().__init__(config, scorer, engine, config.steps, config.learning_rate)
        self.reward = get_reward(config.reward)
        self.reference: Scorer | None = None
        if config.beta:
            self.reference = copy.deepcopy(scorer).eval().requires_grad_(False)
        self.value: nn.Linear | None = None
        if config.credit == "value":
            self.value = nn.Linear(scorer.config.width, 1)
            nn.init.zeros_(self.value.weight)
            nn.init.zeros_(self.value.bias)

    def extras(self) -> dict[str, nn.Module]:
        found: dict[str, nn.Module | None] = {"reference": self.reference, "value": self.value}
        return {name: module for name, module in found.items() if module is not None}

    def _law(self, logits: Tensor, chosen: Tensor, free: Tensor) -> Law:
        """The law of `chosen` [I] picks among the `free` [I, n] tokens."""
        if not bool(logits[free].isfinite().all()):
            raise TrainError(
                "the scorer has diverged, its logits are no numbers any more: lower --learning-rate, and type another "
                "--out if this one has a checkpoint"
            )
        family = PlackettLuce if self.config.policy == "plackett_luce" else ConditionalBernoulli
        return family(logits / self.config.temperature, chosen, free)

    def losses(self, batch: Batch, progress: float, random: torch.Generator) -> Iterator[tuple[Tensor, Stats]]:
        config, group = self.config, self.config.num_generations
        seen = batch.for_scorer(self.scorer.config.question)
        kept = draw_keeps(config, seen.sizes, seen.owner, progress, random)
        hidden = seen.hidden(self.scorer, kept)
        logits = self.scorer.judge(hidden, seen.valid)
        forced, free, chosen = self._free(logits.detach(), kept, seen.valid)
        law = self._law(logits, chosen, free)
        with torch.no_grad():
            picks = self._draw(law, random)  # [I, G, K]
            old = law.log_prob(picks)
            old_steps = law.step_log_probs(picks) if isinstance(law, PlackettLuce) else None
            rewards, stats, baseline = self._rewards(batch, picks, law, forced, seen.owner)
        share = _sum_by(kept, seen.owner, len(batch)) / _sum_by(seen.sizes, seen.owner, len(batch))
        advantage, useful = advantages(rewards, config.scale_rewards, baseline, share)
        stats["zero_std"] = float((~useful).float().mean())
        weight = useful.float() / useful.float().sum().clamp(min=1)  # [B]
        a, w = advantage[seen.owner], weight[seen.owner]  # [I, G], [I]
        for iteration in range(config.num_iterations):
            if iteration:
                hidden = seen.hidden(self.scorer, kept)
                law = self._law(self.scorer.judge(hidden, seen.valid), chosen, free)
            loss, more = self._surrogate(law, picks, old, old_steps, a, hidden, seen.valid)
            loss = (loss * w[:, None]).sum() / group
            if self.reference is not None:
                before = self._law(seen.score(self.reference, kept), chosen, free)
                kl = self._kl(law, before, picks) / chosen
                loss = loss + config.beta * kl.mean()
                more["kl"] = float(kl.detach().mean())
            if config.entropy_coef:
                loss = loss - config.entropy_coef * self._entropy(law, picks).mean()
            if self.value is not None:
                loss = loss + self._critic(law, hidden, picks, a, w, seen.valid)
            if config.num_iterations > 1 and iteration == 0:
                del more["clipped"]  # nothing can be: the policy has not moved yet
            with torch.no_grad():
                more["entropy"] = float(self._entropy(law, picks).mean())
            yield loss, {**stats, **more}

    # --- parts ------------------------------------------------------------------------------------------------

    def _free(self, logits: Tensor, kept: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens kept for certain [I, n], those that the law chooses among [I, n], and how many of them [I]."""
        if not self.config.band:
            return torch.zeros_like(valid), valid, kept
        forced, allowed = band_mask(logits, kept, self.config.band, valid)
        return forced, allowed & ~forced, kept - forced.sum(-1)

    def _draw(self, law: Law, random: torch.Generator) -> Tensor:
        return law.sample(self.config.num_generations, generator=random, antithetic=self.config.antithetic)

    def _rewards(
        self, batch: Batch, picks: Tensor, law: Law, forced: Tensor, owner: Tensor
    ) -> tuple[Tensor, Stats, Tensor | None]:
        """[B, G] rewards of the subsets, what to log, and the self-critical baseline [B] where one is asked for."""
        group = picks.shape[1]
        if self.config.baseline == "self_critical":
            picks = torch.cat((picks, law.mode()[:, None]), 1)
        draws = picks.shape[1]
        member = picks_to_mask(picks, forced.shape[1]) | forced[:, None]  # [I, draws, n]
        where: list[list[int]] = [[] for _ in range(len(batch))]
        for image, sample in enumerate(owner.tolist()):
            where[sample].append(image)
        rows = [sample for sample in range(len(batch)) for _ in range(draws)]
        subsets = [
            [member[image, g].nonzero().flatten() for image in where[sample]]
            for sample in range(len(batch))
            for g in range(draws)
        ]
        rollout = self.engine.run(batch, rows, subsets, logits=reads_logits(self.reward))
        values = checked(self.reward, rollout).view(len(batch), draws)
        rewards = values[:, :group]
        exact = rollout.exact.view(len(batch), draws)[:, :group]
        stats = {
            "reward": float(rewards.mean()),
            "reward_std": float(rewards.std(-1).mean()),
            "exact": float(exact.mean()),
        }
        if (share := evidence_share(batch, member[:, :group], owner)) is not None:
            stats["evidence"] = share
        return rewards, stats, values[:, group] if draws > group else None

    def _surrogate(
        self,
        law: Law,
        picks: Tensor,
        old: Tensor,
        old_steps: Tensor | None,
        a: Tensor,
        hidden: Tensor,
        valid: Tensor,
    ) -> tuple[Tensor, Stats]:
        """[I, G] losses of the subsets."""
        config = self.config
        low, high = 1 - config.epsilon, 1 + (config.epsilon_high or config.epsilon)
        k = law.k[:, None].float()
        if self.value is not None:
            a = a - self._gain(self._values(hidden.detach(), valid), picks).detach()
        if config.importance_sampling_level == "token" and old_steps is not None and isinstance(law, PlackettLuce):
            ratio = (law.step_log_probs(picks) - old_steps).exp()
            a = a[..., None]
            chosen = torch.minimum(ratio * a, ratio.clamp(low, high) * a).masked_fill(picks < 0, 0.0).sum(-1) / k
        else:
            ratio = ((law.log_prob(picks) - old) / k).exp()
            chosen = torch.minimum(ratio * a, ratio.clamp(low, high) * a)
        clipped = (ratio.detach() < low) | (ratio.detach() > high)
        more: Stats = {"clipped": float(clipped.float().mean())}
        if config.loss_type == "dr_grpo":
            chosen = chosen * k / valid.sum(-1, keepdim=True)
        return -chosen, more

    def _values(self, hidden: Tensor, valid: Tensor) -> Tensor:
        """[I, n] what keeping each token adds to the advantage, as the critic sees it."""
        assert self.value is not None
        return self.value(hidden).squeeze(-1).masked_fill(~valid, 0.0)

    def _gain(self, values: Tensor, picks: Tensor) -> Tensor:
        """[I, G] the critic's advantage of each subset."""
        total = (values[:, None] * picks_to_mask(picks, values.shape[1])).sum(-1)
        return total - total.mean(-1, keepdim=True)

    def _critic(self, law: Law, hidden: Tensor, picks: Tensor, a: Tensor, w: Tensor, valid: Tensor) -> Tensor:
        """The critic's regression, and the exact gradient of what it already explains.

        An additive control variate: with V(S) = sum of v_i over S, the score-function term uses A - V(S), and
        E[V] = sum_i pi_i v_i is differentiated exactly through the inclusion probabilities pi. Unbiased for any v:
        centring V over the group takes 1 / G of its expected gradient away, so that much is not given back either.
        """
        values = self._values(hidden.detach(), valid)  # what the scorer learns comes from the rewards alone
        error = (a - self._gain(values, picks)).square().mean(-1)
        assert isinstance(law, ConditionalBernoulli)
        expected = (law.inclusion() * values.detach()).sum(-1) / law.k * (1 - 1 / picks.shape[1])
        if self.config.loss_type == "dr_grpo":
            expected = expected * law.k / valid.sum(-1)
        return (w * (0.5 * error - expected)).sum()

    def _kl(self, law: Law, before: object, picks: Tensor) -> Tensor:
        """[I] KL(policy || start); for Plackett-Luce the mean over the drawn subsets of exact per-step terms."""
        if isinstance(law, ConditionalBernoulli) and isinstance(before, ConditionalBernoulli):
            return law.kl(before)
        assert isinstance(law, PlackettLuce)
        assert isinstance(before, PlackettLuce)
        return law.step_kl(before, picks).sum(-1).mean(-1)

    def _entropy(self, law: Law, picks: Tensor) -> Tensor:
        """[I] nats a chosen token."""
        if isinstance(law, ConditionalBernoulli):
            return law.entropy() / law.k
        return law.step_entropy(picks).sum(-1).mean(-1) / law.k


def _sum_by(values: Tensor, owner: Tensor, groups: int) -> Tensor:
    """[groups] sums of values [I] by owner [I]."""
    return values.new_zeros(groups, dtype=torch.float32).index_add(0, owner, values.float())


def evidence_share(batch: Batch, member: Tensor, owner: Tensor) -> float | None:
    """Mean share of each question's marked evidence that was kept, as far as it could fit; None without marks."""
    shares = []
    for image, sample in enumerate(owner.tolist()):
        evidence, tokens = batch.samples[sample].evidence, batch.tokens[sample]
        if not evidence or len(tokens) != 1 or tokens[0].grid != batch.tasks[sample].evidence_grid:
            continue
        most = min(len(evidence), int(member[image, 0].sum()))
        shares.append(float(member[image][:, list(evidence)].sum(-1).float().mean()) / most)
    return sum(shares) / len(shares) if shares else None
