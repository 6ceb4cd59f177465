"""GRPO: its arithmetic against enumeration, and that it and its rivals learn."""

from __future__ import annotations

import itertools

import pytest
import torch

from gripvlm.grip.policy import ConditionalBernoulli, PlackettLuce, picks_to_mask
from gripvlm.grip.train import Batch
from gripvlm.grip.train.grpo import Grpo, advantages, evidence_share
from gripvlm.grip.train.relaxed import Relaxed
from gripvlm.grip.train.warmup import WarmUp
from gripvlm.models.encoded import Encoded
from gripvlm.pruners.base import top_k_of_each
from tiny_train import drawn, tiny_config, tiny_scorer


def grpo(engine, **changes) -> Grpo:
    return Grpo(tiny_config(**changes), tiny_scorer(engine.model), engine)


# --- advantages ---------------------------------------------------------------------------------------------------

REWARDS = torch.tensor([[1.0, 3.0], [5.0, 5.0], [0.0, 8.0]])


def test_advantages_by_hand():
    useful = [True, False, True]
    plain, seen = advantages(REWARDS, "none")
    assert seen.tolist() == useful
    assert plain.tolist() == [[-1, 1], [0, 0], [-4, 4]]
    group, _ = advantages(REWARDS, "group")
    assert torch.allclose(group, torch.tensor([[-1.0, 1], [0, 0], [-1, 1]]) / 2**0.5, atol=1e-3)
    whole, _ = advantages(REWARDS, "batch")
    assert torch.allclose(whole, plain / torch.tensor([-1.0, 1, -4, 4]).std(), atol=1e-3)  # of those that differ
    assert not advantages(torch.ones(3, 2), "batch")[0].any()
    against, seen = advantages(REWARDS, "none", torch.tensor([0.0, 0.0, 8.0]))
    assert against.tolist() == [[1, 3], [5, 5], [-8, 0]]
    assert seen.tolist() == [True, True, True]  # all alike, but not like the baseline
    _, seen = advantages(REWARDS, "group", torch.tensor([0.0, 0.0, 8.0]))
    assert seen.tolist() == useful  # no standard deviation to divide by


def test_advantages_by_budget_have_a_scale_for_each_budget():
    rewards = torch.tensor([[0.0, 8.0], [0.0, 0.4], [0.0, 0.2], [5.0, 5.0]])
    share = torch.tensor([0.015, 0.25, 0.25, 0.25])
    found, seen = advantages(rewards, "budget", share=share)
    assert seen.tolist() == [True, True, True, False]
    assert torch.allclose(found[0], torch.tensor([-1.0, 1.0]), atol=1e-3)  # alone four octaves away
    of_two = ((0.04 + 0.01) / 2) ** 0.5
    assert torch.allclose(found[1:3, 1], torch.tensor([0.2, 0.1]) / of_two, rtol=2e-3)
    assert not found[3].any()
    assert torch.allclose(found, advantages(100 * rewards, "budget", share=share)[0], rtol=2e-3)
    near = advantages(rewards[:2], "budget", share=torch.tensor([0.125, 0.25]))[0][:, 1]
    w = torch.tensor(-2.0).exp()  # an octave apart
    mean_squares = torch.tensor([16 + 0.04 * w, 0.04 + 16 * w]) / (1 + w)
    assert torch.allclose(near, torch.tensor([4.0, 0.2]) / mean_squares.sqrt(), rtol=2e-3)
    with pytest.raises(ValueError, match="needs share"):
        advantages(rewards, "budget")


# --- the gradient, by enumeration of n = 5, k = 2 -----------------------------------------------------------------

N, K = 5, 2
WORTH = torch.tensor([0.3, -1.0, 2.0, 0.7, 1.1])


def reward_of(picks: torch.Tensor) -> torch.Tensor:
    """[G] of picks [G, 2], with an interaction so that it is not additive."""
    a, b = WORTH[picks[:, 0]], WORTH[picks[:, 1]]
    return a + b + 1.5 * a * b


