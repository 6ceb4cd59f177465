"""Soft masks, relaxations of the top k, and rewards."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gripvlm.errors import TrainError, UnsupportedModelError
from gripvlm.grip.train import masking
from gripvlm.grip.train.masking import masked_forward
from gripvlm.grip.train.relaxed import Relaxed, perturbed_top_k, soft_top_k, straight_through_top_k
from gripvlm.grip.train.rewards import checked, get_reward
from gripvlm.grip.train.teachers import make_teacher
from tiny_train import drawn, tiny_config, tiny_scorer

EVERYTHING = [[torch.arange(16)]] * 4


# --- soft masks inside the model ----------------------------------------------------------------------------------


def test_no_bias_is_the_plain_forward(engine, batch):
    soft = masked_forward(engine, batch, [torch.zeros(16)] * 4)
    plain = engine.run(batch, range(4), EVERYTHING)
    assert torch.allclose(soft, plain.log_probs, atol=1e-4)
    assert (soft[~plain.mask] == 0).all()


def test_a_hard_mask_is_dropping_with_the_places_kept(engine, batch):
    kept = [torch.tensor(k) for k in ([0, 5, 6], [15], [2, 3, 4, 8, 9], list(range(16)))]
    hard = [torch.full((16,), 1e-12).index_fill(0, k, 1.0).log() for k in kept]
    soft = masked_forward(engine, batch, hard)
    dropped = engine.run(batch, range(4), [[k] for k in kept])
    assert torch.allclose(soft, dropped.log_probs, atol=1e-4)
    assert (soft - engine.run(batch, range(4), EVERYTHING).log_probs)[:3].abs().amax(-1).min() > 0.05


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_gradient_of_a_soft_mask_is_the_finite_difference(engine, batch, attention):
    engine.model.set_attn_implementation(attention)
    try:
        biases = [torch.randn(16, generator=drawn(i)).mul(0.5).requires_grad_() for i in range(4)]
        loss = masked_forward(engine, batch, biases).sum()
        loss.backward()
        for i, token in ((0, 3), (1, 0), (3, 15)):
            ends = []
            for sign in (1, -1):
                moved = [b.detach().clone() for b in biases]
                moved[i][token] += sign * 1e-2
                ends.append(float(masked_forward(engine, batch, moved).sum()))
            assert float(biases[i].grad[token]) == pytest.approx((ends[0] - ends[1]) / 2e-2, abs=3e-3, rel=0.05)
        assert max(float(b.grad.abs().max()) for b in biases) > 0.02
    finally:
        engine.model.set_attn_implementation("sdpa")


def test_attention_is_told_in_every_layer_that_gradients_are_wanted(engine, batch, monkeypatch):
    """A GPU's memory-efficient kernel asks query, key and value alone; bits on a CPU are those without."""
    real, asked = torch.nn.functional.scaled_dot_product_attention, []

    def attention(query, key, value, attn_mask=None, **options):
        if attn_mask is not None and attn_mask.requires_grad:
            asked.append(query.requires_grad and key.requires_grad and value.requires_grad)
        return real(query, key, value, attn_mask=attn_mask, **options)

    def once():
        biases = [torch.randn(16, generator=drawn(i)).requires_grad_() for i in range(4)]
        found = masked_forward(engine, batch, biases)
        found.sum().backward()
        return [found.detach(), *(bias.grad for bias in biases)]

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    found = once()
    assert asked == [True, True]  # layers
    assert not any(item.features.requires_grad for sample in batch.encoded.samples for item in sample)
    monkeypatch.setattr(masking, "_with_gradients", lambda arguments: None)
    for mine, plain in zip(found, once(), strict=True):
        assert torch.equal(mine, plain)
    assert asked == [True, True, False, True]


def test_the_gradient_teacher_points_at_what_the_answer_hangs_on(engine, batch):
    """Its largest share is the token whose attention, turned down a little, costs the answer most."""
    looks = make_teacher("gradient")(engine, batch, torch.tensor([4] * 4), drawn())
    lengths = torch.tensor([len(answer) for answer in batch.answers])
    costs = []
    for token in range(16):
        one = torch.zeros(16)
        one[token] = -1e-2
        costs.append(-masked_forward(engine, batch, [one] * 4).sum(-1) / lengths)
    before = -masked_forward(engine, batch, [torch.zeros(16)] * 4).sum(-1) / lengths
    loses = (torch.stack(costs, -1) - before[:, None]).clamp(min=0)
    assert (loses > 1e-4).any(-1).sum() >= 2
    for look, lost in zip(looks, loses, strict=True):
        if float(lost.max()) > 1e-4:
            assert int(look.argmax()) == int(lost.argmax())
            assert torch.allclose(look, lost / lost.sum(), atol=0.05)


def test_models_whose_masks_are_not_plain_are_refused(engine, batch, monkeypatch):
    def refused(said: str) -> None:
        with pytest.raises(UnsupportedModelError, match=said):
            masked_forward(engine, batch, [torch.zeros(16)] * 4)
        monkeypatch.undo()

    text = engine.model.get_decoder().config
    monkeypatch.setattr(text, "_attn_implementation_internal", "flex_attention")
    refused("flex_attention does not take: load the model with attn_implementation='sdpa'")
    monkeypatch.setattr(text, "sliding_window", 4, raising=False)
    refused("sliding windows, which llama has: train with stage grpo")
    monkeypatch.setattr(engine.model.config, "model_type", "paligemma")
    refused("paligemma images attend in both directions")
    monkeypatch.setattr(engine.model.config, "model_type", "gemma4")  # some of its checkpoints do, some do not
    monkeypatch.setattr(engine.model.config.get_text_config(), "use_bidirectional_attention", "vision", raising=False)
    refused("gemma4 images attend in both directions")


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


