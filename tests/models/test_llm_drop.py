"""Dropping after layer k against the full model whose later layers mask the dropped keys."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

import gripvlm
from gripvlm.errors import GripError, InputError, UnsupportedModelError
from gripvlm.models import FAMILIES
from gripvlm.models.hooks.attention import capture_attention
from gripvlm.models.hooks.llm_drop import drop_in_layers
from tiny_families import TINY, build, make
from tiny_families.reference import extended

NAMES = sorted(name for name in TINY if FAMILIES[name].layers and FAMILIES[name].equals == "masking")
DELETION = sorted(name for name in TINY if FAMILIES[name].layers and FAMILIES[name].equals == "deletion")
GREEDY = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}


def thin(step: int):
    """Every `step`-th visual token goes on: other counts in samples with more images."""
    return lambda hidden, visual: visual & (visual.cumsum(-1) % step == 0)


def everything(hidden, visual):
    return visual


def stage_masks(state) -> dict[int, torch.Tensor]:
    """Layer -> [B, L] bool, the tokens of the prompt that it and those after it see."""
    nothing = torch.zeros_like(state.mask)
    return {layer: nothing.scatter(-1, stage.order, stage.real) for layer, stage in state.stages.items()}


@contextmanager
def masking(model, stages: dict[int, torch.Tensor], forget: int | None = None):
    """The full model, with each later layer's mask hiding what was dropped before it; sdpa needs a batch with padding.

    Layers from `forget` on hide from decoded tokens all that was dropped at the end.
    """
    first = min(stages) if forget is None else min(forget, *stages)

    def before(index: int):
        def hook(layer, args, kwargs):
            mask = kwargs["attention_mask"]
            if forget is not None and index >= forget and mask.shape[-2] == 1:
                keep = stages[max(stages)]
            elif index < min(stages):
                return args, kwargs
            else:
                keep = stages[max(k for k in stages if k <= index)]
            blank = torch.ones(keep.shape[0], mask.shape[-1], dtype=torch.bool)
            blank[:, : keep.shape[1]] = keep
            own = torch.zeros(mask.shape[-2:], dtype=torch.bool)
            if mask.shape[-2] > 1:  # a dropped query may see itself: nobody reads it
                own = torch.eye(mask.shape[-1], dtype=torch.bool)[-mask.shape[-2] :]
            least = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
            kwargs["attention_mask"] = mask.masked_fill(~blank[:, None, None] & ~own, least)
            return args, kwargs

        return hook

    layers = model.get_decoder().layers
    handles = [
        layer.register_forward_pre_hook(before(i), with_kwargs=True) for i, layer in enumerate(layers) if i >= first
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", NAMES)
def test_dropping_twice_equals_masking_layer_by_layer(name, attention):
    """Ragged counts in a left-padded batch, one prompt without images, prefill and decoding, DeepStack layers too."""
    model, inputs = build(name, attention), make(TINY[name], [1, 2, 0], [7, 9, 5]).inputs
    plain = model.generate(**inputs, **GREEDY)
    with drop_in_layers(model, {1: thin(2), 3: thin(3)}) as dropped:
        ours = model.generate(**inputs, **GREEDY)
    stages = stage_masks(dropped)
    with masking(build(name, "eager"), stages):
        expected = build(name, "eager").generate(**inputs, **GREEDY)
    assert torch.equal(ours.sequences, expected.sequences)
    tolerance = TINY[name].tolerance
    for a, b, full in zip(ours.logits, expected.logits, plain.logits, strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)
        assert (a[:2] - full[:2]).abs().max() > 0.01
    lengths = [layer.keys.shape[-2] for layer in ours.past_key_values.layers]
    full = inputs["input_ids"].shape[1] + 3
    left = {k: int(stage.sum(-1).max()) + 3 for k, stage in stages.items()}
    assert lengths == [full, left[1], left[1], left[3]]
    assert left[3] < left[1] < full


@pytest.mark.parametrize("forget", [1, 2])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", NAMES)
def test_forgetting_after_the_prompt_equals_masking_what_decoded_tokens_see(name, attention, forget):
    """Caches of layers before the cut, between cuts and after them; ragged, with a prompt without images."""
    model, inputs = build(name, attention), make(TINY[name], [1, 2, 0], [7, 9, 5]).inputs
    choose = {2: thin(2), 3: thin(3)}
    with drop_in_layers(model, choose):
        kept = model.generate(**inputs, **GREEDY)
    with drop_in_layers(model, choose, evict_from=forget) as dropped:
        ours = model.generate(**inputs, **GREEDY)
    stages = stage_masks(dropped)
    with masking(build(name, "eager"), stages, forget):
        expected = build(name, "eager").generate(**inputs, **GREEDY)
    assert torch.equal(ours.sequences, expected.sequences)
    tolerance = TINY[name].tolerance
    for a, b in zip(ours.logits, expected.logits, strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)
    assert torch.equal(ours.logits[0], kept.logits[0])  # the prompt ran as without
    assert (ours.logits[1][:2] - kept.logits[1][:2]).abs().max() > 1e-3
    full, left = inputs["input_ids"].shape[1] + 3, int(stages[3].sum(-1).max()) + 3
    assert [layer.keys.shape[-2] for layer in ours.past_key_values.layers] == [full] * forget + [left] * (4 - forget)


def test_what_forgetting_needs():
    model, inputs = build("llava"), make(TINY["llava"], [1], [7]).inputs
    message = "no layer 0 to drop before: use 1 to 3"
    with pytest.raises(InputError, match=message), drop_in_layers(model, {2: thin(2)}, 0):
        pytest.fail("the block opened")
    with drop_in_layers(model, {2: thin(2)}, 1), pytest.raises(InputError, match="leave use_cache=False out"):
        model.generate(**inputs, max_new_tokens=2, do_sample=False, use_cache=False)


@pytest.mark.parametrize("name", ["llava", "gemma3", "qwen3_vl"])
def test_letting_everything_go_on_changes_nothing(name):
    model, inputs = build(name), make(TINY[name], [1, 2], [7, 9]).inputs
    before, plain = dict(vars(model)), model.generate(**inputs, **GREEDY)
    with drop_in_layers(model, {2: everything}):
        same = model.generate(**inputs, **GREEDY)
    for a, b in zip(same.logits, plain.logits, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-5)
    again = model.generate(**inputs, **GREEDY)
    assert all(torch.equal(a, b) for a, b in zip(again.logits, plain.logits, strict=True))
    assert vars(model).keys() == before.keys()
    assert not any(layer._forward_pre_hooks for layer in model.get_decoder().layers)


def test_a_batch_equals_its_samples_alone():
    tiny, model = TINY["qwen2_vl"], build("qwen2_vl")
    with drop_in_layers(model, {2: thin(3)}):
        together = model.generate(**make(tiny, [1, 2], [7, 9]).inputs, **GREEDY)
        for sample in range(2):
            alone = model.generate(**make(tiny, [1, 2], [7, 9], only=sample).inputs, **GREEDY)
            for a, b in zip(alone.logits, together.logits, strict=True):
                torch.testing.assert_close(a[0], b[sample], atol=3e-5, rtol=3e-5)


def test_the_choice_may_read_the_attention_of_the_layer_before():
    """What the last token of each prompt looks at in layer 1 decides what goes on to layer 2."""
    model, inputs = build("llava"), make(TINY["llava"], [1, 2], [7, 9]).inputs

    def most_seen(hidden, visual):
        scores = seen[1][0].mean((1, 2)).masked_fill(~visual, -1)
        return visual & (scores >= scores.topk(5, dim=-1).values[:, -1:])

    with capture_attention(model.get_decoder(), [1], [-1]) as seen, drop_in_layers(model, {2: most_seen}) as dropped:
        ours = model.generate(**inputs, **GREEDY)
    stages = stage_masks(dropped)
    assert [int((stage & (inputs["input_ids"][b] == 98)).sum()) for b, stage in enumerate(stages[2])] == [5, 5]
    with masking(build("llava", "eager"), stages):
        expected = build("llava", "eager").generate(**inputs, **GREEDY)
    assert torch.equal(ours.sequences, expected.sequences)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"prefill_chunk_size": 7}, "several tokens on top of a cache"),
        ({"cache_implementation": "static"}, "default dynamic cache"),
    ],
    ids=str,
)
def test_ways_to_decode_that_are_refused(options, says):
    model, inputs = build("llava"), make(TINY["llava"], [1], [7]).inputs
    with drop_in_layers(model, {2: thin(2)}), pytest.raises(InputError, match=says):
        model.generate(**inputs, max_new_tokens=2, do_sample=False, **options)


def test_what_else_is_refused():
    model, batch = build("llava"), make(TINY["llava"], [1, 2], [7, 9])
    with drop_in_layers(model, {2: thin(2)}):
        with pytest.raises(InputError, match="labels do not fit"):
            model(**batch.inputs, labels=batch.inputs["input_ids"])
        with pytest.raises(InputError, match="padding on the left"):
            model(**make(TINY["llava"], [1, 2], [7, 9], side="right").inputs)
        with pytest.raises(GripError, match="already drops"), drop_in_layers(model, {1: thin(2)}):
            pytest.fail("the inner block opened")
    with (
        drop_in_layers(model, {2: lambda h, v: v[:, 1:]}),
        pytest.raises(InputError, match="before layer 2 must be bool"),
    ):
        model(**batch.inputs)
    for k in (0, 4):
        with (
            pytest.raises(InputError, match=f"no layer {k} to drop before: use 1 to 3"),
            drop_in_layers(model, {k: thin(2)}),
        ):
            pytest.fail("the block opened")
    small = build("gemma3", sliding_window=6)
    with drop_in_layers(small, {2: thin(2)}), pytest.raises(InputError, match="exceed the sliding window of 6"):
        small.generate(**make(TINY["gemma3"], [1], [7]).inputs, max_new_tokens=2)


def test_a_family_that_is_not_known_to_drop_there_is_refused(monkeypatch):
    monkeypatch.setitem(FAMILIES, "llava", replace(FAMILIES["llava"], layers=False))
    with pytest.raises(UnsupportedModelError, match="drop at the input"), drop_in_layers(build("llava"), {2: thin(2)}):
        pytest.fail("the block opened")


# --- layers that share keys, and recurrent ones -------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_layers_that_share_keys_read_those_that_are_left(attention):
    """Six layers, of which the last two read the keys of the third and fourth: tokens may go before the third."""
    kinds = ("sliding_attention", "full_attention") * 3
    changes = {"num_hidden_layers": 6, "layer_types": kinds, "num_kv_shared_layers": 2}
    model, inputs = build("gemma4", attention, **changes), make(TINY["gemma4"], [1, 2, 0], [7, 9, 5]).inputs
    plain = model.generate(**inputs, **GREEDY)
    with drop_in_layers(model, {1: thin(2), 2: thin(3)}) as dropped:
        ours = model.generate(**inputs, **GREEDY)
    reference = build("gemma4", "eager", **changes)
    with masking(reference, stage_masks(dropped)):
        expected = reference.generate(**inputs, **GREEDY)
    assert torch.equal(ours.sequences, expected.sequences)
    for a, b, full in zip(ours.logits, expected.logits, plain.logits, strict=True):
        torch.testing.assert_close(a, b, atol=3e-5, rtol=3e-5)
        assert (a[:2] - full[:2]).abs().max() > 0.01
    said = r"no layer 3 to drop before: use 1 to 2 \(the layers after 2 read keys that are made there\)"
    with pytest.raises(InputError, match=said), drop_in_layers(model, {3: thin(2)}):
        pytest.fail("the block opened")
    model = build("gemma4", attention, num_kv_shared_layers=2)
    with pytest.raises(InputError, match="use a pruner that drops at the input"), drop_in_layers(model, {1: thin(2)}):
        pytest.fail("the block opened")


def alone(model, layers: range, states, positions):
    """The states [1, l, d] behind some of the language model's layers, run as a model of their own, all at once."""
    decoder = copy.deepcopy(model.get_decoder())
    kinds, norm = decoder.config.layer_types, "norm" if hasattr(decoder, "norm") else "embedding_norm"
    decoder.layers = torch.nn.ModuleList(decoder.layers[i] for i in layers)
    decoder.config.layer_types, decoder.config.num_hidden_layers = [kinds[i] for i in layers], len(layers)
    if layers[-1] < len(kinds) - 1:
        setattr(decoder, norm, torch.nn.Identity())
    mask = torch.ones(states.shape[:2], dtype=torch.long)
    return decoder(inputs_embeds=states, position_ids=positions, attention_mask=mask, use_cache=False).last_hidden_state


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", DELETION)
def test_dropping_is_deletion_from_that_layer_on(name, attention):
    """Layers 0 and 1 see all; layer 2 is given what is left of their states, and so is layer 3 of its own.

    The reference is one forward over prompt and answer, each layer on its own tokens, without a cache: recurrent layers
    began with an empty state, so nothing of a dropped token can be in it.
    """
    model, inputs = build(name, attention), make(TINY[name], [2], [7]).inputs
    with drop_in_layers(model, {2: thin(2), 3: thin(3)}) as dropped:
        ours = model.generate(**inputs, **GREEDY)
    whole = extended(gripvlm.prune_inputs(model, inputs, "random", keep=1.0), ours.sequences[:, -4:])
    entered = []
    hook = model.get_decoder().layers[2].register_forward_pre_hook(lambda module, args: entered.append(args[0]))
    with torch.no_grad():
        model(**whole)
        hook.remove()
        states, positions = entered[0], whole["position_ids"]
        for layer in (2, 3):
            left = dropped.stages[layer].previous[0].tolist()
            left += range(states.shape[1] - 4, states.shape[1])  # the answer
            states, positions = states[:, left], positions[..., left]
            states = alone(model, range(layer, layer + 1), states, positions)
        logits = model.lm_head(states)[0, -5:-1]
    tolerance = TINY[name].tolerance
    torch.testing.assert_close(torch.cat(ours.logits), logits, atol=tolerance, rtol=tolerance)
    plain = model.generate(**inputs, **GREEDY)
    assert (ours.logits[0] - plain.logits[0]).abs().max() > 0.01


