"""experiments/grip_ablation/relaxations: the arithmetic of each opponent of GRPO, and that each trains by name."""

from __future__ import annotations

import itertools
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gripvlm
from gripvlm.errors import TrainError, UnsupportedModelError
from gripvlm.grip.policy import PlackettLuce
from gripvlm.grip.train.rewards import get_reward
from gripvlm.grip.train.visionselector import ranking, soft_top_k, threshold
from places import ROOT
from tiny_train import asked, drawn, engine_of, pairs, tiny_config, tiny_scorer, tiny_vlm

sys.path.insert(0, str(ROOT))
from experiments.grip_ablation.relaxations.__main__ import stage_of
from experiments.grip_ablation.relaxations.conditional_bernoulli import ConditionalBernoulli
from experiments.grip_ablation.relaxations.config import RELAXATIONS, RelaxedConfig
from experiments.grip_ablation.relaxations.diffprune import EDGE, Denoiser, DiffPrune, noised, with_features
from experiments.grip_ablation.relaxations.dynamicvit import DynamicViT, decisions
from experiments.grip_ablation.relaxations.masks import (
    Relaxed,
    binarity,
    perturbed_top_k,
    simple_top_k,
    straight_through_top_k,
)
from experiments.training import main, train_stage

EVERYTHING = [[torch.arange(16)]] * 4


def relaxed_config(**changes: Any) -> RelaxedConfig:
    """A run of seconds."""
    own = {name: changes.pop(name) for name in set(changes) & set(RelaxedConfig.__annotations__)}
    return RelaxedConfig(**tiny_config(**changes).to_dict() | {"stage": "relaxed", "rounds": 1} | own)


# --- relaxed top k ------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_soft_mask_sums_to_k_and_is_nothing_at_padding(data):
    n = data.draw(st.integers(1, 40))
    sizes = data.draw(st.lists(st.integers(1, n), min_size=1, max_size=3))
    k = torch.tensor([data.draw(st.integers(1, size)) for size in sizes])
    tau = data.draw(st.sampled_from([0.02, 0.1, 1.0, 5.0]))
    scale = data.draw(st.sampled_from([0.0, 1.0, 30.0]))
    scores = scale * torch.randn(len(sizes), n, generator=drawn(n))
    scores[torch.arange(n) >= torch.tensor(sizes)[:, None]] = -torch.inf
    mask = soft_top_k(scores, k, tau)
    assert torch.allclose(mask.sum(-1), k.float(), atol=2e-3)
    assert (mask[scores == -torch.inf] == 0).all()
    assert ((mask >= 0) & (mask <= 1)).all()
    order = scores.argsort(-1, descending=True)
    assert (mask.gather(-1, order).diff() <= 1e-6).all()


def test_the_gradient_of_the_soft_mask_is_exact():
    scores = torch.randn(2, 7, dtype=torch.float64, generator=drawn(), requires_grad=True)
    k = torch.tensor([2, 5])
    assert torch.autograd.gradcheck(lambda s: soft_top_k(s, k, 0.7), scores)
    padded = torch.cat((scores.detach(), torch.full((2, 1), -torch.inf, dtype=torch.float64)), 1).requires_grad_()
    (soft_top_k(padded, k, 0.7) * torch.arange(8.0)).sum().backward()
    assert padded.grad.isfinite().all()
    assert (padded.grad[:, -1] == 0).all()
    assert float(padded.grad.sum(-1).abs().max()) < 1e-9  # moving all scores moves nothing


def test_a_cold_soft_mask_is_the_hard_top_k():
    scores = torch.randn(5, 30, generator=drawn())
    k = torch.tensor([1, 7, 15, 29, 30])
    hard = torch.zeros_like(scores)
    for row, count in enumerate(k.tolist()):
        hard[row, scores[row].topk(count).indices] = 1
    assert torch.allclose(soft_top_k(scores, k, 1e-5), hard, atol=1e-3)
    noise = torch.randn(5, 30, generator=drawn(1))
    straight = straight_through_top_k(scores, k, 1.0, noise)
    assert torch.equal(straight, (soft_top_k(scores + noise, k, 1e-6) > 0.5).float())


