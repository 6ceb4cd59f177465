"""Stage 2: Group Relative Policy Optimization over k-subsets (Shao et al., DeepSeekMath, arXiv 2402.03300).

The MDP of GRIP-VLM (arXiv 2605.13375) as we read it: the state is image, question, budget and the tokens chosen so
far; an action keeps one more token; the only reward comes at the end, from the frozen model. Logits are computed
once, so an episode is one draw from a Plackett-Luce policy. For each question: one budget, G subsets, G rewards, and

    loss = -mean_g min(ratio_g A_g, clip(ratio_g) A_g),   A_g = (r_g - mean r) / std r,

with the ratio to the policy that drew the subsets, taken per kept token (k-normalised as in GSPO, arXiv 2507.18071).
On-policy (`num_iterations=1`, the default, as TwigVLM++) the ratio is 1 and clipping never acts.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from gripvlm.errors import TrainError
from gripvlm.grip.policy import PlackettLuce, samples_to_mask
from gripvlm.grip.pruner import ScorerInputs
from gripvlm.grip.scorer import Scorer
from gripvlm.grip.train.config import TrainConfig
from gripvlm.grip.train.data import draw_counts
from gripvlm.grip.train.rewards import Reward, Rewards, needs_of, scores_of
from gripvlm.grip.train.rollout import Batch, Engine, Subsets
from gripvlm.grip.train.trainer import Stage, Stats

__all__ = ["Grpo", "advantages"]


def advantages(rewards: Tensor, scale: str, share: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Advantages [B, G] of rewards [B, G], and which groups [B] have any variance.

    Args:
        scale: `group` divides by each group's standard deviation, `batch` by that of all rewards less their group's
            mean, `budget` by that of the groups with about the same budget, `none` not at all (Dr. GRPO, arXiv
            2503.20783). Groups without variance do not count in `batch` and `budget`.
        share: [B] of the tokens that are kept; `budget` needs it.

    With one scale for all, the budgets at which rewards differ most have most of the gradient; with a scale of its
    own, a group that hardly differs is noise made loud. `budget`, ours, is between them: mean squares of all groups,
    weighted by a Gaussian in the logarithm of the share with a standard deviation of half an octave.
    """
    centred = rewards - rewards.mean(-1)[:, None]
    # Rewards are float32: a smaller difference is rounding.
    useful = centred.abs().amax(-1) > 1e-6
    if scale == "group":
        # 1e-4 here and below: a group of nearly equal rewards must not become a large step.
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
    """See the module. Departures from TRL's GRPOTrainer: the policy is a distribution over subsets, not over text."""

    name = "grpo"

    def __init__(self, config: TrainConfig, scorer: Scorer, engine: Engine, reward: Reward | None = None) -> None:
        super().__init__(config, scorer, engine, config.max_steps, config.learning_rate)
        self.num_iterations = config.num_iterations
        self.reward = reward or Rewards.named(config.reward_funcs, config.reward_weights)
        self.reference: Scorer | None = None
        if config.beta:
            # Before the first step; the trainer saves it, so that a resumed run compares with the same scorer.
            self.reference = copy.deepcopy(scorer).eval().requires_grad_(False)

    def modules(self) -> dict[str, nn.Module]:
        return {} if self.reference is None else {"reference": self.reference}

    def policy(self, scorer: Scorer, inputs: ScorerInputs, counts: Tensor) -> PlackettLuce:
        """The distribution over subsets of `counts` [I] tokens of each image.

        Raises:
            TrainError: logits that are not finite.
        """
        logits = inputs.score(scorer, counts)
        # The policy would refuse them as well, without saying what to do.
        if not bool(logits[inputs.valid].isfinite().all()):
            raise TrainError(
                "the scorer has diverged, its logits are not finite any more: lower --learning-rate, and use another "
                "--output-dir if this one has a checkpoint"
            )
        return PlackettLuce(logits / self.config.temperature, counts, inputs.valid)

    def losses(self, batch: Batch, progress: float, random: torch.Generator) -> Iterator[tuple[Tensor, Stats]]:
        config, group = self.config, self.config.num_generations
        inputs = batch.for_scorer(self.scorer.config.question)
        counts = draw_counts(config, inputs.sizes, inputs.owner, random)
        policy = self.policy(self.scorer, inputs, counts)
        with torch.no_grad():
            samples = policy.sample(group, generator=random)  # [I, G, K]
            old = policy.log_prob(samples)
            rewards, stats = self._rewards(batch, samples)  # [B, G]
        share = _sum_by(counts, inputs.owner, len(batch)) / _sum_by(inputs.sizes, inputs.owner, len(batch))
        advantage, useful = advantages(rewards, config.scale_rewards, share)
        stats["frac_reward_zero_std"] = float((~useful).float().mean())
        # Groups that teach nothing do not dilute the others; all images of a question share its advantage.
        weight = (useful.float() / useful.float().sum().clamp(min=1))[inputs.owner]  # [I]
        advantage = advantage[inputs.owner]  # [I, G]
        for iteration in range(config.num_iterations):
            if iteration:
                policy = self.policy(self.scorer, inputs, counts)
            surrogate, clipped = self.surrogate(policy, samples, old, advantage)
            loss = (surrogate * weight[:, None]).sum() / group
            if self.reference is not None:
                kl = policy.kl(self.policy(self.reference, inputs, counts), samples).mean(-1) / counts
                loss = loss + config.beta * kl.mean()
                stats["kl"] = float(kl.detach().mean())
            if config.entropy_coef:
                loss = loss - config.entropy_coef * (policy.entropy(samples).mean(-1) / counts).mean()
            if iteration or config.num_iterations == 1:  # before the policy has moved nothing can be clipped
                stats["clip_ratio"] = clipped
            with torch.no_grad():
                stats["entropy"] = float((policy.entropy(samples).mean(-1) / counts).mean())
            yield loss, dict(stats)

    def _rewards(self, batch: Batch, samples: Tensor) -> tuple[Tensor, Stats]:
        """[B, G] rewards of the subsets [I, G, K], and what to log."""
        group = samples.shape[1]
        member = samples_to_mask(samples, max(t.n for tokens in batch.tokens for t in tokens))  # [I, G, n]
        tries = [batch.by_question(row.nonzero().flatten() for row in member[:, g]) for g in range(group)]
        # The G subsets of a question side by side, as the rewards are viewed below.
        rows = [question for question in range(len(batch)) for _ in range(group)]
        subsets = [tries[g][question] for question in range(len(batch)) for g in range(group)]
        rollout = self.engine.run(batch, rows, subsets, logits="logits" in needs_of(self.reward))
        values, each = scores_of(self.reward, rollout)
        rewards = values.view(len(batch), group)
        stats = {
            "reward": float(rewards.mean()),
            "reward_std": float(rewards.std(-1).mean()),
            "exact": float(rollout.exact.mean()),
        }
        for name, one in each.items():
            stats |= {f"rewards/{name}/mean": float(one.mean()), f"rewards/{name}/std": float(one.std())}
        return rewards, stats | _by_octave(batch, tries[0], rewards.mean(-1))

    def surrogate(self, policy: PlackettLuce, samples: Tensor, old: Tensor, advantage: Tensor) -> tuple[Tensor, float]:
        """[I, G] losses of the subsets, and the share of their ratios that lies outside the clipping range."""
        low, high = 1 - self.config.epsilon, 1 + (self.config.epsilon_high or self.config.epsilon)
        # A joint log-probability is a sum of k terms, hundreds of nats at large k: the ratio is that of a token.
        ratio = ((policy.log_prob(samples) - old) / policy.k[:, None].float()).exp()
        chosen = torch.minimum(ratio * advantage, ratio.clamp(low, high) * advantage)
        clipped = (ratio.detach() < low) | (ratio.detach() > high)
        return -chosen, float(clipped.float().mean())


def _by_octave(batch: Batch, subsets: Subsets, rewards: Tensor) -> Stats:
    """The mean of the rewards [B] of the questions whose share of kept tokens lies in each halving of 1."""
    found: dict[int, list[float]] = {}
    for tokens, kept, reward in zip(batch.tokens, subsets, rewards.tolist(), strict=True):
        share = sum(map(len, kept)) / sum(t.n for t in tokens)
        found.setdefault(min(math.floor(math.log2(share)), -1), []).append(reward)
    return {f"reward/keep_{2.0**low:.3g}-{2.0 ** (low + 1):.3g}": sum(of) / len(of) for low, of in found.items()}


def _sum_by(values: Tensor, owner: Tensor, groups: int) -> Tensor:
    """[groups] sums of values [I] by owner [I]."""
    return values.new_zeros(groups, dtype=torch.float32).index_add(0, owner, values.float())
