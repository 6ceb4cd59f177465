"""Stage 2: Group Relative Policy Optimization over k-subsets (Shao et al., DeepSeekMath, arXiv 2402.03300).

The MDP of GRIP-VLM (arXiv 2605.13375) as we read it: the state is image, question, budget and the tokens chosen so
far; an action keeps one more token; the only reward comes at the end, from the frozen model. Logits are computed
once, so an episode is one draw from a Plackett-Luce policy, in rounds where the scorer has them. For each question: one
budget, G subsets, G rewards, and

    loss = -mean_g min(ratio_g A_g, clip(ratio_g) A_g),   A_g = (r_g - mean r) / std r,

with the ratio to the policy that drew the subsets, taken per kept token (k-normalised as in GSPO, arXiv 2507.18071).
On-policy (`num_iterations=1`, the default, as TwigVLM++) the ratio is 1 and clipping never acts.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gripvlm.grip.policy import PlackettLuce, samples_to_mask
from gripvlm.grip.pruner import ScorerInputs
from gripvlm.grip.rounds import Rounds
from gripvlm.grip.scorer import Scorer
from gripvlm.grip.train.batch import Batch, Subsets
from gripvlm.grip.train.config import TrainConfig
from gripvlm.grip.train.data import draw_counts
from gripvlm.grip.train.policies import policy_of
from gripvlm.grip.train.rewards import Reward, Rewards, needs_of, scores_of
from gripvlm.grip.train.rollout import Engine
from gripvlm.grip.train.stage import Stage, Stats

__all__ = ["Draws", "Grpo", "advantages", "sum_by"]


def advantages(
    rewards: Tensor, scale: str, share: Tensor | None = None, pool: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Advantages [B, G] of rewards [B, G], and which groups [B] have any variance.

    Args:
        scale: `group` divides by each group's standard deviation, `batch` by that of all rewards less their group's
            mean, `budget` by that of the groups with about the same budget, `none` not at all (Dr. GRPO, arXiv
            2503.20783). Groups without variance do not count in `batch` and `budget`.
        share: [B] of the tokens that are kept; `budget` needs it.
        pool: the rewards [N, G] and shares [N] that `batch` and `budget` are about; by default these.

    A group whose rewards differ by less than a hundredth of the usual difference has no variance: it could not teach,
    but would count. With one scale for all, the budgets at which rewards differ most have most of the gradient; with a
    scale of its own, a group that hardly differs is noise made loud. `budget`, ours, is between them: mean squares of
    all groups, weighted by a Gaussian in the logarithm of the share with a standard deviation of half an octave.
    """
    centred, everything = (
        each - each.mean(-1, keepdim=True) for each in (rewards, rewards if pool is None else pool[0])
    )
    useful, counted = (_vary(each, everything) for each in (centred, everything))
    if scale == "group":
        # 1e-4 here and below: a group of nearly equal rewards must not become a large step.
        centred = centred / (rewards.std(-1, keepdim=True) + 1e-4)
    elif scale == "batch" and bool(counted.any()):
        centred = centred / (everything[counted].std() + 1e-4)
    elif scale == "budget":
        if share is None:
            raise ValueError("advantages(..., scale='budget') needs share, the tokens kept over the image's, [B]")
        shares = share if pool is None else pool[1]
        near = (-2 * (share.log2()[:, None] - shares.log2()).square()).exp() * counted  # [B, N]
        usual = (near @ everything.square().mean(-1)) / near.sum(-1).clamp(min=1e-9)
        centred = centred / (usual.sqrt()[:, None] + 1e-4)
    return centred * useful[:, None], useful


def _vary(centred: Tensor, everything: Tensor) -> Tensor:
    """[B] whether rewards [B, G] less their group's mean differ, measured by those of all groups [N, G]."""
    # Rewards are float32: a smaller difference than 1e-6 is rounding.
    return centred.abs().amax(-1) > (0.01 * everything.square().mean().sqrt()).clamp(min=1e-6)


@dataclass(eq=False)
class Draws:
    """What was drawn for a batch of B questions, G subsets each.

    Attributes:
        inputs: S sequences for the scorer.
        counts: [S] tokens to keep.
        samples: [S, G, K].
        old: [S, G, K] log-probabilities of each step under the policy that drew them.
        rewards: [B, G].
        total: [B] tokens to keep of each question, all its images together.
        share: [B] the same over all there are.
        stats: what to log.
        weights: [B, G] of the subsets in the loss; None for 1 each.
    """

    inputs: ScorerInputs
    counts: Tensor
    samples: Tensor
    old: Tensor
    rewards: Tensor
    total: Tensor
    share: Tensor
    stats: Stats
    weights: Tensor | None = None


