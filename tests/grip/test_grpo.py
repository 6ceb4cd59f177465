"""GRPO: its arithmetic against enumeration; that it and distilling learn."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch

from gripvlm.grip.policy import PlackettLuce
from gripvlm.grip.train import Batch
from gripvlm.grip.train.distill import Distill, _divergence
from gripvlm.grip.train.grpo import Draws, Grpo, advantages
from gripvlm.models.encoded import Encoded
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


def test_the_scale_is_that_of_the_whole_step():
    share = torch.tensor([0.5, 0.25, 0.25])
    for scale in ("group", "batch", "budget", "none"):
        whole, useful = advantages(REWARDS, scale, share)
        for row in range(3):
            part = slice(row, row + 1)
            mine, seen = advantages(REWARDS[part], scale, share[part], (REWARDS, share))
            assert torch.equal(mine, whole[part])
            assert torch.equal(seen, useful[part])


def test_a_group_that_hardly_differs_is_one_without_variance():
    rewards = torch.tensor([[0.0, 0.4], [0.5, 0.5004], [0.2, 0.21]])
    found, useful = advantages(rewards, "group")
    assert useful.tolist() == [True, False, True]
    assert not found[1].any()
    assert advantages(rewards[1:2], "group")[1].tolist() == [True]  # where all are like that


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


def draws_of(policy: PlackettLuce, samples: torch.Tensor, owner: tuple[int, ...] = (0,), moved: float = 0) -> Draws:
    """As if `samples` had been drawn by a policy whose steps were `moved` nats less likely."""
    owners = torch.tensor(owner)
    inputs = SimpleNamespace(owner=owners)
    old = policy.step_log_probs(samples).detach() - moved * (samples >= 0)
    total = torch.zeros(max(owner) + 1).index_add(0, owners, policy.k.float())
    return Draws(inputs, policy.k, samples, old, None, total, None, {})


@pytest.mark.parametrize("level", ["sequence", "token"])
def test_a_prompt_of_eight_images_has_the_gradient_of_one(engine, level):
    """Eight images that are alike, and one of them alone: the same sum of gradients over all logits."""
    stage, sizes = grpo(engine, importance_sampling_level=level, num_iterations=2), []
    samples = torch.stack([torch.randperm(16, generator=drawn(g))[:4] for g in range(6)])
    advantage = torch.linspace(-1, 1, 6)[None]
    for images in (1, 8):
        logits = torch.randn(16, generator=drawn()).expand(images, -1).clone().requires_grad_()
        policy = PlackettLuce(logits, 4)
        draws = draws_of(policy, samples.expand(images, -1, -1), (0,) * images)
        stage.surrogate(policy, draws, advantage)[0].sum().backward()
        sizes.append(float(logits.grad.abs().sum()))
    assert sizes[1] / sizes[0] == pytest.approx(1.0, abs=1e-5)
    assert sizes[0] > 0.1


def test_the_ratio_of_a_subset_is_clipped_the_tighter_the_more_tokens_it_has(engine):
    """A quarter of 1.2's logarithm a token lies inside at k = 4, outside at 64; a token's own ratio never is."""
    step = 0.25 * torch.tensor(1.2).log().item()
    for k, level, outside in ((4, "sequence", 0), (64, "sequence", 1), (64, "token", 0)):
        policy = PlackettLuce(torch.zeros(1, 80), k)
        draws = draws_of(policy, policy.sample(3, generator=drawn()), moved=step)
        stage = grpo(engine, num_iterations=2, importance_sampling_level=level)
        loss, moved = stage.surrogate(policy, draws, torch.ones(1, 3))
        assert moved["clipped"] == outside
        limit = 1.2 ** (1 / k**0.5) if level == "sequence" else torch.inf
        assert torch.allclose(-loss, torch.full((1, 3), min(torch.tensor(step).exp().item(), limit)), atol=1e-5)
        assert moved["kl_old"] == pytest.approx(torch.tensor(step).exp().item() - 1 - step, abs=1e-5)


@pytest.mark.parametrize("level", ["sequence", "token"])
def test_a_bad_subset_that_became_likelier_weighs_at_most_the_cap(engine, level):
    logits = torch.zeros(1, 9, requires_grad=True)
    policy = PlackettLuce(logits, 4)
    draws = draws_of(policy, policy.sample(2, generator=drawn()), moved=5.0)
    stage = grpo(engine, num_iterations=2, importance_sampling_level=level, importance_sampling_cap=3.0)
    loss, _ = stage.surrogate(policy, draws, -torch.ones(1, 2))
    assert torch.allclose(loss, torch.full((1, 2), 3.0 ** (0.5 if level == "sequence" else 1.0)))
    loss.sum().backward()
    assert not logits.grad.any()


def test_padded_picks_do_not_count(engine):
    policy = PlackettLuce(torch.zeros(2, 9), torch.tensor([2, 6]))
    samples = policy.sample(2, generator=drawn())
    stage = grpo(engine, num_iterations=2, importance_sampling_level="token")
    loss, moved = stage.surrogate(policy, draws_of(policy, samples, (0, 1), moved=1.0), torch.ones(2, 2))
    assert moved["clipped"] == 1
    assert torch.allclose(loss, torch.full((2, 2), -1.2))


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
            draws = draws_of(policy, EVERY)
            losses, moved = stage.surrogate(policy, draws, reward_of(EVERY[0])[None])
            assert moved == {"clipped": 0, "kl_old": 0}
            (losses * draws.old.sum(-1).exp()).sum().backward()
        else:
            (chances[0] * reward_of(EVERY[0])).sum().backward()
        grads.append(leaf.grad)
    assert torch.allclose(grads[0], -grads[1] / K, atol=1e-5)
    assert grads[1].abs().max() > 0.1


def test_each_group_is_scaled_with_its_own_budget(engine, batch, monkeypatch):
    asked = {}

    def spy(rewards, scale, share, pool):
        asked.update(scale=scale, share=share)
        return advantages(rewards, scale, share, pool)

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


def doubled(batch) -> Batch:
    """Two questions, each about its picture twice."""
    images = tuple((a[0], a[0]) for a in batch.encoded.samples[:2])
    return Batch(
        batch.tasks[:2],
        batch.samples[:2],
        batch.answers[:2],
        twice(batch.prompts),
        twice(batch.inputs),
        Encoded(batch.encoded.model_type, images, batch.encoded.outputs),
        [[tokens[0], tokens[0]] for tokens in batch.tokens[:2]],
    )


def test_two_images_a_question_share_reward_and_budget(engine, batch, monkeypatch):
    stage, double = grpo(engine, budgets="choices", keep_choices="0.25"), doubled(batch)
    rollouts = spied(stage, monkeypatch)
    loss, _ = losses(stage, double)[0]
    loss.backward()
    assert double.for_scorer(True).owner.tolist() == [0, 0, 1, 1]
    assert [[len(k) for k in kept] for kept in rollouts[0].subsets] == [[4, 4]] * 8
    assert any(kept[0].tolist() != kept[1].tolist() for kept in rollouts[0].subsets)
    assert stage.scorer.score.weight.grad.abs().sum() > 0


def test_a_joint_policy_moves_the_budget_between_the_images_of_a_question(engine, batch, monkeypatch):
    config = tiny_config(budgets="choices", keep_choices="0.25", num_iterations=2)
    stage = Grpo(config, tiny_scorer(engine.model, joint=True, rounds=2), engine)
    rollouts = spied(stage, monkeypatch)
    found = losses(stage, doubled(batch))
    found[0][0].backward()
    counts = [[len(k) for k in kept] for kept in rollouts[0].subsets]
    assert [sum(each) for each in counts] == [8] * 8
    assert any(first != second for first, second in counts)
    assert stage.scorer.diversity.penalty.weight.grad.abs().sum() > 0
    assert stage.scorer.image.weight.grad.abs().sum() > 0
    assert found[0][1]["kl_old"] == pytest.approx(0, abs=1e-6)


def test_micro_batches_of_a_step_have_one_scale(engine, batch):
    """Two halves of a batch, explored before the first loss, have the loss of the whole together."""
    stage = grpo(engine, gradient_accumulation_steps=2, scale_rewards="batch")
    halves = [engine.prepare(list(zip(batch.tasks, batch.samples, strict=True))[i : i + 2]) for i in (0, 2)]
    explored = [stage.explore(half, drawn(i)) for i, half in enumerate(halves)]
    kept = [stage._drawn[half] for half in halves]
    stage.pool(explored)
    weights, wholes = [], torch.cat([draws.rewards for draws in kept])
    shares = torch.cat([draws.share for draws in kept])
    whole, useful = advantages(wholes, "batch", shares)
    expected = -(whole.mean(-1) * useful).sum() / useful.sum()  # all ratios are 1
    for half in halves:
        (loss, _), *_ = list(stage.losses(half, 0.0, drawn()))
        weights.append(float(loss.detach()) / 2)
    assert not stage._drawn
    assert sum(weights) == pytest.approx(float(expected), abs=1e-5)
    assert explored[0][0].shape == (2, 4)


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
    kept, _ = batch.for_scorer(True, stage.scorer.config.joint).choose(stage.scorer, [4] * len(batch))
    return float(torch.stack([(rows % 4 < 2).float().mean() for rows in kept]).mean())


@pytest.mark.parametrize(
    ("changes", "scorer"),
    [
        ({}, {}),
        ({"num_iterations": 2, "epsilon": 0.5}, {}),
        ({"num_iterations": 2, "importance_sampling_level": "token"}, {}),
        ({}, {"joint": True, "rounds": 2}),
    ],
)
def test_grpo_learns_what_is_rewarded(engine, batch, monkeypatch, changes, scorer):
    config = tiny_config(num_generations=8, budgets="choices", keep_choices="0.25", **changes)
    stage = Grpo(config, tiny_scorer(engine.model, **scorer), engine)
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


def repeats(rollout) -> torch.Tensor:
    """Minus the share of kept tokens that are like another kept one: patches i and i + 8 are taken for alike."""
    return torch.tensor([float(len({int(i) % 8 for i in kept[0]})) / len(kept[0]) for kept in rollout.subsets])


def test_several_rounds_learn_not_to_keep_the_same_twice(engine, batch, monkeypatch):
    """The patch below is as good, but not both: the first round's logits cannot say so."""
    config = tiny_config(num_generations=8, budgets="choices", keep_choices="0.5")
    stage = Grpo(config, tiny_scorer(engine.model, rounds=4), engine)
    monkeypatch.setattr(stage, "reward", repeats)
    seen = trained(stage, batch, 40, 1e-2)
    assert sum(s["reward"] for s in seen[-5:]) > sum(s["reward"] for s in seen[:5]) + 0.3


