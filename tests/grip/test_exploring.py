"""experiments/grip_claim/exploring: each idea draws and weighs what it says, and the control variate has no bias."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gripvlm.errors import Interrupted, TrainError
from gripvlm.grip.policy import PlackettLuce
from gripvlm.grip.train.grpo import Draws
from places import ROOT
from tiny_train import asked, drawn, stopping, tiny_config, tiny_scorer, tiny_vlm

sys.path.insert(0, str(ROOT))
from experiments.grip_claim.exploring.config import ExploringConfig
from experiments.grip_claim.exploring.stage import Exploring
from experiments.training import train_stage


def exploring_config(**changes: Any) -> ExploringConfig:
    own = {name: changes.pop(name) for name in set(changes) & set(ExploringConfig.__annotations__)}
    return ExploringConfig(**tiny_config(**changes).to_dict() | {"stage": "exploring"} | own)


def stage_of(engine, **changes: Any) -> Exploring:
    return Exploring(exploring_config(**changes), tiny_scorer(engine.model), engine)


def explored(stage: Exploring, batch, seed: int = 0) -> tuple[Draws, int]:
    """The draws for a batch, and how many rollouts they took."""
    before = stage.engine.rollouts
    return stage._draw(batch, drawn(seed)), stage.engine.rollouts - before


def test_probes_decide_who_gets_the_rest(engine, batch):
    draws, rollouts = explored(stage_of(engine, probes=3, num_generations=7), batch)
    assert rollouts == 4 * 3 + 2 * 4
    there = draws.weights > 0
    assert draws.weights.sum(-1).tolist() == pytest.approx([7.0] * 4)
    assert sorted(there.sum(-1).tolist()) == [3, 3, 7, 7]
    spread = draws.rewards[:, :3].std(-1)
    assert set(spread.topk(2).indices.tolist()) == set(there.all(-1).nonzero().flatten().tolist())
    for row in (~there.all(-1)).nonzero().flatten().tolist():
        assert torch.allclose(draws.rewards[row, 3:], draws.rewards[row, :3].mean().expand(4))


def one_sided(rollout):
    """1 for the first question, 0 for the second, the answer's log-probability for the others."""
    values = rollout.log_probs.sum(-1)
    question = torch.tensor(rollout.rows)
    return torch.where(question == 0, 1.0, torch.where(question == 1, 0.0, values))


def test_budgets_move_until_rewards_differ(engine, batch):
    told = {"budgets": "choices", "keep_choices": "0.25", "flat": 1e-7}
    still, rollouts = explored(stage_of(engine, **told), batch)
    assert (still.counts.tolist(), rollouts) == ([4] * 4, 16)
    stage = stage_of(engine, budget_moves=2, **told)
    stage.reward = one_sided
    moved, rollouts = explored(stage, batch)
    assert moved.counts.tolist() == [1, 16, 4, 4]
    assert rollouts == 16 + 2 * 2 * 4
    assert (moved.samples >= 0).sum(-1)[:, 0].tolist() == [1, 16, 4, 4]
    assert torch.equal(moved.samples[2:, :, :4], still.samples[2:])
    again = stage.rewards(batch, moved.inputs, moved.samples)[0]
    assert torch.allclose(again, moved.rewards, atol=1e-5)  # each is of its own set


def test_the_greedy_set_is_in_the_mean_alone(engine, batch):
    stage = stage_of(engine, greedy=True, num_generations=4, scale_rewards="none")
    draws, rollouts = explored(stage, batch)
    assert rollouts == 16
    policy = stage.policy(stage.scorer, draws.inputs, draws.counts)
    assert torch.equal(draws.samples[:, 0], policy.mode())
    assert draws.weights.tolist() == [[0.0, *[pytest.approx(4 / 3)] * 3]] * 4


def test_a_guess_of_the_advantage_takes_variance_and_no_mean(engine):
    """Over many groups the gradient with a guess, less the one without, is 0 within four standard errors."""
    features, logits = torch.randn(1, 5, 32, generator=drawn()), torch.randn(1, 5, generator=drawn(1))
    worth = torch.tensor([0.3, -1.0, 2.0, 0.7, 1.1])
    stage = stage_of(engine, virtual_draws=3, num_generations=4)
    with torch.no_grad():
        torch.nn.init.normal_(stage.value.leave.weight, std=10.0)
    inputs = SimpleNamespace(
        features=features, question=None, question_mask=None, owner=torch.zeros(1, dtype=torch.long)
    )
    gaps, random = [], drawn(2)
    for _ in range(150):
        found = []
        samples = PlackettLuce(logits, 2).sample(4, generator=random)
        rewards = worth[samples].sum(-1)
        for guess in (stage.value, None):
            leaf = logits.clone().requires_grad_()
            policy = PlackettLuce(leaf, 2)
            old = policy.step_log_probs(samples).detach()
            draws = Draws(inputs, policy.k, samples, old, rewards, torch.tensor([2.0]), None, {})
            stage.value, kept = guess, stage.value
            stage._random[draws] = random
            loss, _ = stage.surrogate(policy, draws, rewards - rewards.mean())
            stage.value = kept
            loss.mean(-1).sum().backward()
            found.append(leaf.grad[0])
        gaps.append(found[0] - found[1])
    gap = torch.stack(gaps)
    error = gap.std(0) / len(gap) ** 0.5
    assert (gap.mean(0).abs() < 4 * error).all()
    assert error.max() > 1e-3  # it did something


def test_all_at_once_is_trained_and_resumed(tmp_path, monkeypatch):
    model, processor = tiny_vlm()
    ideas = {"greedy": True, "probes": 3, "budget_moves": 1, "virtual_draws": 4, "num_generations": 5, "max_steps": 3}
    ends = []
    for name in ("whole", "stopped"):
        config = exploring_config(output_dir=str(tmp_path / name), num_iterations=2, **ideas)
        if name == "stopped":
            with monkeypatch.context() as patch:
                stopping(patch, 2)
                with pytest.raises(Interrupted):
                    train_stage(config, Exploring, model, processor, asked(8))
        ends.append(train_stage(config, Exploring, model, processor, asked(8)).digest())
    assert ends[0] == ends[1]
    assert '"explained"' in (tmp_path / "whole" / "metrics.jsonl").read_text()


def test_settings_that_leave_no_draws_are_refused():
    for wrong, said in (
        ({"probes": 4}, "fewer than num_generations = 4"),
        ({"probes": 1}, "use 2 or more"),
        ({"virtual_draws": 1}, "virtual_draws = 1: use 2 or more"),
        ({"greedy": True, "probes": 2}, "use 3 probes or"),
    ):
        with pytest.raises(TrainError, match=said):
            exploring_config(**wrong)
