"""Training and reuse: labels, gradients, one encoding for many prunings, inputs left alone."""

from __future__ import annotations

import pytest
import torch

import gripvlm
from tiny_models import BUILDERS, EOS, build, hidden_from, make

FAMILIES = sorted(BUILDERS)
TOLERANCE = {"atol": 2e-5, "rtol": 2e-5}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_labels_are_shortened_with_the_prompt(family, side):
    model = build(family)
    inputs = make(family, [1, 2], [7, 9], side=side)
    labels = torch.full_like(inputs["input_ids"], -100)
    for row, mask, ids in zip(labels, inputs["attention_mask"], inputs["input_ids"], strict=True):
        answer = mask.nonzero().flatten()[-3:]
        row[answer] = ids[answer]
    arguments, record = gripvlm.prune_inputs(model, inputs | {"labels": labels}, "norm", keep=5, return_record=True)
    assert arguments["labels"].shape == arguments["input_ids"].shape
    assert bool((arguments["labels"][arguments["attention_mask"] == 0] == -100).all())
    masked = hidden_from(model, inputs, record.selections)
    with torch.no_grad():
        torch.testing.assert_close(model(**arguments).loss, model(**masked, labels=labels).loss, **TOLERANCE)


def test_gradients_flow_through_the_kept_rows_only():
    model = build("llava")
    inputs = make("llava", [1], [7])
    pixels = inputs["pixel_values"].clone().requires_grad_()
    arguments = gripvlm.prune_inputs(model, inputs | {"pixel_values": pixels}, "grid", keep=4)
    model(**arguments).logits.square().sum().backward()
    assert pixels.grad is not None
    assert float(pixels.grad.abs().sum()) > 0
    model.zero_grad()


@pytest.mark.parametrize("family", FAMILIES)
def test_encode_once_prune_often(family):
    model = build(family)
    inputs = make(family, [1, 2], [7, 9])
    passes = []
    hook = model.base_model.vision_tower.register_forward_hook(lambda *_: passes.append(1))
    with torch.no_grad():
        encoded = gripvlm.encode(model, inputs)
        text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        for keep in (3, 0.5):
            reused, record = gripvlm.prune_inputs(model, text, "norm", keep=keep, encoded=encoded, return_record=True)
            assert record.seconds["vision"] == 0
            logits = model(**reused).logits
            hook_free = len(passes)
            assert torch.equal(logits, model(**gripvlm.prune_inputs(model, inputs, "norm", keep=keep)).logits)
            assert len(passes) == hook_free + 1
    hook.remove()
    assert len(passes) == 3  # once for encode, once for each comparison
    assert encoded.seconds > 0


def test_rollouts_share_one_encoding():
    """Several subsets of one prompt, in one batch: what a trainer does."""
    model = build("llava")
    inputs = make("llava", [2], [7])
    encoded = gripvlm.encode(model, inputs)
    four = {name: inputs[name].repeat(4, 1) for name in ("input_ids", "attention_mask")}
    scores = [[torch.randn(16, generator=torch.Generator().manual_seed(g)) for _ in range(2)] for g in range(4)]
    given_scores = gripvlm.get_pruner("given", scores=scores)
    with torch.no_grad():
        arguments = gripvlm.prune_inputs(model, four, given_scores, keep=5, encoded=encoded.take([0] * 4))
        together = model(**arguments).logits
        for g in range(4):
            one = gripvlm.get_pruner("given", scores=[scores[g]])
            alone = model(**gripvlm.prune_inputs(model, inputs, one, keep=5)).logits
            torch.testing.assert_close(together[g], alone[0], **TOLERANCE)


def test_inputs_are_not_changed():
    model = build("llava")
    for dtype in (torch.long, torch.bool):
        inputs = make("llava", [1, 2], [7, 9])
        inputs["attention_mask"] = inputs["attention_mask"].to(dtype)
        before = {name: value.clone() for name, value in inputs.items()}
        gripvlm.prune_inputs(model, inputs, "grid", keep=3)
        assert inputs.keys() == before.keys()
        assert all(torch.equal(inputs[name], before[name]) for name in before)


def test_a_missing_mask_is_inferred_as_generate_infers_it():
    model = build("llava")
    inputs = make("llava", [1, 2], [7, 9])
    with_mask = gripvlm.prune_inputs(model, inputs, "grid", keep=3)
    ids_only = {name: inputs[name] for name in ("input_ids", "pixel_values")}
    without = gripvlm.prune_inputs(model, ids_only, "grid", keep=3)
    for name in ("input_ids", "attention_mask", "position_ids"):
        assert torch.equal(with_mask[name], without[name])
    model.config.text_config.eos_token_id, kept = model.config.text_config.pad_token_id, EOS
    try:
        ones = gripvlm.prune_inputs(model, ids_only, "grid", keep=3)["attention_mask"]
    finally:
        model.config.text_config.eos_token_id = kept
    assert bool((ones[0] == 1).all())  # padding that could be an end is taken for text, as upstream does
