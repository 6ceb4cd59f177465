"""The invariants of docs/families.md on every family row: what pruning may not change."""

from __future__ import annotations

import copy
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

import gripvlm
from gripvlm.errors import UnsupportedModelError
from gripvlm.models import FAMILIES, families, family_of
from gripvlm.models.compat import installed
from gripvlm.models.grids import unknown
from tiny_families import LATER, TINY, build, make
from tiny_families.base import IMAGE, TEXT, VISION
from tiny_families.reference import full_positions, kept, masked, teacher_forced

NAMES = sorted(TINY)
MASKING = [name for name in NAMES if FAMILIES[name].equals == "masking"]
DELETION = [name for name in NAMES if FAMILIES[name].equals == "deletion"]
BOTH = pytest.mark.parametrize("attention", ["sdpa", "eager"])
GREEDY = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
IMAGES, WORDS = [1, 2, 0], [7, 9, 5]  # ragged, left-padded, one prompt without any image


def close(name: str, ours: list, expected: list) -> None:
    tolerance = TINY[name].tolerance
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


@lru_cache
def runs(name: str, attention: str) -> SimpleNamespace:
    """The same batch unpruned and pruned by "random" to 5 rows an item, and the record."""
    model, batch = build(name, attention), make(TINY[name], IMAGES, WORDS)
    plain = model.generate(**batch.inputs, **GREEDY)
    with gripvlm.prune(model, "random", keep=5) as record:
        pruned = model.generate(**batch.inputs, **GREEDY)
    return SimpleNamespace(model=model, batch=batch, plain=plain, pruned=pruned, record=record)


def test_every_family_row_has_a_tiny_model():
    assert {*TINY, *LATER} == set(FAMILIES)
    assert all(build(name).config.model_type == name for name in NAMES)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_a_row_that_needs_a_newer_transformers_says_so(name, monkeypatch):
    model = SimpleNamespace(
        config=SimpleNamespace(model_type=name), generate=print, forward=lambda mm_encoder_outputs: 0
    )
    if name in LATER:
        with pytest.raises(UnsupportedModelError, match=f"{name} needs transformers>=5"):
            family_of(model)
        return
    assert family_of(model) is FAMILIES[name]
    monkeypatch.setattr(families, "installed", lambda: (5, 18))
    with pytest.raises(UnsupportedModelError, match=rf"{name} needs transformers>=5\.\d+, installed is 5\.18: pip"):
        family_of(model)


@BOTH
@pytest.mark.parametrize("name", NAMES)
def test_keeping_everything_is_the_unpruned_model_bit_for_bit(name, attention):
    run = runs(name, attention)
    with gripvlm.prune(run.model, "random", keep=1.0) as record:
        kept_all = run.model.generate(**run.batch.inputs, **GREEDY)
    assert torch.equal(kept_all.sequences, run.plain.sequences)
    assert all(torch.equal(a, b) for a, b in zip(kept_all.logits, run.plain.logits, strict=True))
    assert record.kept == record.total == sum(map(sum, run.batch.sizes))


@BOTH
@pytest.mark.parametrize("name", MASKING)
def test_dropping_equals_masking_in_prefill_and_decoding(name, attention):
    run = runs(name, attention)
    reference = run.model.generate(**masked(run.model, run.batch.inputs, run.record.selections), **GREEDY)
    assert torch.equal(run.pruned.sequences, reference.sequences)
    close(name, run.pruned.logits, reference.logits)


@pytest.mark.parametrize("name", NAMES)
def test_the_dropped_rows_did_matter(name):
    run = runs(name, "sdpa")
    assert all((a[:2] - b[:2]).abs().max() > 0.1 for a, b in zip(run.pruned.logits, run.plain.logits, strict=True))


