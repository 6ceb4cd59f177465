"""Layers whose cache keeps only what the last layer kept, once the prompt has run: MustDrop's decoding stage."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from test_llm_drop import masking
from test_llm_stage import GREEDY, IMAGES, KEEP, WAYS, WORDS, Steps, stages_of

import gripvlm
from gripvlm.errors import InputError
from gripvlm.pruners.llm.mustdrop import MustDropLLM
from tiny_families import TINY, build, make


@dataclass(frozen=True)
class Forgetful(Steps):
    """Its last two layers write the answer from what the last one kept."""

    def evict_after_prefill(self, layers: int) -> int:
        return layers - 2


@pytest.mark.parametrize("options", WAYS[1:], ids=str)
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_forgetting_equals_masking_what_decoded_tokens_see(name, options):
    model, inputs = build(name), make(TINY[name], [1, 2], [7, 9]).inputs
    options = {"max_new_tokens": 4, "do_sample": False} | options
    torch.manual_seed(5)
    with gripvlm.prune(model, Forgetful(), keep=KEEP) as record:
        ours = model.generate(**inputs, **options)
    stages = stages_of(inputs["input_ids"], inputs["attention_mask"], record.selections)
    repeat = max(options.get("num_beams", 1), options.get("num_return_sequences", 1))
    reference = build(name, "eager")
    torch.manual_seed(5)
    with masking(reference, {k: stage.repeat_interleave(repeat, 0) for k, stage in stages.items()}, forget=2):
        theirs = reference.generate(**inputs, **options)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_mustdrops_decoding_stage_shortens_the_cache(name):
    """Of 4 layers, all but the first: they write the answer from what the last cut kept."""
    assert MustDropLLM(layers=(2, 6, 15), decode=True).evict_after_prefill(32) == 1
    assert MustDropLLM(decode=True).evict_after_prefill(32) == 2
    assert MustDropLLM().evict_after_prefill(32) is None
    model, inputs = build(name), make(TINY[name], IMAGES, WORDS).inputs
    lengths, logits, kept = [], [], []
    for decode in (False, True):
        with gripvlm.prune(model, f"mustdrop_llm:decode={decode}", keep=8) as record:
            out = model.generate(**inputs, **GREEDY)
        lengths.append([layer.keys.shape[-2] for layer in out.past_key_values.layers])
        logits.append(out.logits)
        kept.append([[s.counts for s in mine] for mine in record.selections])
    assert kept[0] == kept[1]
    assert lengths[0] == sorted(lengths[0], reverse=True)
    assert lengths[0][1] > lengths[0][3]
    assert lengths[1] == [lengths[0][0], *[lengths[0][3]] * 3]
    assert torch.equal(logits[0][0], logits[1][0])
    assert not torch.equal(logits[0][1], logits[1][1])


def test_forgetting_and_size_aware_attention_exclude_each_other():
    model, inputs = build("llava"), make(TINY["llava"], [1], [7]).inputs
    with (
        gripvlm.prune(model, "mustdrop_llm:decode=True", keep=8, proportional_attention=True),
        pytest.raises(
            InputError, match="'mustdrop_llm' drops from the cache after that: leave proportional_attention out"
        ),
    ):
        model.generate(**inputs, max_new_tokens=2)
