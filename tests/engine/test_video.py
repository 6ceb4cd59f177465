"""Videos, and images and videos in one prompt: processors for video need torchvision, so tensors are fed."""

from __future__ import annotations

import pytest
import torch

import gripvlm
from gripvlm.models import FAMILIES
from gripvlm.models.compat import installed
from tiny_families import TINY, build, make
from tiny_families.reference import kept, masked

NAMES = sorted(name for name, tiny in TINY.items() if tiny.video)
GREEDY = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
MIXES = [["v", "i", "iv"], ["viv", "v"]]  # of each prompt's images and videos, in order


def test_every_family_that_takes_videos_is_tried():
    here = {name: family for name, family in FAMILIES.items() if installed() >= family.since}
    assert {name for name, family in here.items() if "video" in family.modalities} == set(NAMES)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("mix", MIXES, ids="-".join)
@pytest.mark.parametrize("name", NAMES)
def test_images_and_videos_in_any_order_equal_masking(name, mix, attention):
    model, batch = build(name, attention), make(TINY[name], mix, [7, 9, 6][: len(mix)])
    keep = [[3 + 2 * j for j, _ in enumerate(sizes)] for sizes in batch.sizes]
    plain = model.generate(**batch.inputs, **GREEDY)
    with gripvlm.prune(model, "random", keep=1.0):
        everything = model.generate(**batch.inputs, **GREEDY)
    assert all(torch.equal(a, b) for a, b in zip(everything.logits, plain.logits, strict=True))
    with gripvlm.prune(model, "random", keep=keep) as record:
        pruned = model.generate(**batch.inputs, **GREEDY)
    assert [[s.n for s in sample] for sample in record.selections] == batch.sizes  # in prompt order
    assert [[s.k for s in sample] for sample in record.selections] == keep
    reference = model.generate(**masked(model, batch.inputs, record.selections), **GREEDY)
    assert torch.equal(pruned.sequences, reference.sequences)
    for ours, theirs in zip(pruned.logits, reference.logits, strict=True):
        torch.testing.assert_close(ours, theirs, atol=3e-5, rtol=3e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_with_videos_equals_its_samples_alone(name):
    model, mix, words = build(name), ["v", "i", "viv"], [7, 9, 6]
    with gripvlm.prune(model, "random", keep=4) as record:
        together = model.generate(**make(TINY[name], mix, words).inputs, **GREEDY)
        chosen = [[s.indices.tolist() for s in sample] for sample in record.selections]
        for sample in range(3):
            alone = model.generate(**make(TINY[name], mix, words, only=sample).inputs, **GREEDY)
            assert [s.indices.tolist() for s in record.selections[0]] == chosen[sample]
            for a, b in zip(alone.logits, together.logits, strict=True):
                torch.testing.assert_close(a[0], b[sample], atol=3e-5, rtol=3e-5)


@pytest.mark.parametrize("name", NAMES)
def test_items_come_in_prompt_order_and_time_stamps_stay(name):
    """A video's rows may lie in several runs of placeholders, one a frame, with text in between."""
    model, batch = build(name), make(TINY[name], ["viv"], [7])
    (items,) = gripvlm.encode(model, batch.inputs).samples
    assert [item.modality for item in items] == ["video", "image", "video"]
    assert [item.features.shape[0] for item in items] == batch.sizes[0]
    # Kimi's rows are the mean over frames, so they are a raster.
    assert [item.grid is None for item in items] == [name != "kimi_k25", False, name != "kimi_k25"]
    assert len({item.key for item in items}) == 3
    arguments, record = gripvlm.prune_inputs(model, batch.inputs, "random", keep=4, return_record=True)
    keep = kept(batch.inputs["input_ids"], batch.inputs["attention_mask"], record.selections)
    assert torch.equal(arguments["input_ids"][0], batch.inputs["input_ids"][0][keep[0]])


@pytest.mark.parametrize("name", NAMES)
def test_an_encoding_serves_prompts_that_bring_no_grids(name):
    """Positions are made from the encoded items' own patches: repeated, cut out, or put together anew."""
    model, batch = build(name), make(TINY[name], ["iv", "v"], [7, 9])
    text = {n: batch.inputs[n] for n in ("input_ids", "attention_mask", "mm_token_type_ids") if n in batch.inputs}
    with torch.no_grad():
        encoded = gripvlm.encode(model, batch.inputs)
        direct = gripvlm.prune_inputs(model, batch.inputs, "random", keep=4)
        reused = gripvlm.prune_inputs(model, text, "random", keep=4, encoded=encoded)
        swapped = {n: value[[1, 0, 1]] for n, value in text.items()}
        taken = gripvlm.prune_inputs(model, swapped, "random", keep=4, encoded=encoded.take([1, 0, 1]))
        assert torch.equal(reused["position_ids"], direct["position_ids"])
        logits, again = model(**direct).logits, model(**taken).logits
    for ours, theirs in zip(again[:, -1], logits[[1, 0, 1], -1], strict=True):
        torch.testing.assert_close(ours, theirs, atol=3e-5, rtol=3e-5)


def test_an_encoding_keeps_the_seconds_of_its_videos():
    """Qwen2.5-VL's positions are made from them, also where the prompt of the moment does not bring them."""
    model, batch = build("qwen2_5_vl"), make(TINY["qwen2_5_vl"], ["viv", "v"], [7, 9])
    inputs = batch.inputs | {"second_per_grid_ts": torch.tensor([3.0, 0.5, 2.0])}
    encoded = gripvlm.encode(model, inputs)
    asked = {name: inputs[name] for name in ("input_ids", "attention_mask", "mm_token_type_ids")}
    short = gripvlm.prune_inputs(model, asked, "random", keep=4, encoded=encoded)
    whole = gripvlm.prune_inputs(model, inputs, "random", keep=4)
    assert torch.equal(short["position_ids"], whole["position_ids"])
    assert not torch.equal(
        whole["position_ids"], gripvlm.prune_inputs(model, batch.inputs, "random", keep=4)["position_ids"]
    )


def test_missing_token_types_are_refused_since_positions_would_be_wrong():
    inputs = make(TINY["qwen3_vl"], [1], [7]).inputs
    del inputs["mm_token_type_ids"]
    with pytest.raises(gripvlm.GripError, match=r"mm_token_type_ids are missing.*everything the processor returns"):
        gripvlm.prune_inputs(build("qwen3_vl"), inputs, "random", keep=4)
