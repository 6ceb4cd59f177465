"""Names that transformers changes, the next of which fails here by name; and a version newer than any tested one."""

from __future__ import annotations

import inspect
import logging
from types import SimpleNamespace

import pytest
import transformers
from transformers import GenerationConfig
from transformers.modeling_outputs import CausalLMOutputWithPast

import gripvlm
from gripvlm.cli import main
from gripvlm.engine.generate import Options
from gripvlm.models import FAMILIES, family_of
from gripvlm.models.compat import (
    CACHE,
    NEWEST_TESTED,
    OLDEST,
    cache_argument,
    cache_in,
    cache_of,
    installed,
    mention_newer,
    newer_than_tested,
    takes,
)
from gripvlm.models.hooks.calls import call_hooks
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

ALL_LOGITS = {"minicpmv4_6"}
"""Whose forward has no `logits_to_keep`, without which gripvlm does."""

LAYER = {"attention_mask", "position_ids", "position_embeddings"}
"""What a decoder layer is handed and gripvlm's hooks replace, by name."""

ATTENTION = {"is_causal", "scaling", "softcap", "s_aux", "position_bias", "cu_seq_lens_q"}
"""What attention functions are given and gripvlm heeds or refuses (`models/hooks/`)."""

NO_MATTER = {"dropout", "position_ids", "use_cache", "output_hidden_states", "output_router_logits", "logits_to_keep"}
NO_MATTER |= {"image_sizes", "labels", "sliding_window", "grid_thw", "vision_feature_layer"}
"""What they are given besides, which changes no score of an evaluated model; a sliding window is in the mask too."""

OPTIONAL = {
    "llava": ["config.vision_feature_layer", "config.vision_feature_select_strategy"],
    "llava_onevision": ["config.vision_feature_layer"],
    "gemma3": ["get_decoder().config.layer_types", "get_decoder().config.sliding_window"],
    "gemma4": ["config.get_text_config().use_bidirectional_attention"],
    "qwen2_5_vl": ["get_encoder('image').window_size", "base_model.rope_deltas"],
    "qwen3_vl": ["get_decoder()._deepstack_process", "base_model.rope_deltas"],
    "glm4v": ["base_model.rope_deltas"],
}
"""What gripvlm reads where there is one and does without elsewhere: under another name it would not be missed."""


@pytest.mark.parametrize("name", TINY)
def test_every_name_that_gripvlm_uses_is_one_that_transformers_takes(name):
    model = build(name)
    known = takes(model.forward)
    lacking = sorted(MODEL - known - ({"logits_to_keep"} if name in ALL_LOGITS else set()))
    assert not lacking, f"{name}: forward no longer takes {lacking}; it takes {sorted(known)}: see models/compat.py"
    caches = [option for option in CACHE if option in known]
    assert caches, f"{name}: forward takes no cache as {CACHE}; it takes {sorted(known)}: see models/compat.py"
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


@pytest.mark.parametrize("name", TINY)
def test_every_private_helper_takes_what_it_is_given(name):
    model = build(name)
    for helper, given in (
        ("_prepare_multimodal_encoder_kwargs_for_generation", ({},)),
        ("_prepare_position_ids_for_generation", (None, {})),
    ):
        part = getattr(model, helper, None)
        assert part is not None, f"{name}: {type(model).__name__} has no {helper}: see models/adapter.py"
        inspect.signature(part).bind(*given)  # a TypeError where it takes something else


@pytest.mark.parametrize("name", TINY)
def test_every_placeholder_has_its_name_in_the_config(name):
    for modality in FAMILIES[name].modalities:
        assert isinstance(getattr(build(name).config, f"{modality}_token_id"), int)


@pytest.mark.parametrize(("name", "path"), [(name, path) for name in OPTIONAL for path in OPTIONAL[name]])
def test_what_is_read_only_where_there_is_one_is_there(name, path):
    part = build(name)
    for step in path.split("."):
        called, _, argument = step.partition("(")
        part = getattr(part, called)  # an AttributeError where transformers has renamed it
        if argument:
            part = part(*filter(None, [argument.strip("')")]))


@pytest.mark.parametrize("name", TINY)
def test_everything_that_attention_is_given_is_known(name):
    """A scale, a cap, a bias or a mask under a new name would be left out of the weights that pruners read."""
    options: dict[str, str] = {}
    model, batch = build(name), make(TINY[name], [1], [7])

    def read(call):
        given = [option for option, value in call.options.items() if value is not None]
        options.update(dict.fromkeys(given, type(call.module).__name__))

    with call_hooks(attention=dict.fromkeys(model.modules(), read)):
        model.generate(**batch.inputs, max_new_tokens=2, do_sample=False)
    assert options, f"{name}: no attention went through transformers' attention functions"
    unknown = {option: module for option, module in options.items() if option not in ATTENTION | NO_MATTER}
    assert not unknown, f"{name}: attention is given {unknown}: does models/hooks/attention.py have to heed it?"


def test_every_option_of_generate_that_is_read_is_one(model, inputs, monkeypatch):
    """Under another name, what gripvlm refuses would be let through."""
    read, plain = set(), Options.get
    monkeypatch.setattr(Options, "get", lambda self, name: read.add(name) or plain(self, name))
    with gripvlm.prune(model, "grid", keep=2):
        model.generate(**inputs, max_length=60, do_sample=False)
    assert read >= {"num_beams", "num_return_sequences", "prefill_chunk_size", "assistant_model", "max_length"}
    known = set(vars(GenerationConfig())) | set(inspect.signature(type(model).generate).parameters)
    assert read <= known, f"generate no longer takes {sorted(read - known)}: see engine/generate.py"


@pytest.fixture
def version(monkeypatch):
    """Sets the version that transformers says it is."""
    mention_newer.cache_clear()
    yield lambda number: monkeypatch.setattr(transformers, "__version__", number)
    mention_newer.cache_clear()


@pytest.mark.parametrize("number", [OLDEST, NEWEST_TESTED, f"{NEWEST_TESTED.rpartition('.')[0]}.99"])
def test_a_tested_transformers_is_not_mentioned(number, version, caplog):
    version(number)
    family_of(build("llava"))
    assert newer_than_tested() is None
    assert not caplog.records


@pytest.mark.parametrize("number", ["5.99.0.dev0", "6.0.0"])
def test_a_newer_transformers_is_mentioned_once_in_one_line(number, version, caplog):
    version(number)
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            family_of(build("llava"))
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("gripvlm", "WARNING")
    message = record.getMessage()
    assert message.startswith(
        f"transformers {number} is newer than {NEWEST_TESTED}, the newest that this gripvlm was tested"
    )
    assert f'pip install "transformers=={NEWEST_TESTED}"' in message
    assert "\n" not in message


def test_env_says_what_is_tested(version, capsys):
    assert main(["env"]) == 0
    usual = capsys.readouterr().out
    assert f"(tested: {OLDEST} to {NEWEST_TESTED})" in usual
    assert "device" in usual
    assert "is newer than" not in usual or installed() > tuple(map(int, NEWEST_TESTED.split(".")[:2]))
    version("6.0.0")
    assert main(["env"]) == 0
    assert f"transformers 6.0.0 is newer than {NEWEST_TESTED}" in " ".join(capsys.readouterr().out.split())
