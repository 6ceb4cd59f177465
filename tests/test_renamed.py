"""transformers renames arguments: each is read under any of its names, and the next change fails here by name."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
from transformers.modeling_outputs import CausalLMOutputWithPast

from gripvlm.models.families import takes
from gripvlm.models.renamed import CACHE, cache_argument, cache_in, cache_of
from tiny_families import TINY, build, make

MODEL = {
    "input_ids",
    "attention_mask",
    "position_ids",
    "inputs_embeds",
    "labels",
    "logits_to_keep",
    "mm_encoder_outputs",
}
"""What gripvlm hands to a whole model, by name."""

LAYER = {"attention_mask", "position_ids", "position_embeddings"}
"""What a decoder layer is handed and gripvlm's hooks replace, by name."""


@pytest.mark.parametrize("name", TINY)
def test_every_name_that_gripvlm_uses_is_one_that_transformers_takes(name):
    model = build(name)
    known = takes(model.forward)
    lacking = sorted(MODEL - known)
    assert not lacking, f"{name}: forward no longer takes {lacking}; it takes {sorted(known)}: see models/renamed.py"
    caches = [one for one in CACHE if one in known]
    assert caches, f"{name}: forward takes no cache as {CACHE}; it takes {sorted(known)}: see models/renamed.py"
    decoder = takes(model.get_decoder().forward)
    assert set(CACHE) & decoder, f"{name}: the decoder takes no cache as {CACHE}; it takes {sorted(decoder)}"


@pytest.mark.parametrize("name", TINY)
def test_every_name_in_a_decoder_layer(name):
    for layer in build(name).get_decoder().layers:
        parameters = inspect.signature(layer.forward).parameters
        if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
            lacking = {"attention_mask"} - set(parameters)  # the rest may travel in **kwargs
        else:
            lacking = LAYER - set(parameters)
        assert not lacking, f"{name}: {type(layer).__name__} no longer takes {sorted(lacking)}, but {list(parameters)}"


@pytest.mark.parametrize("name", TINY)
def test_what_comes_out_has_its_cache_under_a_known_name(name):
    model, batch = build(name), make(TINY[name], [1], [7])
    output = model.generate(**batch.inputs, max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
    cache = cache_of(output)
    assert cache is not None, f"{name}: generate returned {sorted(output)}, none of them a cache as {CACHE}"
    assert cache.get_seq_length() == batch.inputs["input_ids"].shape[1] + 1
    assert cache_argument(model) in takes(model.forward)


def test_the_cache_is_read_under_either_name():
    for name in CACHE:
        assert cache_in({name: "it", "use_cache": True}) == "it"
        assert cache_in(dict.fromkeys(CACHE) | {name: "it"}) == "it"
        assert cache_of(SimpleNamespace(**{name: "it"})) == "it"
    assert cache_in({}) is None
    assert cache_of(CausalLMOutputWithPast()) is None