def test_distilling_a_joint_scorer_weighs_all_images_of_a_question_together(engine, batch):
    """Its teacher says which image matters: the sums of each image's weights are not made alike."""
    scorer, double = tiny_scorer(engine.model, joint=True), doubled(batch)
    asked = []

    def teacher(engine, batch, counts, random):
        asked.append(counts.tolist())
        return [torch.ones(16) * weight for weight in (3.0, 1.0, 1.0, 0.0)]

    stage = Distill(tiny_config(budgets="choices", keep_choices="0.25"), scorer, engine)
    stage.teacher = teacher
    loss, _ = next(stage.losses(double, 0.0, drawn()))
    inputs = double.for_scorer(True, joint=True)
    log_probs = inputs.score(scorer, torch.tensor([8, 8])).log_softmax(-1)
    targets = torch.tensor([[3.0] * 16 + [1.0] * 16, [1.0] * 16 + [0.0] * 16])
    targets = targets / targets.sum(-1, keepdim=True)
    expected = torch.nn.functional.kl_div(log_probs, targets, reduction="batchmean")
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), abs=1e-5)
    assert asked == [[4, 4, 4, 4]]


def test_what_a_teacher_says_nothing_about_is_left_out():
    logits = torch.randn(2, 5, generator=drawn())
    weights = torch.tensor([[1.0, -1.0, 3.0, 0.0, -1.0], [2.0, 2.0, 2.0, -1.0, -1.0]])
    valid = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]).bool()
    found = _divergence(weights, logits, valid)
    for row, asked, target in ((0, [0, 2, 3], [0.25, 0.75, 0.0]), (1, [0, 1, 2], [1 / 3] * 3)):
        by_hand = torch.nn.functional.kl_div(logits[row, asked].log_softmax(0), torch.tensor(target), reduction="sum")
        assert float(found[row]) == pytest.approx(float(by_hand), abs=1e-5)