def test_straight_through_has_the_soft_gradient():
    k, weight = torch.tensor([2, 3]), torch.randn(2, 6, generator=drawn(2))
    noise = torch.randn(2, 6, generator=drawn(1))
    grads = []
    for function in (lambda s: straight_through_top_k(s, k, 0.5, noise), lambda s: soft_top_k(s + noise, k, 0.5)):
        scores = torch.randn(2, 6, generator=drawn()).requires_grad_()
        (function(scores) * weight).sum().backward()
        grads.append(scores.grad)
    assert torch.allclose(grads[0], grads[1], atol=1e-6)
    assert grads[0].abs().max() > 0.01


def test_the_perturbed_mask_sums_to_k_and_its_gradient_is_that_of_the_smoothed_objective():
    scores, k, sigma = torch.randn(1, 6, generator=drawn(5)), torch.tensor([2]), 0.5
    weight = torch.tensor([[1.0, -2.0, 0.5, 3.0, 0.0, -1.0]])
    noise = torch.randn(100_000, 1, 6, generator=drawn(3))
    leaf = scores.clone().requires_grad_()
    mask = perturbed_top_k(leaf, k, sigma, noise)
    assert float(mask.detach().sum()) == pytest.approx(2, abs=1e-3)
    (mask * weight).sum().backward()
    for i in range(6):
        step = torch.zeros(1, 6)
        step[0, i] = 0.1
        ends = [
            float((perturbed_top_k(scores + sign * step, k, sigma, noise) * weight).sum()) for sign in (1, -1)
        ]  # the same noise at both ends
        assert float(leaf.grad[0, i]) == pytest.approx((ends[0] - ends[1]) / 0.2, abs=0.04)
    assert leaf.grad.abs().max() > 0.5
    padded = torch.cat((scores, torch.full((1, 1), -torch.inf)), 1)
    assert perturbed_top_k(padded, k, sigma, torch.randn(50, 1, 7, generator=drawn()))[0, -1] == 0


# --- gradients against enumeration --------------------------------------------------------------------------------

WORTH = torch.tensor([0.3, -1.0, 2.0, 0.7, 1.1, -0.4], dtype=torch.float64)
SETS = torch.tensor(list(itertools.combinations(range(6), 2)))


def slopes(expected, scores):
    """The gradient in the scores [1, 6] of a number."""
    leaf = scores.clone().requires_grad_()
    return torch.autograd.grad(expected(leaf), leaf)[0]


def cosine(one, other):
    return float(torch.nn.functional.cosine_similarity(one.flatten(), other.flatten(), dim=0))


def under_the_law(worth):
    """The mean of worth(set) over all sets of 2 of 6, under conditional Bernoulli scores."""

    def expected(scores):
        log_probs = ConditionalBernoulli(scores, 2).log_prob(SETS[None])[0]
        return (log_probs.exp() * torch.stack([worth(chosen) for chosen in SETS])).sum()

    return expected


def test_simple_samples_the_exact_law_and_has_the_gradient_of_its_marginals():
    scores, k = torch.randn(1, 6, dtype=torch.float64, generator=drawn()), torch.tensor([2])
    valid = torch.ones(1, 6, dtype=torch.bool)
    leaf = scores.clone().requires_grad_()
    mask = simple_top_k(leaf, k, valid, drawn(1))
    assert sorted(mask[0].tolist()) == [0, 0, 0, 0, 1, 1]
    # For a worth that is a sum over tokens one sample's gradient is the exact one.
    exact = slopes(under_the_law(lambda chosen: WORTH[chosen].sum()), scores)
    assert torch.allclose(torch.autograd.grad((mask * WORTH).sum(), leaf)[0], exact, atol=1e-9)
    assert exact.abs().max() > 0.1
    many = simple_top_k(scores.expand(4000, -1), k.expand(4000), valid.expand(4000, -1), drawn(2))
    assert torch.allclose(many.mean(0), ConditionalBernoulli(scores, 2).inclusion()[0], atol=0.03)
    # For one that is not, it has a bias: the mean over samples points only roughly where the exact gradient points.
    leaf = scores.expand(4000, -1).clone().requires_grad_()
    worth = (simple_top_k(leaf, k.expand(4000), valid.expand(4000, -1), drawn(3)) * WORTH).sum(-1)
    found = torch.autograd.grad((worth**2).sum(), leaf)[0].mean(0)
    assert 0.5 < cosine(found, slopes(under_the_law(lambda chosen: WORTH[chosen].sum() ** 2), scores)) < 0.95