@BOTH
@pytest.mark.parametrize("name", [*DELETION, "llava", "qwen3_vl"])
def test_decoding_equals_one_forward_over_prompt_and_answer(name, attention):
    """What holds where masking is not deletion: prefill and decoding agree about what was dropped."""
    run = runs(name, attention)
    arguments = gripvlm.prune_inputs(run.model, run.batch.inputs, "random", keep=5)
    new = run.pruned.sequences[:, -4:]
    close(name, run.pruned.logits, teacher_forced(run.model, arguments, new))


@pytest.mark.parametrize("name", NAMES)
def test_counts_are_exact_and_text_stays_in_order(name):
    run = runs(name, "sdpa")
    inputs, selections = run.batch.inputs, run.record.selections
    arguments = gripvlm.prune_inputs(run.model, inputs, "random", keep=5)
    assert [[s.n for s in sample] for sample in selections] == run.batch.sizes
    assert {s.k for sample in selections for s in sample} == {5}
    keep = kept(inputs["input_ids"], inputs["attention_mask"], selections)
    positions = full_positions(run.model, inputs)
    for sample in range(3):
        real = arguments["attention_mask"][sample].bool()
        assert torch.equal(arguments["input_ids"][sample][real], inputs["input_ids"][sample][keep[sample]])
        # each kept token is still at its own place (the text row of M-RoPE positions only counts)
        now, before = arguments["position_ids"][..., sample, :][..., real], positions[..., sample, :][..., keep[sample]]
        assert torch.equal(now[-3:] if now.ndim == 2 else now, before[-3:] if now.ndim == 2 else before)
    assert arguments["attention_mask"].sum(-1).max() == arguments["input_ids"].shape[1]  # no idle column
    assert not (arguments["input_ids"][2] == IMAGE).any()


@pytest.mark.parametrize("name", NAMES)
def test_the_rows_are_those_selected_plane_by_plane(name):
    run = runs(name, "sdpa")
    with torch.no_grad():
        encoded = gripvlm.encode(run.model, run.batch.inputs)
        output = gripvlm.prune_inputs(run.model, run.batch.inputs, "random", keep=5)["mm_encoder_outputs"]["image"]
    pairs = [
        (item, selection)
        for items, sample in zip(encoded.samples, run.record.selections, strict=True)
        for item, selection in zip(items, sample, strict=True)
    ]
    parts = [[item.features[s.indices], *([] if item.tail is None else [item.tail])] for item, s in pairs]
    rows = torch.cat([part for own in parts for part in own])
    assert torch.equal(torch.cat(list(output.pooler_output)), rows)
    for depth, plane in enumerate(getattr(output, "deepstack_features", None) or []):
        assert torch.equal(torch.cat(plane), torch.cat([i.deepstack[depth][s.indices] for i, s in pairs]))


def test_a_separator_stays_behind_its_image():
    model, inputs = build("deepseek_ocr2"), make(TINY["deepseek_ocr2"], [1, 2], [7, 9]).inputs
    arguments, record = gripvlm.prune_inputs(model, inputs, "random", keep=1, return_record=True)
    images = arguments["mm_encoder_outputs"]["image"].pooler_output
    assert [len(rows) for rows in images] == [2, 2, 2]
    assert all(torch.equal(rows[1], model.base_model.view_separator) for rows in images)
    assert int((arguments["input_ids"] == IMAGE).sum()) == 6
    assert record.total == int((inputs["input_ids"] == IMAGE).sum()) - 3


@pytest.mark.parametrize("name", NAMES)
def test_the_cache_is_really_shorter(name):
    run = runs(name, "sdpa")
    fewer = (
        run.batch.inputs["input_ids"].shape[1]
        - gripvlm.prune_inputs(run.model, run.batch.inputs, "random", keep=5)["input_ids"].shape[1]
    )
    assert fewer > 0
    lengths = [
        [layer.keys.shape[-2] for layer in cache.layers if getattr(layer, "keys", None) is not None]
        for cache in (run.plain.past_key_values, run.pruned.past_key_values)
    ]
    assert lengths[1] == [length - fewer for length in lengths[0]]
    assert lengths[0]