@pytest.mark.parametrize("relaxation", ["soft_topk", "straight_through", "perturbed"])
def test_each_relaxation_gives_the_scorer_a_gradient(engine, batch, relaxation):
    scorer = tiny_scorer(engine.model)
    stage = Relaxed(tiny_config(relaxation=relaxation, tau_start=2.0, tau_end=0.5), scorer, engine)
    ((cold, told),) = stage.losses(batch, 1.0, drawn())
    ((loss, stats),) = stage.losses(batch, 0.0, drawn())
    assert (stats["tau"], told["tau"]) == (2.0, 0.5)
    assert float(loss.detach()) == pytest.approx(-stats["reward"])
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in scorer.parameters())
    assert scorer.score.weight.grad.abs().sum() > 0
    assert not any(p.requires_grad for p in engine.model.parameters())
    if relaxation == "straight_through":
        assert stats["hardness"] == pytest.approx(1.0)
    if relaxation == "soft_topk":
        assert told["hardness"] > stats["hardness"]
    assert cold.isfinite()


@pytest.mark.parametrize("reward", ["log_prob", "probability"])
def test_a_hard_straight_through_mask_is_worth_what_dropping_is(engine, batch, reward):
    """The loss at the floor's small leak equals the reward of the subsets that the mask keeps."""
    scorer = tiny_scorer(engine.model)
    cold = {"tau_start": 1e-4, "tau_end": 1e-4, "reward": reward}
    config = tiny_config(relaxation="straight_through", budgets="fixed", keep_low=0.25, **cold)
    ((loss, _),) = Relaxed(config, scorer, engine).losses(batch, 0.0, drawn())
    inputs = batch.for_scorer(True)
    top = inputs.score(scorer, torch.tensor([4] * 4)).topk(4).indices.sort().values
    seen = engine.run(batch, range(4), [[row] for row in top])
    worth = float(get_reward(reward)(seen).mean())
    assert float(loss.detach()) == pytest.approx(-worth, rel=5e-3)


def test_a_reward_without_a_gradient_is_refused():
    with pytest.raises(TrainError, match="'agreement' has no gradient: type --reward probability"):
        tiny_config(stage="relaxed", reward="agreement")


# --- rewards ------------------------------------------------------------------------------------------------------


@pytest.fixture
def rollout(engine, batch):
    return engine.run(
        batch, [0, 1, 1, 3], [[torch.arange(16)], [torch.tensor([1])], [torch.arange(16)], [torch.tensor([0, 9])]]
    )


def test_log_prob_by_hand(rollout):
    found = get_reward("log_prob")(rollout)
    for row, value in enumerate(found.tolist()):
        by_hand = [
            float(rollout.logits[row, t].log_softmax(-1)[rollout.targets[row, t]])
            for t in range(rollout.mask.shape[1])
            if rollout.mask[row, t]
        ]
        assert value == pytest.approx(sum(by_hand) / len(by_hand), abs=1e-5)


def test_agreement_is_nothing_for_all_tokens_and_a_loss_for_fewer(rollout):
    found = checked(get_reward("agreement"), rollout)
    assert found[[0, 2]].abs().max() < 1e-5
    assert (found[[1, 3]] < -0.05).all()
    by_hand = torch.nn.functional.kl_div(
        rollout.logits[1].log_softmax(-1), rollout.full_logits[1].log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)[rollout.mask[1]]
    assert float(found[1]) == pytest.approx(-float(by_hand.mean()), abs=1e-4)


def test_task_score_and_exact_match(rollout, monkeypatch):
    monkeypatch.setattr(rollout, "decode", lambda: [rollout.samples[0].answer, "?", rollout.samples[2].answer, "?"])
    assert checked(get_reward("task_score"), rollout).tolist() == [1, 0, 1, 0]
    monkeypatch.setattr(rollout, "hit", torch.ones_like(rollout.mask))
    assert checked(get_reward("exact_match"), rollout).tolist() == [1, 1, 1, 1]
    rollout.hit[1, -1] = False
    assert checked(get_reward("exact_match"), rollout).tolist() == [1, 0, 1, 1]


def raises(rollout):
    raise RuntimeError("no luck")


@pytest.mark.parametrize(
    ("reward", "said"),
    [
        (lambda r: torch.tensor([0, torch.nan, 0, 0]), "is nan for sample '0-1'"),
        (lambda r: torch.tensor([0, 0, 0, -torch.inf]), "is -inf for sample '1-1'"),
        (lambda r: torch.zeros(3), r"must return a tensor \(4,\), got \(3,\)"),
        (lambda r: torch.zeros(4, 1), r"must return a tensor \(4,\), got \(4, 1\)"),
        (lambda r: [0.0] * 4, r"must return a tensor \(4,\), got list"),
        (lambda r: None, "got NoneType"),
        (raises, r"'raises' raised RuntimeError: no luck \(samples 0-0, 0-1, 1-1\)"),
    ],
)
def test_a_reward_that_fails_stops_and_is_never_zero(rollout, reward, said):
    with pytest.raises(TrainError, match=said):
        checked(reward, rollout)


def test_rewards_of_ones_own(rollout):
    assert get_reward("math:sqrt")(4) == 2
    assert get_reward(raises) is raises
    values = checked(lambda r: torch.tensor([True, False, True, True]), rollout)
    assert (values.dtype, values.tolist()) == (torch.float32, [1, 0, 1, 1])
    assert not checked(lambda r: r.log_probs.sum(-1).requires_grad_(), rollout).requires_grad
    for name in ("nonsense", "no.such.module:f", "math:nothing", "math:pi", "a"):
        with pytest.raises(TrainError, match=r"no reward|unknown reward .* agreement, exact_match"):
            get_reward(name)