@pytest.mark.parametrize("name", DELETION)
def test_a_ragged_batch_of_recurrent_layers_equals_its_samples_alone(name):
    """Padding where tokens were dropped leaves no trace in a state."""
    model, tiny = build(name), TINY[name]
    with drop_in_layers(model, {2: thin(2), 3: thin(3)}):
        together = model.generate(**make(tiny, [1, 2, 0], [7, 9, 5]).inputs, **GREEDY)
        for sample in range(3):
            single = model.generate(**make(tiny, [1, 2, 0], [7, 9, 5], only=sample).inputs, **GREEDY)
            for a, b in zip(single.logits, together.logits, strict=True):
                torch.testing.assert_close(a[0], b[sample], atol=tiny.tolerance, rtol=tiny.tolerance)


@pytest.mark.parametrize("name", DELETION)
def test_what_recurrent_layers_cannot_do_is_refused(name):
    model = build(name)
    said = r"no layer 1 to drop before: use 2 to 3 \(layer 1 is the first one with keys, before it all are recurrent\)"
    with pytest.raises(InputError, match=said), drop_in_layers(model, {1: thin(2)}):
        pytest.fail("the block opened")
    with (
        pytest.raises(UnsupportedModelError, match=f"recurrent layers of {name} have no keys.*after the prompt"),
        drop_in_layers(model, {3: thin(2)}, 2),
    ):
        pytest.fail("the block opened")