def every(policy: str) -> torch.Tensor:
    """[1, subsets, 2] all outcomes of the law."""
    ways = itertools.permutations if policy == "plackett_luce" else itertools.combinations
    return torch.tensor([list(ways(range(N), K))])


def exact_gradient(policy: str, logits: torch.Tensor) -> torch.Tensor:
    """Of the expected reward."""
    leaf = logits.clone().requires_grad_()
    law = (PlackettLuce if policy == "plackett_luce" else ConditionalBernoulli)(leaf[None], K)
    chances = law.log_prob(every(policy)).exp()[0]
    assert float(chances.detach().sum()) == pytest.approx(1, abs=1e-5)
    (chances * reward_of(every(policy)[0])).sum().backward()
    return leaf.grad


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo"])
@pytest.mark.parametrize(
    ("policy", "level"),
    [("plackett_luce", "sequence"), ("plackett_luce", "token"), ("conditional_bernoulli", "sequence")],
)
def test_the_surrogates_expected_gradient_is_that_of_the_reward(engine, policy, level, loss_type):
    stage = grpo(engine, policy=policy, importance_sampling_level=level, loss_type=loss_type)
    logits = torch.randn(N, generator=drawn())
    leaf = logits.clone().requires_grad_()
    valid = torch.ones(1, N, dtype=torch.bool)
    law = stage._law(leaf[None], torch.tensor([K]), valid)
    picks = every(policy)
    with torch.no_grad():
        old = law.log_prob(picks)
        steps = law.step_log_probs(picks) if policy == "plackett_luce" else None
    a = reward_of(picks[0])[None]
    losses, stats = stage._surrogate(law, picks, old, steps, a, torch.zeros(1, N, 1), valid)
    assert stats["clipped"] == 0
    (losses * old.exp()).sum().backward()
    constant = 1 / N if loss_type == "dr_grpo" else 1 / K
    assert torch.allclose(leaf.grad, -constant * exact_gradient(policy, logits), atol=1e-5)


