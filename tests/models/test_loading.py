"""What integrations ask of loading and of inputs: dtype, attention, several pictures in a prompt."""

from __future__ import annotations

import pytest
import torch

import gripvlm
from gripvlm.eval import make_inputs
from gripvlm.models.loading import ModelError, load_model
from tiny_benchmarks import picture
from tiny_lab import tiny_lab


def test_dtype_and_attention_are_those_named():
    model, _ = load_model("lab", "cpu", "bfloat16", "eager")
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"
    model, _ = load_model("lab", "cpu")
    assert model.dtype == torch.float32


def test_an_unknown_dtype_is_refused_before_the_model_is_looked_for():
    with pytest.raises(ModelError, match="dtype 'int8': use one of auto, float32, bfloat16, float16"):
        load_model("no/where", "cpu", "int8")


def test_a_prompt_may_show_several_pictures():
    model, processor = tiny_lab()
    inputs = make_inputs(model, processor, ["which?", "what?"], [[picture(1), picture(2)], picture(3)])
    assert (inputs["input_ids"] == model.config.image_token_id).sum(1).tolist() == [512, 256]
    with gripvlm.prune(model, "grid", keep=16) as record, torch.no_grad():
        model.generate(**inputs, max_new_tokens=1, do_sample=False)
    assert [[selection.paid for selection in images] for images in record.selections] == [[16, 16], [16]]
