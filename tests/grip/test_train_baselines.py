"""The DynamicViT-style and the DiffPrune-style baseline, and relaxed scorers as pruners by name."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import gripvlm
from gripvlm.errors import PrunerError, UnsupportedModelError
from gripvlm.grip.scorer import Scorer
from gripvlm.grip.train import train
from gripvlm.grip.train.diffprune import Denoiser, DiffPrune, noised, with_features
from gripvlm.grip.train.dynamicvit import DynamicViT, decisions, ratio_loss
from gripvlm.grip.train.masking import forced_log_probs
from gripvlm.grip.train.relaxed import FLOOR
from gripvlm.pruners import get_pruner
from tiny_families import build
from tiny_models import llava_inputs
from tiny_train import asked, drawn, tiny_config, tiny_scorer, tiny_vlm

EVERYTHING = [[torch.arange(16)]] * 4
NAMES = ("soft_topk", "straight_through", "perturbed", "dynamicvit", "diffprune")


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


def test_the_ratio_loss_by_hand():
    mask = torch.tensor([[1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]])  # 2 of 4 kept; 1 of 2 (then padding)
    found = ratio_loss(mask, torch.tensor([1, 2]), torch.tensor([4, 2]))
    assert float(found) == pytest.approx(((2 / 4 - 1 / 4) ** 2 + (1 / 2 - 2 / 2) ** 2) / 2)


def test_the_dynamicvit_loss_is_the_answers_and_the_ratios(engine, batch):
    """Scores far above 0 keep everything: the answer's loss is the unpruned model's, the ratio's is known."""
    scorer = tiny_scorer(engine.model)
    with torch.no_grad():
        scorer.score.bias.fill_(60.0)
    settings = {"budgets": "fixed", "keep_low": 0.25, "ratio_weight": 3.0, "reward": "log_prob"}
    config = tiny_config(relaxation="dynamicvit", **settings)
    ((loss, stats),) = DynamicViT(config, scorer, engine).losses(batch, 0.0, drawn())
    full = engine.run(batch, range(4), EVERYTHING)
    reward = float((full.log_probs.sum(-1) / full.mask.sum(-1)).mean())
    assert stats["kept"] == 4.0
    assert stats["ratio"] == pytest.approx(0.75**2)
    assert float(loss.detach()) == pytest.approx(3 * 0.75**2 - reward, abs=1e-4)


def test_the_ratio_loss_holds_the_share(engine, batch):
    """With the ratio alone at work, the share that is kept comes to the budget."""
    scorer = tiny_scorer(engine.model)
    with torch.no_grad():
        scorer.score.bias.fill_(2.0)
    config = tiny_config(relaxation="dynamicvit", budgets="fixed", keep_low=0.25, ratio_weight=200.0)
    stage, optimiser = DynamicViT(config, scorer, engine), torch.optim.Adam(scorer.parameters(), lr=2e-2)
    kept = []
    for step in range(60):
        ((loss, stats),) = stage.losses(batch, 0.0, drawn(step))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        kept.append(stats["kept"])
    assert kept[0] > 3.0
    assert 0.6 < sum(kept[-20:]) / 20 < 1.4


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
    rows, share = torch.randn(5, 8, generator=drawn()), torch.rand(5, generator=drawn(1)).clamp(FLOOR, 1 - FLOOR)
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
    found = forced_log_probs(engine, same, engine.whole(same))
    assert torch.allclose(found, plain.log_probs, atol=1e-4)
    other = with_features(batch, [features[0] + 1, *features[1:]])  # the second question is about the same picture
    moved = forced_log_probs(engine, other, engine.whole(other)) - found
    assert moved[0].abs().max() > 1e-3
    assert moved[1:].abs().max() < 1e-5


