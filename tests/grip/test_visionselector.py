"""`gripvlm train visionselector`: the loss of the authors' code, gradients through the frozen model, whole runs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gripvlm.errors import Interrupted, TrainError
from gripvlm.grip.train import train
from gripvlm.grip.train.visionselector import VisionSelector, hardness_loss, scaled, soft_top_k, threshold
from tiny_train import asked, drawn, stopping, tiny_config, tiny_scorer, tiny_vlm


def test_mask_loss_and_gradient_are_those_of_the_authors_code():
    """JulietChoo/VisionSelector@800a70f, qwen-vl-finetune/compression_method/selector_model.py: `topk`, then BCE."""
    values = [0.9, -1.2, 0.3, 2.5, -0.4, 0.1, 1.7, -3.0]
    weights = torch.tensor([[0.2, -0.5, 1.0, 0.3, -0.7, 0.4, -1.1, 0.6, 0.0]])
    mask = [0.4944596, 0.1069613, 0.3492897, 0.8288980, 0.2104587, 0.3053048, 0.6852138, 0.0194139]
    slopes = [-0.0791677, -0.0220809, 0.3120843, -0.0018030, -0.0655471, 0.1588079, -0.3183578, 0.0160642]
    scores = torch.tensor([[*values, -torch.inf]], requires_grad=True)  # a row that ends in padding
    k, valid = torch.tensor([3]), torch.arange(9)[None] < 8
    logits = scores - threshold(scores, k)[:, None]
    assert logits.sigmoid()[0, :8].tolist() == pytest.approx(mask, abs=1e-6)
    assert torch.equal(logits.sigmoid(), soft_top_k(scores, k))
    constraint = hardness_loss(logits, scores, k, valid)
    assert constraint.item() == pytest.approx(0.3041223, abs=1e-6)
    ((logits.sigmoid() * weights).sum() + 2 * constraint.sum()).backward()
    assert scores.grad[0, :8].tolist() == pytest.approx(slopes, abs=1e-6)
    assert scores.grad[0, 8] == 0


def stage_of(engine, **changes) -> VisionSelector:
    settings = {"stage": "visionselector", "budgets": "choices", "keep_choices": "0.25"}
    return VisionSelector(tiny_config(**settings | changes), tiny_scorer(engine.model), engine)


def test_a_scorer_with_a_stage_inside_the_tower_is_refused(engine):
    scorer = tiny_scorer(engine.model)
    staged = scorer.with_tower(1, engine.model.config.vision_config.hidden_size)
    with pytest.raises(TrainError, match="trains no stage inside the vision tower"):
        VisionSelector(tiny_config(stage="visionselector"), staged, engine)


def test_a_mask_of_ones_leaves_the_answers_as_they_are(engine, batch):
    ones = [torch.ones(16) for _ in batch.owner]
    whole = engine.run(batch, range(len(batch)), batch.everything).log_probs
    assert torch.allclose(
        engine.forced_log_probs(scaled(batch, ones), engine.whole(scaled(batch, ones))), whole, atol=1e-5
    )
    halved = scaled(batch, [torch.full((16,), 0.5) for _ in batch.owner])
    assert torch.equal(halved.encoded.samples[1][0].features, 0.5 * batch.encoded.samples[1][0].features)
    assert not torch.allclose(engine.forced_log_probs(halved, engine.whole(halved)), whole, atol=1e-3)


def test_rows_of_later_layers_are_scaled_too(batch):
    samples = [
        tuple(replace(item, deepstack=(item.features + 1, item.features + 2)) for item in sample)
        for sample in batch.encoded.samples
    ]
    deep = replace(batch, encoded=replace(batch.encoded, samples=tuple(samples)))
    item = scaled(deep, [torch.full((16,), 0.25) for _ in batch.owner]).encoded.samples[0][0]
    clean = batch.encoded.samples[0][0].features
    assert [torch.equal(rows, 0.25 * (clean + i)) for i, rows in enumerate((item.features, *item.deepstack))] == [
        True
    ] * 3


@pytest.mark.parametrize("rounds", [1, 4])
def test_the_loss_is_its_parts_and_has_the_gradient_of_finite_differences(engine, batch, rounds):
    config = tiny_config(stage="visionselector", budgets="choices", keep_choices="0.25", constraint_weight=1.1)
    scorer = tiny_scorer(engine.model, seed=1, rounds=rounds)  # no two tokens are nearly tied
    stage = VisionSelector(config, scorer, engine)

    def loss_of():
        return next(stage.losses(batch, 0.5, drawn()))

    loss, stats = loss_of()
    # (0.1 + 1.1) / 2 at the middle of the training.
    assert float(loss.detach()) == pytest.approx(0.6 * stats["constraint"] - stats["log_prob"], abs=1e-5)
    loss.backward()
    weight, step = scorer.score.weight, 1e-3  # too short for another token to be kept in some round
    direction = weight.grad / weight.grad.norm()
    with torch.no_grad():
        ends = []
        for sign in (1, -2):
            weight += sign * step * direction
            ends.append(float(loss_of()[0]))
        weight += step * direction
    assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(float(weight.grad.norm()), rel=0.05)
    assert weight.grad.norm() > 0.05


def test_parts_of_a_batch_are_one_loss(engine, batch):
    whole = float(next(stage_of(engine).losses(batch, 0.0, drawn()))[0])
    before, engine.max_tokens_per_forward = engine.max_tokens_per_forward, 1
    try:
        assert float(next(stage_of(engine).losses(batch, 0.0, drawn()))[0]) == pytest.approx(whole, abs=1e-5)
    finally:
        engine.max_tokens_per_forward = before


def test_it_trains_resumes_and_starts_from_what_was_distilled(tmp_path, monkeypatch):
    vlm = tiny_vlm()
    ends = []
    for name in ("whole", "stopped"):
        config = tiny_config(stage="visionselector", output_dir=str(tmp_path / name), max_steps=3)
        if name == "stopped":
            with monkeypatch.context() as patch:
                stopping(patch, 2, stage="visionselector")
                with pytest.raises(Interrupted):
                    train(config, *vlm, asked(8))
        ends.append(train(config, *vlm, asked(8)).module.digest())
    assert ends[0] == ends[1]
    assert '"constraint"' in (tmp_path / "whole" / "metrics.jsonl").read_text()
    folder = str(tmp_path / "after")
    first = train(tiny_config(stage="distill", output_dir=folder), *vlm, asked(8)).module.digest()
    same = train(tiny_config(stage="visionselector", output_dir=folder, max_steps=0), *vlm, asked(8))
    assert same.module.digest() == first


def test_float16_is_refused():
    model, processor = tiny_vlm()
    with pytest.raises(TrainError, match="gradients of visionselector: use --dtype bfloat16"):
        train(tiny_config(stage="visionselector"), model.half(), processor, asked(8))