def test_straight_through_points_where_the_exact_gradient_does():
    """Noise of the temperature's size: the forward sample is of Plackett and Luce."""
    scores, k = torch.randn(1, 6, dtype=torch.float64, generator=drawn(4)), torch.tensor([2])
    orders = torch.tensor(list(itertools.permutations(range(6), 2)))[None]

    def expected(leaf):
        return (PlackettLuce(leaf, 2).log_prob(orders).exp() * WORTH[orders].sum(-1)).sum()

    noise = -torch.empty(4000, 6, dtype=torch.float64).exponential_(generator=drawn(5)).log()
    leaf = scores.expand(4000, -1).clone().requires_grad_()
    (straight_through_top_k(leaf, k.expand(4000), 1.0, noise) * WORTH).sum().backward()
    assert cosine(leaf.grad.mean(0), slopes(expected, scores)) > 0.97


def test_dynamicvit_points_where_the_exact_gradient_does():
    """Independent decisions of which two are taken on average; the level moves with the scores."""
    scores, k = torch.randn(1, 6, dtype=torch.float64, generator=drawn(6)), torch.tensor([2.0])
    exact = slopes(lambda leaf: (torch.sigmoid(leaf - threshold(leaf, k, 1.0)[:, None]) * WORTH).sum(), scores)
    noise = torch.rand(4000, 6, dtype=torch.float64, generator=drawn(7)).logit()
    leaf = scores.expand(4000, -1).clone().requires_grad_()
    odds = leaf - threshold(leaf, k.expand(4000), 1.0)[:, None]
    mask = decisions(odds, 1.0, noise)
    assert float(mask.detach().sum(-1).mean()) == pytest.approx(2, abs=0.05)
    (mask * WORTH).sum().backward()
    assert cosine(leaf.grad.mean(0), exact) > 0.97


def test_the_perturbed_gradient_at_the_default_is_mostly_signal():
    scores, weight = (torch.randn(1, 256, generator=drawn(seed)) for seed in (0, 1))

    def found(samples, seed):
        leaf, noise = scores.clone().requires_grad_(), torch.randn(samples, 1, 256, generator=drawn(seed))
        (perturbed_top_k(leaf, torch.tensor([16]), 1.0, noise) * weight).sum().backward()
        return leaf.grad

    exact = found(20_000, 2)
    default = RelaxedConfig.__dataclass_fields__["noise_samples"].default
    assert cosine(found(default, 3), exact) > 0.6
    assert cosine(found(4, 3), exact) < 0.3