@BOTH
@pytest.mark.parametrize("name", NAMES)
def test_a_batch_equals_its_samples_alone(name, attention):
    """Also where processors pad pixels to the batch: the draw by "random" comes from an image's own."""
    run = runs(name, attention)
    with gripvlm.prune(run.model, "random", keep=5) as record:
        for sample in range(3):
            alone = run.model.generate(**make(TINY[name], IMAGES, WORDS, only=sample).inputs, **GREEDY)
            picked = [s.indices.tolist() for s in run.record.selections[sample]]
            assert [s.indices.tolist() for s in record.selections[0]] == picked
            assert alone.sequences[0, -4:].tolist() == run.pruned.sequences[sample, -4:].tolist()
            close(name, [a[0] for a in alone.logits], [b[sample] for b in run.pruned.logits])


@pytest.mark.parametrize("name", [name for name in NAMES if {*TINY[name].types(torch.tensor([IMAGE]))}])
def test_positions_of_an_encoding_that_is_reused_are_those_of_its_images(name):
    """The prompt comes without pixels and grids: positions made from grids must come from the encoding's."""
    run = runs(name, "sdpa")
    own = {"input_ids", "attention_mask", *TINY[name].types(run.batch.inputs["input_ids"])}
    bare = {key: value for key, value in run.batch.inputs.items() if key in own}
    encoded = gripvlm.encode(run.model, run.batch.inputs)
    whole = gripvlm.prune_inputs(run.model, run.batch.inputs, "random", keep=5)
    reused = gripvlm.prune_inputs(run.model, bare, "random", keep=5, encoded=encoded)
    assert torch.equal(whole["position_ids"], reused["position_ids"])
    # Molmo2's forward takes this one, but reads it where there are pixels only.
    assert whole.keys() - {"image_num_crops"} == reused.keys()


@pytest.mark.skipif("hunyuan_vl" not in TINY, reason="this transformers has no hunyuan_vl")
def test_hunyuans_images_are_numbered_over_the_batch_and_dropping_still_equals_masking():
    """transformers does the former: without pruning, too, a prompt's logits depend on the images of others."""
    model = copy.deepcopy(build("hunyuan_vl"))
    model.get_decoder().rotary_emb.mrope_section = [2, 2, 1, 1]  # as in real checkpoints, the last axis rotates
    batch, tiny = make(TINY["hunyuan_vl"], IMAGES, WORDS), TINY["hunyuan_vl"]
    alone = model.generate(**make(tiny, IMAGES, WORDS, only=1).inputs, **GREEDY)
    together = model.generate(**batch.inputs, **GREEDY)
    assert (alone.logits[0][0] - together.logits[0][1]).abs().max() > 10 * tiny.tolerance
    with gripvlm.prune(model, "random", keep=5) as record:
        pruned = model.generate(**batch.inputs, **GREEDY)
    reference = model.generate(**masked(model, batch.inputs, record.selections), **GREEDY)
    assert torch.equal(pruned.sequences, reference.sequences)
    close("hunyuan_vl", pruned.logits, reference.logits)


@pytest.mark.parametrize("name", NAMES)
def test_the_selection_is_the_same_under_sdpa_and_eager(name):
    picked = [
        [[s.indices.tolist() for s in sample] for sample in runs(name, attention).record.selections]
        for attention in ("sdpa", "eager")
    ]
    assert picked[0] == picked[1]


