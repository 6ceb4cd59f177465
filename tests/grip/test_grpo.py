"""GRPO: its arithmetic against enumeration; that it and distilling learn."""

from __future__ import annotations

import itertools

import pytest
import torch

from gripvlm.grip.policy import PlackettLuce
from gripvlm.grip.train import Batch
from gripvlm.grip.train.distill import Distill
from gripvlm.grip.train.grpo import Grpo, advantages
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


EVERY = torch.tensor([list(itertools.permutations(range(N), K))])
"""[1, 20, 2] all outcomes of the policy."""


def test_the_surrogates_expected_gradient_is_that_of_the_reward(engine):
    stage = grpo(engine)
    logits = torch.randn(N, generator=drawn())
    grads = []
    for surrogate in (True, False):
        leaf = logits.clone().requires_grad_()
        policy = PlackettLuce(leaf[None], torch.tensor([K]))
        chances = policy.log_prob(EVERY).exp()
        assert float(chances.detach().sum()) == pytest.approx(1, abs=1e-5)
        if surrogate:
            old = policy.log_prob(EVERY).detach()
            losses, clipped = stage.surrogate(policy, EVERY, old, reward_of(EVERY[0])[None])
            assert clipped == 0
            (losses * old.exp()).sum().backward()
        else:
            (chances[0] * reward_of(EVERY[0])).sum().backward()
        grads.append(leaf.grad)
    assert torch.allclose(grads[0], -grads[1] / K, atol=1e-5)
    assert grads[1].abs().max() > 0.1


def test_each_group_is_scaled_with_its_own_budget(engine, batch, monkeypatch):
    asked = {}

    def spy(rewards, scale, share=None):
        asked.update(scale=scale, share=share)
        return advantages(rewards, scale, share)

    monkeypatch.setattr("gripvlm.grip.train.grpo.advantages", spy)
    stage = grpo(engine, scale_rewards="budget", budgets="choices", keep_choices="0.125,0.5")
    rollouts = spied(stage, monkeypatch)
    losses(stage, batch)
    kept = [len(rollouts[0].subsets[row][0]) / 16 for row in range(0, 16, 4)]
    assert asked["scale"] == "budget"
    assert {*kept} == {0.125, 0.5}
    assert asked["share"].tolist() == kept


def losses(stage: Grpo, batch, seed: int = 0):
    return list(stage.losses(batch, 0.0, drawn(seed)))


def spied(stage: Grpo, monkeypatch) -> list:
    """Rollouts as they are made."""
    rollouts, run = [], stage.engine.run

    def spy(*args, **options):
        rollouts.append(run(*args, **options))
        return rollouts[-1]

    monkeypatch.setattr(stage.engine, "run", spy)
    return rollouts


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
    assert "clip_ratio" not in first  # nothing has moved yet
    assert second["clip_ratio"] > 0.5


def test_divergence_and_entropy_enter_the_loss(engine, batch):
    plain, _ = losses(grpo(engine), batch)[0]
    stage = grpo(engine, beta=0.5)
    loss, stats = losses(stage, batch)[0]
    assert stats["kl"] == pytest.approx(0, abs=1e-5)
    with torch.no_grad():
        stage.scorer.score.weight *= 2
    bare = grpo(engine)
    bare.scorer.load_state_dict(stage.scorer.state_dict())
    loss, stats = losses(stage, batch)[0]
    assert stats["kl"] > 1e-3
    assert float((loss - losses(bare, batch)[0][0]).detach()) == pytest.approx(0.5 * stats["kl"], rel=1e-3)
    spread, stats = losses(grpo(engine, entropy_coef=0.5), batch)[0]
    assert float((plain - spread).detach()) == pytest.approx(0.5 * stats["entropy"], rel=1e-3)
    assert not any(p.requires_grad for p in stage.modules()["reference"].parameters())


def test_groups_without_variance_teach_nothing_and_are_counted(engine, batch):
    stage = grpo(engine)
    stage.reward = lambda r: torch.tensor([float(s.id == "1-0") for s in r.samples]) * r.log_probs.sum(-1)
    loss, stats = losses(stage, batch)[0]
    assert stats["frac_reward_zero_std"] == 0.75
    loss.backward()
    assert stage.scorer.score.weight.grad.abs().sum() > 0
    stage.reward = lambda r: torch.ones(len(r.samples))
    stage.scorer.zero_grad()
    loss, stats = losses(stage, batch)[0]
    loss.backward()
    assert stats["frac_reward_zero_std"] == 1
    assert stage.scorer.score.weight.grad.abs().max() == 0


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
    stage = grpo(engine, budgets="choices", keep_choices="0.25")
    rollouts = spied(stage, monkeypatch)
    loss, _ = losses(stage, double)[0]
    loss.backward()
    assert double.for_scorer(True).owner.tolist() == [0, 0, 1, 1]
    assert [[len(k) for k in kept] for kept in rollouts[0].subsets] == [[4, 4]] * 8
    assert any(kept[0].tolist() != kept[1].tolist() for kept in rollouts[0].subsets)
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
    return torch.tensor([float((kept[0] % 4 < 2).float().mean()) for kept in rollout.subsets])


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


@pytest.mark.parametrize("changes", [{}, {"num_iterations": 2}])
def test_grpo_learns_what_is_rewarded(engine, batch, monkeypatch, changes):
    stage = grpo(engine, num_generations=8, budgets="choices", keep_choices="0.25", **changes)
    monkeypatch.setattr(stage, "reward", left_half)
    before = greedy(stage, batch)
    seen = trained(stage, batch, 40)
    assert before < 0.8
    assert greedy(stage, batch) > 0.95
    assert sum(s["reward"] for s in seen[-5:]) > sum(s["reward"] for s in seen[:5]) + 1


def test_distilling_lowers_its_loss(engine, batch):
    stage = Distill(tiny_config(teacher="attention"), tiny_scorer(engine.model), engine)
    seen = trained(stage, batch, 25)
    assert seen[-1]["kl_teacher"] < 0.7 * seen[0]["kl_teacher"]