def test_the_gradient_of_the_shares_is_the_finite_difference(engine, batch):
    features = [tokens.features for sample in batch.tokens for tokens in sample]
    noise = torch.randn(16, features[0].shape[1], generator=drawn(2))

    def value(share: torch.Tensor) -> torch.Tensor:
        rows = [noised(features[0], share, noise), *features[1:]]
        noisy = with_features(batch, rows)
        return forced_log_probs(engine, noisy, engine.whole(noisy)).sum()

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
    stage = DiffPrune(tiny_config(relaxation="diffprune", tau_start=2.0, tau_end=0.5), scorer, engine)
    told = []
    for progress in (0.0, 0.5, 1.0):
        ((loss, stats),) = stage.losses(batch, progress, drawn())
        told.append(stats)
    assert [stats["tau"] for stats in told] == pytest.approx([2.0, 1.25, 0.5])
    assert told[2]["hardness"] > told[0]["hardness"]
    loss.backward()
    assert scorer.score.weight.grad.abs().sum() > 0
    assert stage.extras() == {"denoiser": stage.denoiser}
    assert stage.denoiser.leave.weight.grad.abs().sum() > 0
    assert not any(p.requires_grad for p in engine.model.parameters())


def test_images_that_enter_at_several_layers_are_refused(engine, batch):
    plane = torch.zeros(16, 4)
    samples = tuple(tuple(replace(item, deepstack=(plane,)) for item in mine) for mine in batch.encoded.samples)
    deep = replace(batch, encoded=replace(batch.encoded, samples=samples))
    with pytest.raises(UnsupportedModelError, match=r"llava also adds rows at later layers: .* such as soft_topk"):
        with_features(deep, [torch.zeros(16, 32)] * 4)


# --- by name ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("relaxation", NAMES)
def test_a_relaxed_scorer_is_a_pruner_by_name(tmp_path, relaxation):
    """From `train` to `relaxed:scorer=FOLDER`; another run of the same settings gives the same weights."""
    model, processor = tiny_vlm()
    config = tiny_config(stage="relaxed", relaxation=relaxation, out=str(tmp_path / "one"), steps=2, val_every=2)
    trained = train(config, model, processor, asked(6))
    pruner = get_pruner(f"relaxed:scorer={tmp_path / 'one'}")
    assert (pruner.name, pruner.relaxation, pruner.weights) == ("relaxed", relaxation, trained.weights)
    assert (trained.name, trained.relaxation) == ("relaxed", relaxation)
    saved = torch.load(tmp_path / "one" / "relaxed.ckpt", weights_only=True)
    assert sorted(saved["modules"]) == (["denoiser", "scorer"] if relaxation == "diffprune" else ["scorer"])
    again = train(replace(config, out=str(tmp_path / "two")), model, processor, asked(6))
    assert again.weights == trained.weights


def test_scorers_that_were_trained_otherwise_are_refused(tmp_path):
    model = build("llava")
    scorer = tiny_scorer(model)
    for notes, said in (({}, "nothing"), ({"stage": "grpo"}, "grpo")):
        scorer.notes = notes
        scorer.save_pretrained(tmp_path)
        with pytest.raises(PrunerError, match=rf"trained by {said}: type grip:scorer=.*"):
            get_pruner(f"relaxed:scorer={tmp_path}")
    with pytest.raises(PrunerError, match=r"'relaxed' needs scorer \(str\): use relaxed:scorer=\.\.\."):
        get_pruner("relaxed")


def test_a_relaxed_scorer_keeps_what_grip_keeps_with_the_same_weights(tmp_path):
    """Inference is the same top-k; only the training differs."""
    model, inputs = build("llava"), llava_inputs([1, 2], [7, 9])
    scorer = tiny_scorer(model)
    scorer.notes = {"stage": "relaxed", "config": {"relaxation": "soft_topk"}}
    scorer.save_pretrained(tmp_path)
    assert isinstance(Scorer.from_pretrained(tmp_path), Scorer)
    found = [
        gripvlm.prune_inputs(model, inputs, f"{name}:scorer={tmp_path}", 5, return_record=True)[1]
        for name in ("relaxed", "grip")
    ]
    kept = [[[s.indices.tolist() for s in sample] for sample in record.selections] for record in found]
    assert kept[0] == kept[1]
