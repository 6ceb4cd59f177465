"""Property tests: random prompts, image counts, sizes, budgets and paddings against the masked full model."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gripvlm
from tiny_families import TINY, build, make
from tiny_families.reference import kept, masked

# newline rows and ordinary positions; joined tiles; blocks of images; M-RoPE with DeepStack and videos; M-RoPE
SCHEMES = ["llava_next", "idefics3", "gemma3", "qwen3_vl", "qwen2_vl"]


@pytest.mark.parametrize("name", SCHEMES)
@settings(max_examples=12, deadline=None)
@given(data=st.data(), seed=st.integers(0, 99))
def test_any_batch_any_budget_equals_masking(name, data, seed):
    kinds = "iv" if TINY[name].video else "i"
    prompts = data.draw(st.lists(st.text(kinds, max_size=3), min_size=1, max_size=3).filter(any))
    words = [data.draw(st.integers(len(prompt) + 1, 9)) for prompt in prompts]
    side = data.draw(st.sampled_from(["left", "right"]))
    model, batch = build(name), make(TINY[name], prompts, words, seed=seed, side=side)
    keep = [[data.draw(st.integers(1, n)) for n in sizes] for sizes in batch.sizes]
    arguments, record = gripvlm.prune_inputs(model, batch.inputs, "random", keep=keep, return_record=True)
    assert [[s.k for s in sample] for sample in record.selections] == keep
    real = kept(batch.inputs["input_ids"], batch.inputs["attention_mask"], record.selections)
    with torch.no_grad():
        ours = model(**arguments).logits[arguments["attention_mask"].bool()]
        theirs = model(**masked(model, batch.inputs, record.selections)).logits[real]
    torch.testing.assert_close(ours, theirs, atol=4e-5, rtol=4e-5)
