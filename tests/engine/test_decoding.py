"""Every way to decode, on one family of each position scheme."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

import gripvlm
from gripvlm.engine.generate import CHUNKS_SINCE
from gripvlm.errors import InputError
from gripvlm.models import FAMILIES
from gripvlm.models.compat import installed
from gripvlm.models.families import chunkable
from tiny_families import TINY, build, make
from tiny_families.reference import masked

# ordinary positions; joined tiles; shifted by one and bidirectional; blocks and sliding layers; M-RoPE; + DeepStack
SCHEMES = ["llava_next", "idefics3", "paligemma", "gemma3", "qwen2_5_vl", "qwen3_vl"]
ANSWER = {"max_new_tokens": 5, "do_sample": False}
WAYS = [
    {"use_cache": False},
    {"cache_implementation": "static"},
    {"prefill_chunk_size": 7},
    {"num_beams": 3},
    {"num_beams": 3, "num_return_sequences": 2},
]


@pytest.mark.parametrize("options", WAYS, ids=str)
@pytest.mark.parametrize("images", [[1], [1, 2]], ids=str)
@pytest.mark.parametrize("name", SCHEMES)
def test_every_way_gives_what_it_gives_on_the_masked_model(name, images, options):
    model, batch = build(name), make(TINY[name], images, [7, 9][: len(images)])
    with gripvlm.prune(model, "random", keep=5) as record:
        if "prefill_chunk_size" in options and not (chunkable(FAMILIES[name], model) and installed() >= CHUNKS_SINCE):
            with pytest.raises(InputError, match="prefill_chunk_size: "):
                model.generate(**batch.inputs, **ANSWER, **options)
            return
        pruned = model.generate(**batch.inputs, **ANSWER, **options)
    reference = {n: v for n, v in options.items() if n.startswith("num_")}  # the caches may not matter
    expected = model.generate(**masked(model, batch.inputs, record.selections), **ANSWER, **reference)
    assert torch.equal(pruned, expected)


@pytest.mark.skipif(installed() < CHUNKS_SINCE, reason="transformers does not cut encoded images into chunks")
def test_gemma4_runs_in_chunks_where_its_images_are_causal():
    """The larger checkpoints' images attend in both directions, the smaller ones' do not."""
    batch = make(TINY["gemma4"], [1, 2], [7, 9])
    causal, both = build("gemma4", use_bidirectional_attention=None), build("gemma4")
    with gripvlm.prune(causal, "random", keep=5):
        whole = causal.generate(**batch.inputs, **ANSWER)
        assert torch.equal(causal.generate(**batch.inputs, **ANSWER, prefill_chunk_size=7), whole)
    with gripvlm.prune(both, "random", keep=5), pytest.raises(InputError, match="attend in both directions"):
        both.generate(**batch.inputs, **ANSWER, prefill_chunk_size=7)


@pytest.mark.parametrize("name", SCHEMES)
def test_sampling_draws_what_the_masked_model_draws(name):
    model, batch = build(name), make(TINY[name], [1, 2], [7, 9])
    options = {"max_new_tokens": 5, "do_sample": True, "num_return_sequences": 3, "temperature": 3.0}
    torch.manual_seed(5)
    with gripvlm.prune(model, "random", keep=5) as record:
        pruned = model.generate(**batch.inputs, **options)
    torch.manual_seed(5)
    assert torch.equal(pruned, model.generate(**masked(model, batch.inputs, record.selections), **options))
    assert len({tuple(row.tolist()) for row in pruned[:3]}) > 1  # it did sample


@pytest.mark.parametrize("name", [n for n in sorted(TINY) if not FAMILIES[n].beams])
def test_beams_are_refused_where_transformers_mixes_images_up(name):
    model, batch = build(name), make(TINY[name], [1, 2], [7, 9])
    with gripvlm.prune(model, "random", keep=5):
        for options in ({"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}):
            with pytest.raises(InputError, match=r"wrong in transformers itself .* more than one image"):
                model.generate(**batch.inputs, max_new_tokens=1, **options)
        one = make(TINY[name], [1, 1], [7, 9])
        assert model.generate(**one.inputs, num_beams=2, max_new_tokens=2).shape[0] == 2


@pytest.mark.parametrize("name", SCHEMES)
def test_a_manual_decoding_loop_says_what_generate_says(name):
    """It passes the mask and the positions that follow the last one, on every axis."""
    model, batch = build(name), make(TINY[name], [1, 2], [7, 9])
    with gripvlm.prune(model, "random", keep=5):
        expected = model.generate(**batch.inputs, **ANSWER)[:, -5:]
    arguments = gripvlm.prune_inputs(model, batch.inputs, "random", keep=5)
    mask, positions = arguments["attention_mask"], arguments["position_ids"]

    def following(step: int) -> dict:
        real = torch.cat((mask, mask.new_ones(2, step + 1)), -1)
        return {"attention_mask": real, "position_ids": positions[..., -1:] + step + 1}

    assert torch.equal(said_by_hand(model, arguments, following), expected)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "glm4v"])
def test_models_with_mrope_count_on_by_themselves(name):
    """Their base model adds `rope_deltas` to the tokens in the cache, so those count the dropped ones."""
    model, batch = build(name), make(TINY[name], [2], [9])
    with gripvlm.prune(model, "random", keep=5):
        expected = model.generate(**batch.inputs, **ANSWER)[:, -5:]
    arguments = gripvlm.prune_inputs(model, batch.inputs, "random", keep=5)
    assert torch.equal(said_by_hand(model, arguments, lambda step: {}), expected)


def said_by_hand(model, arguments: dict, following) -> torch.Tensor:
    """[B, 5] greedy tokens from `forward` alone; `following(step)` are the further arguments of a step."""
    cache = DynamicCache(config=model.config.get_text_config())
    said = []
    with torch.no_grad():
        logits = model(**arguments, past_key_values=cache).logits
        for step in range(5):
            scores = logits[:, -1]
            scores[:, model.generation_config.suppress_tokens] = -torch.inf
            said.append(scores.argmax(-1, keepdim=True))
            logits = model(input_ids=said[-1], past_key_values=cache, **following(step)).logits
    return torch.cat(said, -1)


@pytest.mark.parametrize("name", ["llava_next", "gemma3", "idefics3"])
def test_renumbered_positions_count_as_if_the_rows_had_never_been(name):
    model, batch = build(name), make(TINY[name], [1, 2], [7, 9])
    arguments = gripvlm.prune_inputs(model, batch.inputs, "random", keep=5, positions="renumbered")
    mask = arguments["attention_mask"]
    assert torch.equal(arguments["position_ids"], (mask.cumsum(-1) - 1).clamp(min=0))
    with gripvlm.prune(model, "random", keep=5, positions="renumbered"):
        ours = model.generate(**batch.inputs, **ANSWER)
    short = arguments | {"position_ids": None}
    assert torch.equal(ours[:, -5:], model.generate(**short, **ANSWER)[:, -5:])


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl", "glm4v"])
def test_renumbering_is_refused_where_positions_are_coordinates(name):
    with pytest.raises(InputError, match="not defined for models with M-RoPE"):
        gripvlm.prune_inputs(build(name), make(TINY[name], [1], [7]).inputs, "random", 5, positions="renumbered")