def test_dr_grpo_does_not_see_padding(engine):
    stage = grpo(engine, loss_type="dr_grpo")
    picks, a = every("plackett_luce"), reward_of(every("plackett_luce")[0])[None]

    def losses(padding: int) -> torch.Tensor:
        logits = torch.cat((torch.randn(1, N, generator=drawn()), torch.full((1, padding), -torch.inf)), 1)
        valid = logits.isfinite()
        law = stage._law(logits, torch.tensor([K]), valid)
        old, steps = law.log_prob(picks), law.step_log_probs(picks)
        return stage._surrogate(law, picks, old, steps, a, torch.zeros(1, N + padding, 1), valid)[0]

    assert losses(0).abs().max() > 0.01
    assert torch.allclose(losses(0), losses(7))


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo"])
def test_the_critic_changes_no_expected_gradient_and_calms_it_when_right(engine, loss_type):
    """Groups of G = 2 sets, all 100 of them, with the group's mean as baseline."""
    stage = grpo(engine, policy="conditional_bernoulli", credit="value", loss_type=loss_type, num_generations=2)
    logits, valid = torch.randn(N, generator=drawn(1)), torch.ones(1, N, dtype=torch.bool)
    sets = every("conditional_bernoulli")[0]
    pairs = torch.tensor(list(itertools.product(range(10), repeat=2)))
    chance = ConditionalBernoulli(logits[None], K).log_prob(sets[None])[0].exp()
    additive = WORTH[sets].sum(-1)

    def gradients(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean over groups, and variance added over the logits."""
        stage._values = lambda hidden, mask: values[None].clone()
        found = []
        for pair in pairs:
            leaf = logits.clone().requires_grad_()
            law = stage._law(leaf[None], torch.tensor([K]), valid)
            picks, rewards = sets[pair][None], additive[pair][None]
            a = rewards - rewards.mean()
            loss, _ = stage._surrogate(law, picks, law.log_prob(picks).detach(), None, a, torch.zeros(1, N, 1), valid)
            critic = stage._critic(law, torch.zeros(1, N, 1), picks, a, torch.ones(1), valid)
            (loss.sum() / 2 + critic).backward()
            found.append(leaf.grad)
        found = torch.stack(found)
        weight = chance[pairs].prod(-1)[:, None]
        mean = (weight * found).sum(0)
        return mean, (weight * (found - mean).square()).sum()

    none, noise = gradients(torch.zeros(N))
    wild, _ = gradients(torch.tensor([3.0, -2.0, 0.5, 1.0, -4.0]))
    right, calm = gradients(WORTH)
    assert none.abs().max() > 0.01
    assert torch.allclose(none, wild, atol=1e-5)
    assert torch.allclose(none, right, atol=1e-5)
    assert calm < 1e-3 * noise


def test_the_critics_regression_does_not_reach_the_scorer(engine):
    """Its targets are no reward: only the value's own weights may follow them."""
    stage = grpo(engine, policy="conditional_bernoulli", credit="value", num_generations=2)
    hidden = torch.randn(1, N, 16, generator=drawn(2)).requires_grad_()
    picks, valid = torch.tensor([[[0, 1], [2, 3]]]), torch.ones(1, N, dtype=torch.bool)
    law = ConditionalBernoulli(torch.randn(1, N, generator=drawn(3)).requires_grad_(), K)
    stage._critic(law, hidden, picks, torch.tensor([[1.0, -1.0]]), torch.ones(1), valid).backward()
    assert hidden.grad is None
    assert stage.value.weight.grad.abs().max() > 0


def test_each_group_is_scaled_with_its_own_budget(engine, batch, monkeypatch):
    asked = {}

    def spy(rewards, scale, baseline=None, share=None):
        asked.update(scale=scale, share=share)
        return advantages(rewards, scale, baseline, share)

    monkeypatch.setattr("gripvlm.grip.train.grpo.advantages", spy)
    stage = grpo(engine, scale_rewards="budget", budgets="choices", keep_choices="0.125,0.5")
    rollouts = spied(stage, monkeypatch)
    losses(stage, batch)
    kept = [len(rollouts[0].kept[row][0]) / 16 for row in range(0, 16, 4)]
    assert asked["scale"] == "budget"
    assert {*kept} == {0.125, 0.5}
    assert asked["share"].tolist() == kept


def losses(stage: Grpo, batch, seed: int = 0):
    return list(stage.losses(batch, 0.0, drawn(seed)))


def test_a_band_draws_only_near_rank_k(engine, batch, monkeypatch):
    stage = grpo(engine, band=2, budgets="fixed", keep_low=0.5)
    rollouts = spied(stage, monkeypatch)
    losses(stage, batch)
    seen = batch.for_scorer(True)
    rank = seen.score(stage.scorer, torch.tensor([8] * 4)).argsort(-1, descending=True).argsort(-1)
    for sample, kept in zip(rollouts[0].samples, rollouts[0].kept, strict=True):
        mine = rank[batch.samples.index(sample)][kept[0]]
        assert len(mine) == 8
        assert set(range(6)) <= set(mine.tolist()) <= set(range(10))
    assert len({tuple(kept[0].tolist()) for kept in rollouts[0].kept[:4]}) > 1


def spied(stage: Grpo, monkeypatch) -> list:
    """Rollouts as they are made."""
    rollouts, run = [], stage.engine.run

    def spy(*args, **options):
        rollouts.append(run(*args, **options))
        return rollouts[-1]

    monkeypatch.setattr(stage.engine, "run", spy)
    return rollouts


def test_self_critical_compares_with_the_greedy_subset(engine, batch, monkeypatch):
    stage = grpo(engine, baseline="self_critical", budgets="fixed", keep_low=0.25)
    rollouts = spied(stage, monkeypatch)
    losses(stage, batch)
    assert len(rollouts[0].kept) == 4 * 5
    top = top_k_of_each(batch.for_scorer(True).score(stage.scorer, torch.tensor([4] * 4)), [4] * 4)
    assert [kept[0].tolist() for kept in rollouts[0].kept[4::5]] == [row.tolist() for row in top]


def test_antithetic_draws_come_in_unlike_pairs(engine, batch, monkeypatch):
    overlap = {}
    for antithetic in (False, True):
        stage = grpo(engine, antithetic=antithetic, num_generations=16, budgets="fixed", keep_low=0.5)
        with monkeypatch.context() as patch:
            rollouts = spied(stage, patch)
            losses(stage, batch)
        kept = [set(one[0].tolist()) for one in rollouts[0].kept]
        overlap[antithetic] = sum(len(a & b) for a, b in zip(kept[::2], kept[1::2], strict=True)) / 32
    assert overlap[True] < overlap[False] - 0.5


def test_several_iterations_reuse_the_rollouts_and_are_clipped(engine, batch, monkeypatch):
    stage = grpo(engine, num_iterations=2, epsilon=1e-4)
    rollouts = spied(stage, monkeypatch)
    steps = stage.losses(batch, 0.0, drawn())
    loss, first = next(steps)
    loss.backward()
    with torch.no_grad():
        for weight in stage.scorer.parameters():
            weight -= 0.05 * (0 if weight.grad is None else weight.grad.sign())
    _, second = next(steps)
    assert next(steps, None) is None
    assert len(rollouts) == 1
    assert first["reward"] == second["reward"]
    assert "clipped" not in first  # nothing has moved yet
    assert second["clipped"] > 0.5


def test_divergence_and_entropy_enter_the_loss(engine, batch):
    for policy in ("plackett_luce", "conditional_bernoulli"):
        plain, _ = losses(grpo(engine, policy=policy), batch)[0]
        stage = grpo(engine, policy=policy, beta=0.5)
        loss, stats = losses(stage, batch)[0]
        assert stats["kl"] == pytest.approx(0, abs=1e-5)
        with torch.no_grad():
            stage.scorer.score.weight *= 2
        bare = grpo(engine, policy=policy)
        bare.scorer.load_state_dict(stage.scorer.state_dict())
        loss, stats = losses(stage, batch)[0]
        assert stats["kl"] > 1e-3
        assert float((loss - losses(bare, batch)[0][0]).detach()) == pytest.approx(0.5 * stats["kl"], rel=1e-3)
        spread, stats = losses(grpo(engine, policy=policy, entropy_coef=0.5), batch)[0]
        assert float((plain - spread).detach()) == pytest.approx(0.5 * stats["entropy"], rel=1e-3)
        assert not any(p.requires_grad for p in stage.extras()["reference"].parameters())


def test_groups_without_variance_teach_nothing_and_are_counted(engine, batch):
    stage = grpo(engine)
    stage.reward = lambda r: torch.tensor([float(s.id == "1-0") for s in r.samples]) * r.log_probs.sum(-1)
    loss, stats = losses(stage, batch)[0]
    assert stats["zero_std"] == 0.75
    loss.backward()
    assert stage.scorer.score.weight.grad.abs().sum() > 0
    stage.reward = lambda r: torch.ones(len(r.samples))
    stage.scorer.zero_grad()
    loss, stats = losses(stage, batch)[0]
    loss.backward()
    assert stats["zero_std"] == 1
    assert stage.scorer.score.weight.grad.abs().max() == 0


def test_the_evidence_that_was_kept_is_counted(batch):
    member = picks_to_mask(torch.tensor([[[0, 5], [0, 1]]] * 2 + [[[1, 6], [7, 8]]] * 2), 16)  # marks: 0, 5 and 1, 6
    assert evidence_share(batch, member, torch.arange(4)) == pytest.approx((1 + 0.5 + 1 + 0) / 4)


def test_two_images_a_question_share_reward_and_budget(engine, batch, monkeypatch):
    """Tasks have one picture a question today; the engine and GRPO take more."""
    double = Batch(
        batch.tasks[:2],
        batch.samples[:2],
        batch.answers[:2],
        twice(batch.prompts),
        twice(batch.inputs),
        Encoded(
            batch.encoded.model_type, tuple((a[0], a[0]) for a in batch.encoded.samples[:2]), batch.encoded.outputs
        ),
        [[tokens[0], tokens[0]] for tokens in batch.tokens[:2]],
    )
    stage = grpo(engine, budgets="fixed", keep_low=0.25)
    rollouts = spied(stage, monkeypatch)
    loss, stats = losses(stage, double)[0]
    loss.backward()
    assert double.for_scorer(True).owner.tolist() == [0, 0, 1, 1]
    assert [[len(k) for k in kept] for kept in rollouts[0].kept] == [[4, 4]] * 8
    assert any(kept[0].tolist() != kept[1].tolist() for kept in rollouts[0].kept)
    assert "evidence" not in stats
    assert stage.scorer.score.weight.grad.abs().sum() > 0


def twice(inputs: dict) -> dict:
    """The first two rows, each with its image's placeholders twice."""
    ids = inputs["input_ids"][:2]
    counts = [int(i) for i in (ids == ids[0].mode().values).sum(-1)]
    assert counts == [16, 16]
    found = {}
    for name, value in inputs.items():
        rows = []
        for row, one in zip(ids, value[:2], strict=True):
            places = (row == ids[0].mode().values).nonzero().flatten()
            rows.append(torch.cat((one[: places[0]], one[places], one[places[0] :])))
        found[name] = torch.stack(rows)
    return found


# --- learning -----------------------------------------------------------------------------------------------------


def left_half(rollout) -> torch.Tensor:
    """The share of kept tokens in the left half of the picture."""
    return torch.tensor([float((kept[0] % 4 < 2).float().mean()) for kept in rollout.kept])


def trained(stage, batch, steps: int, rate: float = 3e-3) -> list[dict]:
    optimiser = torch.optim.AdamW(stage.scorer.parameters(), lr=rate)
    seen = []
    for step in range(steps):
        for loss, stats in stage.losses(batch, step / steps, drawn(step)):
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            seen.append({"loss": float(loss.detach()), **stats})
    return seen


@torch.no_grad()
def greedy(stage, batch) -> float:
    k = torch.tensor([4] * len(batch))
    kept = top_k_of_each(batch.for_scorer(True).score(stage.scorer, k), k.tolist())
    return float(torch.stack([(rows % 4 < 2).float().mean() for rows in kept]).mean())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"policy": "conditional_bernoulli"},
        {"policy": "conditional_bernoulli", "credit": "value"},
        {"policy": "conditional_bernoulli", "band": 4, "antithetic": True},
        {"band": 4, "baseline": "self_critical"},
        {"num_iterations": 2, "importance_sampling_level": "token", "antithetic": True, "loss_type": "dr_grpo"},
    ],
)
def test_grpo_learns_what_is_rewarded(engine, batch, monkeypatch, changes):
    stage = grpo(engine, num_generations=8, budgets="fixed", keep_low=0.25, **changes)
    monkeypatch.setattr(stage, "reward", left_half)
    before = greedy(stage, batch)
    seen = trained(stage, batch, 40)
    assert before < 0.8
    assert greedy(stage, batch) > 0.95
    assert sum(s["reward"] for s in seen[-5:]) > sum(s["reward"] for s in seen[:5]) + 1


def test_the_relaxed_baseline_and_the_warm_up_lower_their_losses(engine, batch):
    config = tiny_config(budgets="fixed", keep_low=0.25, tau_start=0.5, tau_end=0.5, reward="log_prob")
    seen = trained(Relaxed(config, tiny_scorer(engine.model), engine), batch, 25)
    assert seen[-1]["loss"] < seen[0]["loss"] - 0.1
    for teacher in ("attention", "pruner:norm"):
        stage = WarmUp(tiny_config(teacher=teacher), tiny_scorer(engine.model), engine)
        seen = trained(stage, batch, 25)
        assert seen[-1]["kl_teacher"] < 0.7 * seen[0]["kl_teacher"]