def test_binarity_by_hand():
    mask = torch.tensor([[0.5, 0.5, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
    assert float(binarity(mask, torch.tensor([2, 1]))) == pytest.approx((0.5 / 2 + 0) / 2)


def test_a_dropped_tokens_slope_is_of_the_size_of_what_it_brings():
    """Slopes of dropped tokens over the changes when each is added, summed; attention is sharp, as after training."""
    model, processor = tiny_vlm()
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            layer.self_attn.q_proj.weight *= 6
    engine, kept = engine_of(model, processor), torch.arange(16) < 8
    batch = engine.prepare(pairs(asked(2, each=2)))
    before = engine.run(batch, range(4), [[torch.arange(8)]] * 4).log_probs.sum(-1) / batch.answer_lengths
    rows = [question for question in range(4) for _ in range(8)]
    subsets = [[torch.tensor([*range(8), token])] for _ in range(4) for token in range(8, 16)]
    after = engine.run(batch, rows, subsets).log_probs.sum(-1) / batch.answer_lengths[rows]
    brought = float((after - before[rows]).abs().sum())

    def promised(floor):
        stage = Relaxed(relaxed_config(floor=floor, reward_funcs="log_prob"), tiny_scorer(model), engine)
        mask = kept.float().expand(4, -1).clone().requires_grad_()
        stage.masked_reward(batch, batch.for_scorer(True), mask).sum().backward()
        return float(mask.grad[:, ~kept].abs().sum())

    assert 0.5 < promised(RelaxedConfig.__dataclass_fields__["floor"].default) / brought < 4
    assert promised(1e-4) / brought > 100  # the fault of the first comparison


@pytest.mark.parametrize("relaxation", ["soft_topk", "straight_through", "perturbed", "simple"])
def test_each_relaxation_gives_the_scorer_a_gradient(engine, batch, relaxation):
    scorer = tiny_scorer(engine.model)
    stage = Relaxed(relaxed_config(relaxation=relaxation, tau_start=2.0, tau_end=0.5), scorer, engine)
    ((cold, told),) = stage.losses(batch, 1.0, drawn())
    ((loss, stats),) = stage.losses(batch, 0.0, drawn())
    assert (stats["tau"], told["tau"]) == (2.0, 2.0 if relaxation == "perturbed" else 0.5)
    assert float(loss.detach()) == pytest.approx(-stats["reward"])
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in scorer.parameters())
    assert scorer.score.weight.grad.abs().sum() > 0
    assert not any(p.requires_grad for p in engine.model.parameters())
    if relaxation in ("straight_through", "simple"):
        assert stats["hardness"] == pytest.approx(1.0)
    if relaxation == "soft_topk":
        assert told["hardness"] > stats["hardness"]
    assert cold.isfinite()


@pytest.mark.parametrize("reward", ["log_prob", "probability"])
def test_a_hard_straight_through_mask_is_worth_what_dropping_is(engine, batch, reward):
    """The loss at the floor's small leak equals the reward of the subsets that the mask keeps."""
    scorer = tiny_scorer(engine.model)
    cold = {"tau_start": 1e-4, "tau_end": 1e-4, "reward_funcs": reward, "floor": 1e-4}
    config = relaxed_config(relaxation="straight_through", budgets="choices", keep_choices="0.25", **cold)
    ((loss, _),) = Relaxed(config, scorer, engine).losses(batch, 0.0, drawn())
    inputs = batch.for_scorer(True)
    top = inputs.score(scorer, torch.tensor([4] * 4)).topk(4).indices.sort().values
    seen = engine.run(batch, range(4), [[row] for row in top])
    worth = float(get_reward(reward)(seen).mean())
    assert float(loss.detach()) == pytest.approx(-worth, rel=5e-3)


def test_a_reward_without_a_gradient_is_refused():
    with pytest.raises(TrainError, match="'agreement' has no gradient: use probability"):
        relaxed_config(reward_funcs="agreement")


# --- DynamicViT ---------------------------------------------------------------------------------------------------


def test_decisions_are_hard_keep_with_the_sigmoid_and_follow_its_gradient():
    scores = torch.tensor([[-2.0, 0.0, 1.5, -torch.inf]])
    noise = torch.rand(20_000, 1, 4, generator=drawn(), dtype=torch.float64).logit().float()
    found = decisions(scores, 1.0, noise)
    assert set(found.unique().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(found.mean(0), torch.sigmoid(scores), atol=0.01, rtol=0)
    assert float(found[..., 3].max()) == 0.0
    leaf = scores.clone().requires_grad_()
    (decisions(leaf, 0.5, noise[0]) * torch.tensor([1.0, -2.0, 3.0, 4.0])).sum().backward()
    soft = torch.sigmoid((scores + noise[0]) / 0.5)
    expected = soft * (1 - soft) / 0.5 * torch.tensor([1.0, -2.0, 3.0, 4.0])
    torch.testing.assert_close(leaf.grad, expected)
    assert leaf.grad.abs()[0, :3].min() > 1e-3


def test_dynamicvit_keeps_k_on_average_whatever_the_level_of_the_scores(engine, batch):
    scorer = tiny_scorer(engine.model)
    with torch.no_grad():
        scorer.score.bias.fill_(60.0)  # as sigmoids alone they would keep everything
    config = relaxed_config(relaxation="dynamicvit", budgets="choices", keep_choices="0.25")
    kept = []
    for step in range(20):
        ((loss, stats),) = DynamicViT(config, scorer, engine).losses(batch, 0.0, drawn(step))
        kept.append(stats["kept"])
        assert float(loss.detach()) == pytest.approx(-stats["reward"])
    assert sum(kept) / len(kept) == pytest.approx(1.0, abs=0.1)  # 320 tokens are kept: standard error 0.05
    assert min(kept) < 1 < max(kept)


# --- DiffPrune ----------------------------------------------------------------------------------------------------


def test_noise_takes_the_share_that_it_is_told_and_keeps_the_size():
    rows = 5 * torch.randn(4000, 8, generator=drawn())
    noise = torch.randn(4000, 8, generator=drawn(1))
    for share in (1.0, 0.64, 0.0):
        found = noised(rows, torch.full((4000,), share), noise)
        by_hand = share**0.5 * rows + (1 - share) ** 0.5 * rows.square().mean() ** 0.5 * noise
        torch.testing.assert_close(found, by_hand)
        assert float(found.square().mean()) == pytest.approx(float(rows.square().mean()), rel=0.03)


def test_the_denoiser_sees_one_row_at_a_time_and_begins_as_nothing():
    torch.manual_seed(0)
    denoiser = Denoiser(8, 12)
    rows, share = torch.randn(5, 8, generator=drawn()), torch.rand(5, generator=drawn(1)).clamp(EDGE, 1 - EDGE)
    assert torch.equal(denoiser(rows, share), rows)
    torch.nn.init.normal_(denoiser.leave.weight)
    before = denoiser(rows, share)
    assert (before - rows).abs().min(-1).values.max() > 0.01
    moved = rows.clone()
    moved[2] += 1
    changed = (denoiser(moved, share) != before).any(-1)
    assert changed.tolist() == [False, False, True, False, False]
    assert bool((denoiser(rows, share.flip(0)) != before).any())  # it is told the share


def test_the_same_rows_are_the_plain_forward_and_others_are_not(engine, batch):
    features = [tokens.features for sample in batch.tokens for tokens in sample]
    same = with_features(batch, features)
    plain = engine.run(batch, range(4), EVERYTHING)
    found = engine.forced_log_probs(same, engine.whole(same))
    assert torch.allclose(found, plain.log_probs, atol=1e-4)
    other = with_features(batch, [features[0] + 1, *features[1:]])  # the second question is about the same picture
    moved = engine.forced_log_probs(other, engine.whole(other)) - found
    assert moved[0].abs().max() > 1e-3
    assert moved[1:].abs().max() < 1e-5


def test_the_gradient_of_the_shares_is_the_finite_difference(engine, batch):
    features = [tokens.features for sample in batch.tokens for tokens in sample]
    noise = torch.randn(16, features[0].shape[1], generator=drawn(2))

    def value(share: torch.Tensor) -> torch.Tensor:
        rows = [noised(features[0], share, noise), *features[1:]]
        noisy = with_features(batch, rows)
        return engine.forced_log_probs(noisy, engine.whole(noisy)).sum()

    share = torch.rand(16, generator=drawn(3)).mul(0.8).add(0.1).requires_grad_()
    value(share).backward()
    for token in share.grad.abs().topk(3).indices.tolist():
        ends = []
        for sign in (1, -1):
            moved = share.detach().clone()
            moved[token] += sign * 1e-2
            ends.append(float(value(moved)))
        assert float(share.grad[token]) == pytest.approx((ends[0] - ends[1]) / 2e-2, abs=5e-3, rel=0.05)
    assert share.grad.abs().max() > 0.02


def test_diffprune_anneals_as_a_cosine_and_trains_both(engine, batch):
    scorer = tiny_scorer(engine.model)
    stage = DiffPrune(relaxed_config(relaxation="diffprune", tau_start=2.0, tau_end=0.5), scorer, engine)
    told = []
    for progress in (0.0, 0.5, 1.0):
        ((loss, stats),) = stage.losses(batch, progress, drawn())
        told.append(stats)
    assert [stats["tau"] for stats in told] == pytest.approx([2.0, 1.25, 0.5])
    assert told[2]["hardness"] > told[0]["hardness"]
    loss.backward()
    assert scorer.score.weight.grad.abs().sum() > 0
    assert stage.modules() == {"denoiser": stage.denoiser}
    assert stage.denoiser.leave.weight.grad.abs().sum() > 0
    assert not any(p.requires_grad for p in engine.model.parameters())


def test_images_that_enter_at_several_layers_are_refused(engine, batch):
    plane = torch.zeros(16, 4)
    samples = tuple(tuple(replace(item, deepstack=(plane,)) for item in mine) for mine in batch.encoded.samples)
    deep = replace(batch, encoded=replace(batch.encoded, samples=samples))
    with pytest.raises(UnsupportedModelError, match=r"llava also adds rows at later layers: .* such as soft_topk"):
        with_features(deep, [torch.zeros(16, 32)] * 4)


# --- by name ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("relaxation", RELAXATIONS)
def test_each_is_trained_saved_and_resumed(tmp_path, relaxation):
    """The scorer is one of grip's; a run that ended early and was resumed gives the same weights."""
    model, processor = tiny_vlm()
    config = relaxed_config(relaxation=relaxation, output_dir=str(tmp_path / "one"), max_steps=2, num_iterations=2)
    trained = train_stage(config, stage_of, model, processor, asked(6))
    pruner = gripvlm.get_pruner(f"grip:scorer={tmp_path / 'one'}")
    assert pruner.weights == trained.digest()
    assert pruner.module.notes["config"]["relaxation"] == relaxation
    (checkpoint,) = (tmp_path / "one").glob("*.ckpt")
    modules = torch.load(checkpoint, weights_only=True)["modules"]
    assert {"config.toml", "environment.json", "metrics.jsonl"} <= {path.name for path in (tmp_path / "one").iterdir()}
    assert sorted(modules) == ["average", *(["denoiser"] if relaxation == "diffprune" else []), "scorer"]
    again = replace(config, output_dir=str(tmp_path / "two"))
    assert train_stage(again, stage_of, model, processor, asked(6)).digest() == trained.digest()
    assert train_stage(config, stage_of, model, processor, asked(6)).digest() == trained.digest()  # all is done
    with pytest.raises(TrainError, match=r"holds another run .seed was 0, now 1"):
        train_stage(replace(config, seed=1), stage_of, model, processor, asked(6))


def test_mistakes_are_one_line():
    with pytest.raises(SystemExit, match="Error: reward_funcs = 'agreement' has no gradient"):
        main(RelaxedConfig, stage_of, None, ["--reward-funcs", "agreement"])


@pytest.mark.parametrize("relaxation", ["soft_topk", "conditional_bernoulli"])
def test_rounds_are_relaxed_as_they_choose(relaxation):
    """The numbers that are relaxed rank first what the scorer keeps, and train how much tokens lose."""
    model, processor = tiny_vlm()
    engine, scorer = engine_of(model, processor), tiny_scorer(model, rounds=4, joint=True)
    batch = engine.prepare(pairs(asked(2)))
    inputs, counts = batch.for_scorer(True, joint=True), torch.tensor([6] * len(batch))
    with torch.no_grad():
        kept, _ = inputs.choose(scorer, counts.tolist())
        best = ranking(scorer, inputs, counts).argsort(descending=True)[:, :6]
        plain = inputs.score(scorer, counts).argsort(descending=True)[:, :6]
    assert [sorted(row) for row in best.tolist()] == [rows.tolist() for rows in kept]
    assert not torch.equal(best.sort().values, plain.sort().values)
    stage = stage_of(relaxed_config(relaxation=relaxation, rounds=4), scorer, engine)
    loss, _ = next(iter(stage.losses(batch, 0.5, drawn())))
    loss.backward()
    assert scorer.diversity.penalty.bias.grad.abs().sum() > 0
