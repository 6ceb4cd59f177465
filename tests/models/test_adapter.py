"""What pruning may not change, in depth: every pruner on two families; test_families.py has every family."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gripvlm
from gripvlm.engine.generate import CHUNKS_SINCE
from gripvlm.errors import InputError
from gripvlm.models.compat import installed
from tiny_models import BUILDERS, build, hidden_from, make, single

FAMILIES = sorted(BUILDERS)
ONE_TENSOR = ["internvl"]  # whose encoder returns one tensor for all images
PRUNERS = ["divprune", "grid", "norm", "random"]  # that drop rows and leave the rest alone
TOLERANCE = {"atol": 2e-5, "rtol": 2e-5}  # logits spread over about +-10
GREEDY = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}


# --- 1: keeping everything changes nothing, bit for bit ---------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("pruner", ["keep_all", "pool", *PRUNERS])
@pytest.mark.parametrize("family", FAMILIES)
def test_keeping_everything_is_the_unpruned_model_bit_for_bit(family, pruner, attention):
    model = build(family, attention)
    inputs = make(family, [1, 2, 0], [7, 9, 5])
    plain = model.generate(**inputs, **GREEDY)
    with gripvlm.prune(model, pruner, keep=None if pruner == "keep_all" else 1.0) as record:
        pruned = model.generate(**inputs, **GREEDY)
    assert torch.equal(pruned.sequences, plain.sequences)
    assert all(torch.equal(a, b) for a, b in zip(pruned.logits, plain.logits, strict=True))
    assert record.kept == record.total == 48


def test_keeping_everything_leaves_even_idle_padding_alone():
    model = build("llava")
    inputs = make("llava", [1, 2], [7, 9])
    blank = torch.zeros(2, 3, dtype=torch.long)
    wide = {name: torch.cat((blank, inputs[name]), dim=1) for name in ("input_ids", "attention_mask")}
    wide["pixel_values"] = inputs["pixel_values"]
    plain = model.generate(**wide, **GREEDY)
    with gripvlm.prune(model, "keep_all"):
        pruned = model.generate(**wide, **GREEDY)
    assert pruned.past_key_values.get_seq_length() == plain.past_key_values.get_seq_length()
    assert all(torch.equal(a, b) for a, b in zip(pruned.logits, plain.logits, strict=True))


# --- 2: dropping equals masking, in prefill and in decoding -----------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("pruner", PRUNERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_dropping_equals_masking(family, pruner, attention):
    model = build(family, attention)
    inputs = make(family, [1, 2], [7, 9])
    plain = model.generate(**inputs, **GREEDY)
    with gripvlm.prune(model, pruner, keep=5) as record:
        pruned = model.generate(**inputs, **GREEDY)
    masked = model.generate(**hidden_from(model, inputs, record.selections), **GREEDY)
    assert torch.equal(pruned.sequences, masked.sequences)
    for dropped, reference, full in zip(pruned.logits, masked.logits, plain.logits, strict=True):
        torch.testing.assert_close(dropped, reference, **TOLERANCE)
        assert (dropped - full).abs().max() > 0.1  # the rows that went away did matter


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_forward_gives_the_masked_logits_at_every_kept_token(family, side):
    model = build(family)
    inputs = make(family, [1, 2], [7, 9], side=side)
    arguments, record = gripvlm.prune_inputs(model, inputs, "norm", keep=[[3], [5, 11]], return_record=True)
    masked = hidden_from(model, inputs, record.selections)
    assert bool(arguments["attention_mask"][:, -1 if side == "left" else 0].all())  # padded on the same side
    with torch.no_grad():
        dropped, reference = model(**arguments).logits, model(**masked).logits
    torch.testing.assert_close(
        dropped[arguments["attention_mask"].bool()], reference[masked["attention_mask"].bool()], **TOLERANCE
    )


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}])
@pytest.mark.parametrize("family", FAMILIES)
def test_beams_equal_masking_too(family, options):
    model = build(family)
    inputs = make(family, [1, 2], [7, 9])
    keep = 5 if family in ONE_TENSOR else [[3], [5, 11]]
    with gripvlm.prune(model, "norm", keep=keep) as record:
        pruned = model.generate(**inputs, max_new_tokens=5, **options)
    masked = model.generate(**hidden_from(model, inputs, record.selections), max_new_tokens=5, **options)
    assert torch.equal(pruned, masked)
    assert pruned.shape[0] == 2 * options.get("num_return_sequences", 1)


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}], ids=str)
@pytest.mark.parametrize("family", ONE_TENSOR)
def test_unequal_counts_with_beams_are_refused_where_transformers_would_mix_images_up(family, options):
    model = build(family)
    inputs = make(family, [1, 2], [7, 9])
    with gripvlm.prune(model, "norm", keep=[[3], [5, 11]]):
        model.generate(**inputs, max_new_tokens=1)
        with pytest.raises(InputError, match=r"need the same count in every image for this model, got \[3, 5, 11\]"):
            model.generate(**inputs, max_new_tokens=1, **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_sampling_equals_masking_too(family):
    model = build(family)
    inputs = make(family, [1, 2], [7, 9])
    options = {"max_new_tokens": 6, "do_sample": True, "num_return_sequences": 3, "temperature": 3.0}
    torch.manual_seed(5)
    with gripvlm.prune(model, "norm", keep=5) as record:
        pruned = model.generate(**inputs, **options)
    masked_inputs = hidden_from(model, inputs, record.selections)
    torch.manual_seed(5)
    assert torch.equal(pruned, model.generate(**masked_inputs, **options))
    assert len({tuple(row.tolist()) for row in pruned[:3]}) > 1  # it did sample


@pytest.mark.parametrize(
    "options", [{"use_cache": False}, {"cache_implementation": "static"}, {"prefill_chunk_size": 7}], ids=str
)
@pytest.mark.parametrize("images", [[1], [1, 2]], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_cache_gives_the_same_text(family, images, options):
    """Without a cache, gaps in the positions must not be taken for packed sequences."""
    if "prefill_chunk_size" in options and installed() < CHUNKS_SINCE:
        pytest.skip("transformers before 5.23 does not cut encoded images into chunks: refused")
    model = build(family)
    inputs = make(family, images, [7, 9][: len(images)])
    with gripvlm.prune(model, "norm", keep=5):
        plain = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        other = model.generate(**inputs, max_new_tokens=6, do_sample=False, **options)
    assert torch.equal(plain, other)


# --- 3 and 6: the count is exact, text stays, the cache is shorter ----------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_counts_are_exact_and_text_stays_in_order(family):
    model = build(family)
    inputs = make(family, [1, 2, 0], [7, 9, 5])
    keep = [[3], [16, 5], []]
    arguments, record = gripvlm.prune_inputs(model, inputs, "random", keep=keep, return_record=True)
    assert [[s.k for s in sample] for sample in record.selections] == keep
    assert [[s.n for s in sample] for sample in record.selections] == [[16], [16, 16], []]
    image = model.config.image_token_id
    for sample, counts in enumerate(keep):
        before = inputs["input_ids"][sample][inputs["attention_mask"][sample].bool()]
        after = arguments["input_ids"][sample][arguments["attention_mask"][sample].bool()]
        assert before[before != image].tolist() == after[after != image].tolist()
        runs = torch.unique_consecutive(after, return_counts=True)
        assert runs[1][runs[0] == image].tolist() == counts  # images keep their boundaries
    assert sum(row.shape[0] for row in arguments["mm_encoder_outputs"]["image"].pooler_output) == 24
    assert int((arguments["input_ids"] == image).sum()) == 24
    assert arguments["attention_mask"].sum(-1).max() == arguments["input_ids"].shape[1]  # no idle column


@pytest.mark.parametrize("family", FAMILIES)
def test_the_rows_are_those_selected_in_raster_order(family):
    model = build(family)
    inputs = make(family, [2], [7])
    encoded = gripvlm.encode(model, inputs)
    arguments, record = gripvlm.prune_inputs(model, inputs, "norm", keep=4, return_record=True)
    rows = arguments["mm_encoder_outputs"]["image"].pooler_output
    for row, item, selection in zip(rows, encoded.samples[0], record.selections[0], strict=True):
        assert torch.equal(row, item.features[selection.indices])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cache_is_really_shorter(family):
    model = build(family)
    inputs = make(family, [1, 2], [7, 9])
    length = inputs["input_ids"].shape[1]
    plain = model.generate(**inputs, **GREEDY).past_key_values.get_seq_length()
    with gripvlm.prune(model, "grid", keep=4):
        pruned = model.generate(**inputs, **GREEDY).past_key_values.get_seq_length()
    assert plain == length + 5
    assert pruned == length + 5 - 24


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_rows_are_what_pool_says(family):
    model = build(family)
    inputs = make(family, [1], [7])
    features = gripvlm.encode(model, inputs).samples[0][0].features
    arguments = gripvlm.prune_inputs(model, inputs, "pool", keep=4)
    blocks = torch.nn.functional.avg_pool2d(features.T.reshape(1, -1, 4, 4), 2)
    (rows,) = arguments["mm_encoder_outputs"]["image"].pooler_output
    torch.testing.assert_close(rows, blocks.flatten(2)[0].T)


# --- 4: positions -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_original_positions_have_gaps_where_rows_went(family):
    model = build(family)
    inputs = make(family, [1], [3])  # begin, word, 16 visual, 2 words
    arguments, record = gripvlm.prune_inputs(model, inputs, "random", keep=3, return_record=True)
    kept = (record.selections[0][0].indices + 2).tolist()
    assert arguments["position_ids"].tolist() == [[0, 1, *kept, 18, 19]]


@pytest.mark.parametrize("family", FAMILIES)
def test_renumbered_is_the_prompt_that_never_had_the_rest(family):
    """Without position ids transformers counts for itself; renumbered must be the same."""
    model = build(family)
    inputs = make(family, [1, 2], [7, 9])
    with gripvlm.prune(model, "norm", keep=5, positions="renumbered"):
        renumbered = model.generate(**inputs, **GREEDY)
    arguments = gripvlm.prune_inputs(model, inputs, "norm", keep=5)
    length = arguments["input_ids"].shape[1]
    del arguments["position_ids"]
    counted = model.generate(**arguments, **GREEDY)
    assert torch.equal(renumbered.sequences[:, -6:], counted.sequences[:, length:])
    assert all(torch.equal(a, b) for a, b in zip(renumbered.logits, counted.logits, strict=True))
    with gripvlm.prune(model, "norm", keep=5):
        original = model.generate(**inputs, **GREEDY)
    assert (original.logits[0] - renumbered.logits[0]).abs().max() > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_position_ids_of_the_caller_are_kept(family):
    model = build(family)
    inputs = make(family, [1, 1], [5, 5])
    shifted = torch.arange(100, 100 + inputs["input_ids"].shape[1])[None]
    arguments, record = gripvlm.prune_inputs(
        model, inputs | {"position_ids": shifted}, "random", keep=4, return_record=True
    )
    for row, (selection,) in zip(arguments["position_ids"], record.selections, strict=True):
        assert row[2:6].tolist() == (selection.indices + 102).tolist()


# --- 5: a batch is its samples ----------------------------------------------------------------------


@pytest.mark.parametrize("positions", ["original", "renumbered"])
@pytest.mark.parametrize("pruner", ["pool", *PRUNERS])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_equals_its_samples_alone(family, pruner, positions):
    model = build(family)
    images = [1, 2, 0]
    inputs = make(family, images, [7, 9, 5])
    with gripvlm.prune(model, pruner, keep=5, positions=positions) as record:
        together = model.generate(**inputs, **GREEDY)
        chosen = [[s.indices.tolist() for s in sample] for sample in record.selections]
        for sample in range(3):
            alone = model.generate(**single(inputs, images, sample), **GREEDY)
            assert [s.indices.tolist() for s in record.selections[0]] == chosen[sample]
            assert alone.sequences[0, -6:].tolist() == together.sequences[sample, -6:].tolist()
            for a, b in zip(alone.logits, together.logits, strict=True):
                torch.testing.assert_close(a[0], b[sample], atol=5e-5, rtol=5e-5)


def test_different_images_get_different_random_subsets():
    model = build("llava")
    with gripvlm.prune(model, "random", keep=5) as record:
        model.generate(**make("llava", [1, 2], [7, 9]), max_new_tokens=1)
    subsets = [tuple(s.indices.tolist()) for sample in record.selections for s in sample]
    assert len(set(subsets)) == 3


@settings(max_examples=20, deadline=None)
@given(data=st.data(), images=st.lists(st.integers(0, 3), min_size=1, max_size=3), seed=st.integers(0, 99))
def test_any_batch_any_budget_equals_masking(data, images, seed):
    """Random prompts, image counts, budgets, paddings: one prefill against the masked full model."""
    if not any(images):
        images = [*images, 1]
    words = [data.draw(st.integers(count + 1, 9)) for count in images]
    keep = [[data.draw(st.integers(1, 16)) for _ in range(count)] for count in images]
    side = data.draw(st.sampled_from(["left", "right"]))
    model = build("llava")
    inputs = make("llava", images, words, seed=seed, side=side)
    arguments, record = gripvlm.prune_inputs(model, inputs, "random", keep=keep, return_record=True)
    assert [[s.k for s in sample] for sample in record.selections] == keep
    masked = hidden_from(model, inputs, record.selections)
    with torch.no_grad():
        dropped, reference = model(**arguments).logits, model(**masked).logits
    torch.testing.assert_close(
        dropped[arguments["attention_mask"].bool()], reference[masked["attention_mask"].bool()], atol=4e-5, rtol=4e-5
    )


# --- 8: the selection does not depend on the attention implementation -------------------------------


@pytest.mark.parametrize("pruner", ["pool", *PRUNERS])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_selection_is_the_same_under_sdpa_and_eager(family, pruner):
    inputs = make(family, [1, 2], [7, 9])
    picked = []
    for attention in ("sdpa", "eager"):
        _, record = gripvlm.prune_inputs(build(family, attention), inputs, pruner, keep=6, return_record=True)
        picked.append([[s.indices.tolist() for s in sample] for sample in record.selections])
    assert picked[0] == picked[1]