@pytest.mark.parametrize("name", NAMES)
def test_the_original_prompt_is_in_front(name):
    run = runs(name, "sdpa")
    ids = run.batch.inputs["input_ids"]
    assert torch.equal(run.pruned.sequences[:, : ids.shape[1]], ids)
    assert run.pruned.sequences.shape[1] == ids.shape[1] + 4


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", MASKING)
def test_a_direct_forward_with_labels_equals_masking(name, side):
    """Ragged counts in one batch, both padding sides, the loss, and every kept token's logits."""
    model, batch = build(name), make(TINY[name], [1, 2], [7, 9], side=side)
    labels = torch.full_like(batch.inputs["input_ids"], -100)
    for row, mask, ids in zip(labels, batch.inputs["attention_mask"], batch.inputs["input_ids"], strict=True):
        answer = mask.nonzero().flatten()[-3:]
        row[answer] = ids[answer]
    full = batch.inputs | {"labels": labels}
    ragged = [[3 + (5 * i + j) % 6 for j, _ in enumerate(sizes)] for i, sizes in enumerate(batch.sizes)]
    with torch.no_grad():
        arguments, record = gripvlm.prune_inputs(model, full, "random", keep=ragged, return_record=True)
        ours = model(**arguments)
        expected = model(**masked(model, full, record.selections))
    keep = kept(full["input_ids"], full["attention_mask"], record.selections)
    close(name, [ours.logits[arguments["attention_mask"].bool()], ours.loss], [expected.logits[keep], expected.loss])


@pytest.mark.parametrize("name", NAMES)
def test_grids_are_those_of_the_pictures(name):
    """The tiny pictures are 4 x 4 tiles, or 3 x 3, 3 x 4 and 4 x 3 rows; joined tiles have no grid."""
    model, batch = build(name), make(TINY[name], [2, 2], [7, 9])
    items = [item for sample in gripvlm.encode(model, batch.inputs).samples for item in sample]
    grids = {item.grid for item in items}
    assert grids == {None} if FAMILIES[name].grid is unknown else grids <= {(3, 3), (3, 4), (4, 3), (4, 4)}
    assert all(item.grid is None or item.grid[0] * item.grid[1] == item.features.shape[0] for item in items)
    assert len({item.key for item in items}) == len(items)
    if "image_grid_thw" in batch.inputs and FAMILIES[name].grid is not unknown:
        assert [item.grid for item in items] == [
            (h // 2, w // 2) for _, h, w in batch.inputs["image_grid_thw"].tolist()
        ]


def test_the_page_has_a_line_for_every_row_that_agrees_with_it():
    """docs/families.md: tower's attention, in-LLM pruners, merging and dropping in the tower, videos."""
    page = (Path(__file__).parents[2] / "docs" / "families.md").read_text(encoding="utf-8")
    lines = [line.strip("|").split("|") for line in page.split("## ")[0].splitlines() if line.startswith("| `")]
    page_rows = {cells[0].split("`")[1]: [cell.strip() == "yes" for cell in cells[2:]] for cells in lines}
    assert page_rows == {
        name: [row.vision is not None, row.layers, row.merges, callable(row.drops), "video" in row.modalities]
        for name, row in FAMILIES.items()
    }


def test_llama4_is_refused_while_its_own_forward_fails():
    """If this fails, transformers has mended it: what it needs then is a row, and its projector called beforehand."""
    if installed() < (5, 24):
        pytest.skip("it fails from transformers 5.24 on")
    text = TEXT | {"head_dim": 12, "intermediate_size_mlp": 96, "num_local_experts": 2, "num_hidden_layers": 1}
    vision = VISION | {"patch_size": 4, "vision_output_dim": 40, "intermediate_size": 128}
    vision |= {"projector_input_dim": 40, "projector_output_dim": 40}
    config = AutoConfig.for_model("llama4", vision_config=vision, text_config=text, image_token_index=IMAGE)
    model = AutoModelForImageTextToText.from_config(config)
    ids = torch.tensor([[1, 11, 12]])
    with pytest.raises(AttributeError, match="image_outputs"):
        model(input_ids=ids)
    with (
        pytest.raises(UnsupportedModelError, match="'llama4' is not supported, because its forward projects"),
        gripvlm.prune(model, "random", keep=5),
    ):
        pytest.fail("the block opened")