class Grpo(Stage):
    """See the module. Departures from TRL's GRPOTrainer: the policy is a distribution over subsets, not over text."""

    name = "grpo"

    def __init__(self, config: TrainConfig, scorer: Scorer, engine: Engine, reward: Reward | None = None) -> None:
        super().__init__(config, scorer, engine, config.max_steps, config.learning_rate)
        self.num_iterations = config.num_iterations
        self.reward = reward or Rewards.named(config.reward_funcs, config.reward_weights)
        self._drawn: dict[Batch, Draws] = {}  # explored, and not yet trained on
        self._pool: tuple[Tensor, Tensor] | None = None  # rewards and shares of all micro-batches of the step
        self.reference: Scorer | None = None
        if config.beta:
            # Before the first step; the trainer saves it, so that a resumed run compares with the same scorer.
            self.reference = copy.deepcopy(scorer).eval().requires_grad_(False)

    def modules(self) -> dict[str, nn.Module]:
        return {} if self.reference is None else {"reference": self.reference}

    def policy(self, scorer: Scorer, inputs: ScorerInputs, counts: Tensor) -> PlackettLuce | Rounds:
        """The distribution over subsets of `counts` [S] tokens of each sequence.

        Raises:
            TrainError: logits that are not finite.
        """
        return policy_of(scorer, inputs, counts, self.config.temperature)

    def explore(self, batch: Batch, random: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draws subsets and scores them; returns the rewards [B, G] and the shares [B] that were kept."""
        self._drawn[batch] = draws = self._draw(batch, random)
        return draws.rewards.cpu(), draws.share.cpu()

    def pool(self, explored: list[tuple[Tensor, Tensor]]) -> None:
        rewards, shares = zip(*explored, strict=True) if explored else ((), ())
        device = self.engine.device
        self._pool = (torch.cat(rewards).to(device), torch.cat(shares).to(device)) if explored else None

    @torch.no_grad()
    def _draw(self, batch: Batch, random: torch.Generator) -> Draws:
        inputs, counts = self._budgets(batch, random)
        policy = self.policy(self.scorer, inputs, counts)
        samples = policy.sample(self.config.num_generations, generator=random)  # [S, G, K]
        rewards, stats = self.rewards(batch, inputs, samples)
        return self._drawn_from(policy, inputs, counts, samples, rewards, stats)

    def _budgets(self, batch: Batch, random: torch.Generator) -> tuple[ScorerInputs, Tensor]:
        """What the scorer reads, and how many tokens each sequence keeps, [S]."""
        inputs = batch.for_scorer(self.scorer.config.question, self.scorer.config.joint)
        owner = torch.tensor(batch.owner, device=batch.sizes.device)
        return inputs, inputs.totals(draw_counts(self.config, batch.sizes, owner, random))

    def _drawn_from(
        self,
        policy: PlackettLuce | Rounds,
        inputs: ScorerInputs,
        counts: Tensor,
        samples: Tensor,
        rewards: Tensor,
        stats: Stats,
    ) -> Draws:
        total = sum_by(counts, inputs.owner, len(rewards))
        share = total / sum_by(inputs.sizes, inputs.owner, len(rewards))
        return Draws(inputs, counts, samples, policy.step_log_probs(samples), rewards, total, share, stats)

    def losses(self, batch: Batch, progress: float, random: torch.Generator) -> Iterator[tuple[Tensor, Stats]]:
        config = self.config
        # A batch that was not explored is a step of its own.
        alone = batch not in self._drawn
        draws = self._draw(batch, random) if alone else self._drawn.pop(batch)
        pool = (draws.rewards, draws.share) if alone or self._pool is None else self._pool
        advantage, useful = advantages(draws.rewards, config.scale_rewards, draws.share, pool)
        if draws.weights is not None:
            advantage = advantage * draws.weights
        # Groups that teach nothing do not dilute the others, those of the step's other micro-batches included: the
        # trainer divides each loss by the number of micro-batches.
        everything = pool[0] - pool[0].mean(-1, keepdim=True)
        counted = _vary(everything, everything).float().sum().clamp(min=1)
        parts = 1 if alone else config.gradient_accumulation_steps
        weight = useful.float() * parts / counted  # [B]
        inputs, stats = draws.inputs, {**draws.stats, "frac_reward_zero_std": float((~useful).float().mean())}
        for iteration in range(config.num_iterations):
            policy = self.policy(self.scorer, inputs, draws.counts)
            surrogate, moved = self.surrogate(policy, draws, advantage)
            loss = (surrogate * weight[:, None]).mean(-1).sum()
            if self.reference is not None:
                other = self.policy(self.reference, inputs, draws.counts)
                kl = self._per_token(policy.kl(other, draws.samples), draws)  # type: ignore[arg-type]  # of one kind
                loss = loss + config.beta * kl
                stats["kl"] = float(kl.detach())
            with torch.set_grad_enabled(bool(config.entropy_coef)):
                entropy = self._per_token(policy.entropy(draws.samples), draws)
            stats["entropy"] = float(entropy.detach())
            if config.entropy_coef:
                loss = loss - config.entropy_coef * entropy
            clipped = moved.pop("clipped")
            stats |= moved
            if iteration or config.num_iterations == 1:  # before the policy has moved nothing can be clipped
                stats["clip_ratio"] = clipped
            yield loss, dict(stats)

    def _per_token(self, values: Tensor, draws: Draws) -> Tensor:
        """The mean over questions of values [S, G], summed over each question's sequences, for each token it keeps."""
        return (sum_by(values.mean(-1), draws.inputs.owner, len(draws.total)) / draws.total).mean()

    def rewards(
        self, batch: Batch, inputs: ScorerInputs, samples: Tensor, questions: Sequence[int] | None = None
    ) -> tuple[Tensor, Stats]:
        """[B, G] rewards of the subsets [S, G, K], and what to log; of some of the questions alone, in their order."""
        group, questions = samples.shape[1], range(len(batch)) if questions is None else questions
        member = samples_to_mask(samples, inputs.valid.shape[1])  # [S, G, n]
        tries = [
            batch.by_question(inputs.by_image([row.nonzero().flatten() for row in member[:, g]])) for g in range(group)
        ]
        # The G subsets of a question side by side, as the rewards are viewed below.
        rows = [question for question in questions for _ in range(group)]
        subsets = [tries[g][question] for question in questions for g in range(group)]
        return self.rewards_of(batch, questions, rows, subsets, tries[0], group)

    def rewards_of(
        self, batch: Batch, questions: Sequence[int], rows: Sequence[int], subsets: Subsets, shown: Subsets, group: int
    ) -> tuple[Tensor, Stats]:
        """[B, G] rewards of subsets, those of a question side by side, and what to log.

        Args:
            rows: of the batch, that the subsets are about.
            shown: [B] one subset of each question, whose size says the budget.
        """
        rollout = self.engine.run(batch, rows, subsets, logits="logits" in needs_of(self.reward))
        values, each = scores_of(self.reward, rollout)
        rewards = values.view(len(questions), group)
        stats = {
            "reward": float(rewards.mean()),
            "reward_std": float(rewards.std(-1).mean()),
            "exact": float(rollout.exact.mean()),
        }
        for name, one in each.items():
            stats |= {f"rewards/{name}/mean": float(one.mean()), f"rewards/{name}/std": float(one.std())}
        return rewards, stats | _by_octave(batch, questions, shown, rewards.mean(-1))

    def surrogate(self, policy: PlackettLuce | Rounds, draws: Draws, advantage: Tensor) -> tuple[Tensor, Stats]:
        """[B, G] losses of the subsets, one for all images of a question, and how far the policy has moved."""
        config, owner, size = self.config, draws.inputs.owner, len(draws.total)
        gap = policy.step_log_probs(draws.samples) - draws.old  # [S, G, K], 0 at padding
        inside = (draws.samples >= 0).float()
        if config.importance_sampling_level == "sequence":
            # A joint log-probability is a sum of k terms, hundreds of nats at large k: the ratio is that of a token. If
            # the terms are independent, their mean spreads as 1 / sqrt(k), and so do the limits of its ratio.
            ratio = (sum_by(gap.sum(-1), owner, size) / draws.total[:, None]).exp()
            power, real = draws.total.rsqrt()[:, None], torch.ones_like(ratio)
        else:
            ratio, advantage, real = gap.exp(), advantage[owner][..., None], inside
            power = torch.ones_like(ratio)
        low, high = (1 - config.epsilon) ** power, (1 + (config.epsilon_high or config.epsilon)) ** power
        held = torch.minimum(ratio, config.importance_sampling_cap**power)
        chosen = torch.minimum(held * advantage, ratio.clamp(low, high) * advantage) * real
        if config.importance_sampling_level == "token":
            chosen = sum_by(chosen.sum(-1), owner, size) / draws.total[:, None]
        with torch.no_grad():
            outside = ((ratio < low) | (ratio > high)) * real
            # Schulman's third estimate: of each step, never negative, 0 where nothing has moved.
            moved = ((gap.exp() - 1 - gap) * inside).sum() / inside.sum()
        return -chosen, {"clipped": float(outside.sum() / real.sum()), "kl_old": float(moved)}


def _by_octave(batch: Batch, questions: Sequence[int], subsets: Subsets, rewards: Tensor) -> Stats:
    """The mean of the rewards of the questions whose share of kept tokens lies in each halving of 1.

    Args:
        subsets: [B] one of each question of the batch.
        rewards: of `questions`.
    """
    found: dict[int, list[float]] = {}
    for question, reward in zip(questions, rewards.tolist(), strict=True):
        share = sum(map(len, subsets[question])) / sum(t.n for t in batch.tokens[question])
        found.setdefault(min(math.floor(math.log2(share)), -1), []).append(reward)
    return {f"reward/keep_{2.0**low:.3g}-{2.0 ** (low + 1):.3g}": sum(of) / len(of) for low, of in found.items()}


def sum_by(values: Tensor, owner: Tensor, groups: int) -> Tensor:
    """[groups, ...] sums of values [S, ...] by owner [S]."""
    return values.new_zeros(groups, *values.shape[1:], dtype=torch.float32).index_add(0, owner, values.float())
