"""Cells that repeat, merged ahead of the vision tower: which they are, and where that is exact and where not."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import gripvlm
from gripvlm import lab
from gripvlm.engine.pipeline import prune_batch
from gripvlm.engine.request import PruneRequest
from gripvlm.errors import BudgetError, InputError, PrunerError, UnsupportedModelError
from gripvlm.models import FAMILIES
from gripvlm.models.hooks.attention import blocks_of, modules_of
from gripvlm.models.hooks.calls import call_hooks
from gripvlm.models.repeats import Distinct, distinct_cells
from gripvlm.types import Merge, Selection
from tiny_families import TINY, Batch, build, make
from tiny_families.base import END, IMAGE, START, VIDEO, Picture
from tiny_families.mrope import PATCH
from tiny_families.reference import masked

pytestmark = pytest.mark.transformers

NAMES = sorted(name for name in TINY if FAMILIES[name].takes_grids)
PLAIN = sorted(name for name in TINY if FAMILIES[name].merges)  # plain ViTs, where a cell is a patch
ROTARY = ["glm_ocr", "qwen2_vl", "qwen2_5_vl"]  # towers that know places from rotary positions alone
FULL = sorted({*NAMES} - {"qwen2_5_vl"})  # towers without windows
NAMED = pytest.mark.parametrize("name", NAMES)
EXACT = {"atol": 2e-5, "rtol": 2e-5}
ONCE = {"max_new_tokens": 3, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}


# --- which cells repeat -----------------------------------------------------------------------------------------------


def letters(*rows: str) -> Tensor:
    """[1, h, w, 2] cells, equal where the letters are."""
    return torch.tensor([[[[float(ord(letter)), 1.0] for letter in row] for row in rows]])


def left_of(cells: Tensor, threshold: float = 0) -> list[str]:
    """The cells that stay as x, the others as dots."""
    kept = np.full(cells.shape[1] * cells.shape[2], ".")
    kept[distinct_cells(cells, threshold).rows] = "x"
    return ["".join(row) for row in kept.reshape(cells.shape[1:3])]


def test_a_cell_is_predicted_from_its_left_its_upper_and_its_upper_left_neighbour():
    assert left_of(letters("aaaa", "aaaa")) == ["x...", "...."]
    # a vertical edge goes on below: predicted from above. A horizontal one: from the left.
    assert left_of(letters("aabb", "aabb")) == ["x.x.", "...."]
    assert left_of(letters("aaaa", "bbbb")) == ["x...", "x..."]
    # a rectangle: its corner, what is behind it in its first row, what is below its first column
    assert left_of(letters("aaaaa", "abbaa", "abbaa", "aaaaa")) == ["x....", ".x.x.", ".....", ".x..."]
    # equal cells far apart are no repeats: where they are would be lost
    assert left_of(letters("abab", "baba")) == ["xxxx", "xxxx"]
    assert distinct_cells(letters("aabb", "aabb"), 0).slot.tolist() == [0, 0, 1, 1] * 2


def test_frames_do_not_repeat_one_another():
    found = distinct_cells(letters("aa").expand(3, 1, 2, 2), 0)
    assert found.rows.tolist() == [0, 2, 4]
    assert found.sizes.tolist() == [2, 2, 2]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.sampled_from("ab"), min_size=5, max_size=5), min_size=1, max_size=5))
def test_equal_bits_are_the_same_rule_as_no_difference_one_by_one(rows):
    cells = letters(*("".join(row) for row in rows))
    exact, one_by_one = distinct_cells(cells, 0), distinct_cells(cells, 1e-9)
    assert exact.slot.tolist() == one_by_one.slot.tolist()
    kept = cells.flatten(0, 2)[exact.rows]
    assert torch.equal(kept[exact.slot], cells.flatten(0, 2))  # every cell equals the one that stands for it


def test_near_repeats_never_drift_away_from_the_cell_that_stays():
    slope = torch.arange(12.0)[None, None, :, None] * 0.4
    found = distinct_cells(slope, 1.0)
    assert found.rows.tolist() == [0, 3, 6, 9]
    assert left_of(slope, 0.3) == ["x" * 12]


def test_16_bit_pixels_are_compared_too():
    cells = letters("aab")
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert distinct_cells(cells.to(dtype), 0).rows.tolist() == [0, 2]


def test_a_selection_of_what_is_left_as_one_of_all_rows():
    found = Distinct.of(np.array([0, 0, 2, 0, 2, 5]))
    merge = Merge(torch.tensor([1, 2]), torch.tensor([0, 0]), torch.tensor([0.5, 0.5]))
    chosen = Selection(torch.tensor([1]), 3, torch.tensor([0.1, 0.9, 0.3]), merge, (torch.tensor([0, 2]),))
    whole = found.over_all(chosen)
    assert (whole.n, whole.indices.tolist(), whole.layers[0].tolist()) == (6, [2], [0, 5])
    assert whole.scores.tolist() == pytest.approx([0.1, 0.1, 0.9, 0.1, 0.9, 0.3])
    assert (whole.merge.source.tolist(), whole.merge.destination.tolist()) == ([2, 5], [0, 0])


# --- pictures ---------------------------------------------------------------------------------------------------------


def page(paper: float, generator: torch.Generator) -> Picture:
    """8 x 12 patches, 4 x 6 cells: paper, all cells alike, with some of print; the share of paper is 0 to 1."""
    cells = torch.randn(24, 4, PATCH, generator=generator)
    cells[torch.rand(24, generator=generator) < paper] = cells[0].clone()
    tensors = {"pixel_values": cells.flatten(0, 1), "image_grid_thw": torch.tensor([[1, 8, 12]])}
    return Picture([START, *[IMAGE] * 24, END], [24], tensors)


def clip(generator: torch.Generator) -> Picture:
    """Two frames of a page, the way Qwen2-VL's prompts hold them."""
    frame = page(0.6, generator).tensors["pixel_values"]
    tensors = {"pixel_values_videos": torch.cat((frame, frame)), "video_grid_thw": torch.tensor([[2, 8, 12]])}
    return Picture([START, *[VIDEO] * 48, END], [48], tensors, video=True)


def pages(name: str, paper: float = 0.7, images: list = [1, 2, 0], only: int = -1) -> Batch:  # noqa: B006
    picture = replace(TINY[name], picture=partial(page, paper), video=clip)
    return make(picture, images, [7, 9, 5][: len(images)], only=only)


def sheets(name: str, images: list = [1, 2, 0], only: int = -1) -> Batch:  # noqa: B006
    """Square pictures of 4 x 4 patches for a plain ViT, with paper and print, more in some than in others."""
    batch = make(TINY[name], images, [7, 9, 5][: len(images)], only=only)
    pixels, generator = batch.inputs["pixel_values"].clone(), torch.Generator().manual_seed(5)
    size = pixels.shape[-1] // 4
    for image in pixels:
        for row, column in torch.rand(4, 4, generator=generator).lt(0.65).nonzero().tolist():
            image[:, row * size : (row + 1) * size, column * size : (column + 1) * size] = 0.5
    return replace(batch, inputs=batch.inputs | {"pixel_values": pixels})


def blank(name: str) -> Batch:
    """Pictures of one colour: all patches are alike."""
    batch = pages(name)
    pixels = batch.inputs["pixel_values"]
    return replace(batch, inputs=batch.inputs | {"pixel_values": pixels[:1].expand_as(pixels).contiguous()})


def rows_of(arguments: dict[str, Any]) -> list[Tensor]:
    """The rows of all pictures, and of all DeepStack planes."""
    outputs = arguments["mm_encoder_outputs"].values()
    planes = [plane for output in outputs for plane in getattr(output, "deepstack_features", None) or ()]
    return [rows for container in [*(output.pooler_output for output in outputs), *planes] for rows in container]


def joined_rows(arguments: dict[str, Any]) -> Tensor:
    """The rows of all pictures one after the other, whatever container the model wants them in."""
    return torch.cat([rows.reshape(-1, rows.shape[-1]) for rows in rows_of(arguments)])


def all_rows(model: Any, inputs: dict[str, Tensor], selections: list[list[Selection]]) -> list[Tensor]:
    """The same rows of the tower that sees all cells."""
    encoded = gripvlm.encode(model, inputs)
    pairs = [
        (item, selection)
        for items, chosen in zip(encoded.samples, selections, strict=True)
        for item, selection in zip(items, chosen, strict=True)
    ]
    depth = len(pairs[0][0].deepstack)
    planes = [lambda item: item.features, *(lambda item, i=i: item.deepstack[i] for i in range(depth))]
    return [plane(item)[selection.indices] for plane in planes for item, selection in pairs]


def difference(model: Any, inputs: dict[str, Tensor], spec: str = "repeats(full)") -> float:
    """The largest difference of the cells that are left from what a tower that sees all cells makes of them."""
    arguments, record = gripvlm.prune_inputs(model, inputs, spec, return_record=True)
    assert 0 < record.kept < record.total
    return float((joined_rows(arguments) - torch.cat(all_rows(model, inputs, record.selections))).abs().max())


@contextmanager
def scored_by_size(model: Any, inputs: dict[str, Tensor], counted: bool) -> Iterator[None]:
    """Inside, the tower that sees all cells hides those that repeat, and adds log m to the scores of the others' keys.

    For one image, whose cells a tower with windows of 2 x 2 cells has in its own order.
    """
    tower, (h, w) = model.get_encoder("image"), (4, 6)
    found = distinct_cells(inputs["pixel_values"].reshape(1, h, w, -1), 0)
    raster = torch.arange(h * w).reshape(h, w)
    windows = [part.flatten() for row in raster.split(2) for part in row.split(2, dim=1)]

    def bias_of(cells: Tensor) -> Tensor:
        stands = torch.from_numpy(found.rows[found.slot])[cells]
        size = torch.stack([(stands == cell).sum() for cell in cells]).float()
        score = size.log() if counted else size.sign().log()
        return score.clamp(min=-1e9).repeat_interleave(4)

    in_order = torch.cat(windows) if hasattr(tower, "window_size") else raster.flatten()
    full = [bias_of(in_order)]
    parts = [bias_of(window) for window in windows]
    calls: dict[Any, Iterator[Tensor]] = {}
    whole = getattr(tower, "fullatt_block_indexes", range(len(blocks_of(tower))))
    attention = modules_of(tower)

    def begin(module: Any, args: Any, kwargs: Any) -> None:
        calls.update({inner: iter(full if block in whole else parts) for inner, block in attention.items()})

    def add(call: Any) -> None:
        call.mask = next(calls[call.module])[None, None, None]

    with call_hooks({tower: begin}, {}, dict.fromkeys(attention, add)):
        yield


@lru_cache
def without_places(name: str) -> Any:
    """The family's model with a tower that cannot tell one place from another."""
    model = copy.deepcopy(build(name))
    tower = model.get_encoder("image")
    with torch.no_grad():
        for place, table in [*tower.named_parameters(), *tower.named_buffers()]:
            if any(part in place for part in ("pos_embed", "position_embedding", "inv_freq")):
                table.zero_()
    return model


# --- what is exact, and what is not -----------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("counted", [True, False])
@NAMED
def test_the_tower_runs_as_if_it_saw_all_cells_and_attended_to_those_that_are_left(name, counted, attention):
    model, inputs = build(name, attention), pages(name, images=[1], only=0).inputs
    spec = f"repeats(full):counted={counted}"
    with torch.no_grad():
        arguments, record = gripvlm.prune_inputs(model, inputs, spec, return_record=True)
        assert 6 < record.kept < 20
        with scored_by_size(model, inputs, counted):
            expected = all_rows(model, inputs, record.selections)
    for ours, theirs in zip(rows_of(arguments), expected, strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)


@pytest.mark.parametrize("counted", [True, False])
@NAMED
@torch.no_grad()
def test_a_blank_page_is_exact_where_places_are_rotary_alone(name, counted):
    # Values are all alike, so that no weights matter; places that are added to patches make them differ.
    far = difference(build(name), blank(name).inputs, f"repeats(full):counted={counted}")
    assert far < 1e-5 if name in ROTARY else far > 1e-2


@pytest.mark.parametrize("name", [*FULL, *PLAIN])
@torch.no_grad()
def test_places_are_all_that_keeps_a_counted_merge_from_being_exact(name):
    inputs = (sheets if name in PLAIN else pages)(name).inputs
    assert difference(without_places(name), inputs) < 1e-5
    assert difference(without_places(name), inputs, "repeats(full):counted=False") > 1e-2
    assert difference(build(name), inputs) > 1e-2


@torch.no_grad()
def test_merging_across_windows_is_not_exact_even_without_places():
    assert difference(without_places("qwen2_5_vl"), pages("qwen2_5_vl").inputs) > 1e-2


@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", PLAIN)
@torch.no_grad()
def test_a_plain_tower_runs_as_if_it_saw_all_patches_and_attended_to_those_that_are_left(name, attention, counted):
    model, inputs = build(name, attention), sheets(name).inputs
    arguments, record = gripvlm.prune_inputs(model, inputs, f"repeats(full):counted={counted}", return_record=True)
    assert len({s.k for images in record.selections for s in images}) > 1  # so that some are padded
    tower = model.get_encoder("image")
    patch, biases = model.config.vision_config.patch_size, []
    for image in inputs["pixel_values"]:
        cells = image.unfold(1, patch, patch).unfold(2, patch, patch).permute(1, 2, 0, 3, 4).flatten(2)
        found = distinct_cells(cells[None], 0)
        size = torch.zeros(len(found.slot))
        size[found.rows] = torch.from_numpy(found.sizes if counted else np.ones(len(found.rows))).float()
        biases.append(size.log().clamp(min=-1e9))

    def add(call: Any) -> None:
        bias = torch.stack(biases)
        call.mask = torch.nn.functional.pad(bias, (call.key.shape[2] - bias.shape[1], 0))[:, None, None]

    with call_hooks(attention=dict.fromkeys(modules_of(tower), add)):
        expected = torch.cat(all_rows(model, inputs, record.selections))
    torch.testing.assert_close(joined_rows(arguments), expected, atol=1e-4, rtol=2e-5)


@pytest.mark.parametrize("name", PLAIN)
@torch.no_grad()
def test_plain_towers_in_batches_and_with_an_inner_pruner(name):
    model, batch = build(name), sheets(name)
    together = gripvlm.prune_inputs(model, batch.inputs, "repeats(divprune)", 0.5, return_record=True)
    # the pictures of the second prompt, alone
    second = make(TINY[name], [1, 2, 0], [7, 9, 5], only=1).inputs | {"pixel_values": batch.inputs["pixel_values"][1:]}
    alone = gripvlm.prune_inputs(model, second, "repeats(divprune)", 0.5, return_record=True)
    chosen = [[s.indices.tolist() for s in images] for images in together[1].selections]
    assert chosen[1:] == [[s.indices.tolist() for s in alone[1].selections[0]], []]
    rows = joined_rows(together[0])[len(chosen[0][0]) :]
    torch.testing.assert_close(rows, joined_rows(alone[0]), atol=1e-4, rtol=2e-5)
    with gripvlm.prune(model, "repeats(divprune)", keep=0.5) as record:
        model.generate(**batch.inputs, **ONCE)
    assert [[s.indices.tolist() for s in images] for images in record.selections] == chosen


@NAMED
@torch.no_grad()
def test_without_repeats_nothing_changes_bit_for_bit(name):
    model, inputs = build(name), pages(name, paper=0.0).inputs
    plain = model.generate(**inputs, **ONCE)
    with gripvlm.prune(model, "repeats(full)") as record:
        ours = model.generate(**inputs, **ONCE)
    assert record.kept == record.total == 72
    assert torch.equal(ours.sequences, plain.sequences)
    assert all(torch.equal(a, b) for a, b in zip(ours.logits, plain.logits, strict=True))


@pytest.mark.parametrize("name", ROTARY)
def test_the_language_model_gets_a_cell_that_is_left_at_its_own_place(name):
    # On a blank page the rows are exact, so that all that is left to differ are places and masks.
    model, inputs = build(name), blank(name).inputs
    with gripvlm.prune(model, "repeats(full)") as record:
        ours = model.generate(**inputs, **ONCE)
    assert [[s.indices.tolist() for s in images] for images in record.selections] == [[[0]], [[0], [0]], []]
    theirs = model.generate(**masked(model, inputs, record.selections), **ONCE)
    assert torch.equal(ours.sequences, theirs.sequences)
    for a, b in zip(ours.logits, theirs.logits, strict=True):
        torch.testing.assert_close(a, b, atol=5e-5, rtol=5e-5)


# --- with other pruners, budgets, batches -----------------------------------------------------------------------------


@pytest.mark.parametrize("inner", ["divprune", "mmr(norm)", "split(norm)", "fastv"])
@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
@torch.no_grad()
def test_the_inner_pruner_keeps_some_of_what_is_left(name, inner):
    model, inputs = build(name), pages(name).inputs
    left = gripvlm.prune_inputs(model, inputs, "repeats(full)", return_record=True)[1]
    with gripvlm.prune(model, f"repeats({inner})", keep=0.75) as record:
        model.generate(**inputs, **ONCE)
    counts = [s.k for images in left.selections for s in images]
    assert record.paid == pytest.approx(sum(max(1, int(0.75 * k + 0.5)) for k in counts), abs=0.5 * len(counts))
    assert record.total == left.total == 72
    assert record.tower_kept == left.tower_kept == left.kept < 72
    assert f"of 72 visual tokens kept ({100 * record.paid / 72:.3g} %), {left.kept} in the vision tower," in str(record)
    for images, whole in zip(record.selections, left.selections, strict=True):
        for chosen, possible in zip(images, whole, strict=True):
            assert {*chosen.indices.tolist()} <= {*possible.indices.tolist()}
            assert all({*layer.tolist()} <= {*possible.indices.tolist()} for layer in chosen.layers)


@NAMED
@torch.no_grad()
def test_a_batch_equals_its_prompts_one_by_one(name):
    model = build(name)
    batch = gripvlm.prune_inputs(model, pages(name).inputs, "repeats(norm)", 0.5, return_record=True)
    alone = [
        gripvlm.prune_inputs(model, pages(name, only=i).inputs, "repeats(norm)", 0.5, return_record=True)
        for i in (0, 1)
    ]
    chosen = [[s.indices.tolist() for s in images] for images in batch[1].selections]
    assert chosen == [[s.indices.tolist() for s in one[1].selections[0]] for one in alone] + [[]]
    rows = [
        batch[0]["mm_encoder_outputs"]["image"].pooler_output,
        *(one[0]["mm_encoder_outputs"]["image"].pooler_output for one in alone),
    ]
    for ours, theirs in zip(rows[0], [*rows[1], *rows[2]], strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)
    for row, (arguments, _) in enumerate(alone):
        mask = batch[0]["attention_mask"][row].bool()
        assert torch.equal(batch[0]["position_ids"][..., row, :][..., mask], arguments["position_ids"][..., 0, :])


@pytest.mark.parametrize("name", ROTARY)
@torch.no_grad()
def test_pictures_and_videos_of_one_prompt(name):
    model, inputs = build(name), pages(name, images=["iv", "v", 1]).inputs
    arguments, record = gripvlm.prune_inputs(model, inputs, "repeats(full)", return_record=True)
    assert [len(images) for images in record.selections] == [2, 1, 1]
    video = record.selections[1][0].indices
    # both frames of the clip are one page: each loses the same cells
    first = video[video < 24]
    assert torch.equal(video[video >= 24] - 24, first)
    # frames do not see each other, and a tower does not tell them apart: their rows are equal
    rows = arguments["mm_encoder_outputs"]["video"].pooler_output[1]
    torch.testing.assert_close(rows[: len(first)], rows[len(first) :], **EXACT)
    for inner in (0, 1, 2):
        assert record.selections[inner][0].k < record.selections[inner][0].n


@torch.no_grad()
def test_proportional_attention_knows_how_many_cells_a_token_stands_for():
    model, inputs = build("qwen2_vl"), pages("qwen2_vl", images=[1], only=0).inputs
    request = PruneRequest.of(model, "repeats(full)", proportional_attention=True)
    run = prune_batch(request, inputs).run
    sizes = run._from[0][0]
    left = distinct_cells(inputs["pixel_values"].reshape(1, 4, 6, -1), 0)
    assert sorted(sizes.tolist()) == sorted([*left.sizes.tolist(), *[1] * (sizes.numel() - len(left.sizes))])
    with gripvlm.prune(model, "repeats(full)", proportional_attention=True):
        weighed = model.generate(**inputs, **ONCE).logits
    with gripvlm.prune(model, "repeats(full)"):
        plain = model.generate(**inputs, **ONCE).logits
    assert float((weighed[0] - plain[0]).abs().max()) > 1e-2


def test_gradients_reach_the_pixels_of_cells_that_are_left():
    model, inputs = build("qwen2_vl"), pages("qwen2_vl", images=[1], only=0).inputs
    pixels = inputs["pixel_values"].clone().requires_grad_()
    arguments, record = gripvlm.prune_inputs(
        model, inputs | {"pixel_values": pixels}, "repeats(full)", return_record=True
    )
    rows_of(arguments)[0].square().sum().backward()
    seen = pixels.grad.reshape(24, -1).abs().sum(1) > 0
    assert seen.nonzero().flatten().tolist() == record.selections[0][0].indices.tolist()


def test_after_the_block_the_tower_is_as_before():
    model, inputs = build("qwen2_5_vl"), pages("qwen2_5_vl").inputs
    before = model.generate(**inputs, **ONCE).logits[0]
    with gripvlm.prune(model, "repeats(full)"):
        assert not torch.equal(model.generate(**inputs, **ONCE).logits[0], before)
    assert torch.equal(model.generate(**inputs, **ONCE).logits[0], before)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "error"),
    [
        ("repeats(grid)", "'repeats' leaves no plain raster.*'grid' needs grid: wrap one"),
        ("repeats(vispruner)", "'vispruner' needs patches and vision_attention: wrap"),
        ("repeats(tome)", "wraps pruners that drop tokens at the input or the llm, but 'tome' drops them at vision"),
        ("mmr(repeats(norm))", "wraps pruners that drop tokens at the input, but 'repeats' drops them at pixels"),
        ("repeats(norm):threshold=-1", "pass threshold=0.02, 0 or more"),
    ],
)
def test_pruners_that_it_cannot_wrap(spec, error):
    with pytest.raises(PrunerError, match=error):
        gripvlm.get_pruner(spec)


@pytest.mark.parametrize("name", sorted({*TINY} - {*NAMES} - {*PLAIN}))
def test_other_towers_are_refused(name):
    with pytest.raises(UnsupportedModelError, match=rf"ahead of {name}'s vision tower: it needs .*qwen2_5_vl"):
        PruneRequest.of(build(name), "repeats(norm)", 4)


def test_patches_that_see_their_neighbours_and_rows_of_a_class_token_are_refused(monkeypatch):
    with pytest.raises(UnsupportedModelError, match="a LabVisionModel makes each patch from its neighbours' pixels"):
        PruneRequest.of(lab.load()[0], "repeats(norm)", 4)
    model = build("llava")
    monkeypatch.setattr(model.config, "vision_feature_select_strategy", "full")
    with pytest.raises(UnsupportedModelError, match="the CLS token is one of the image's rows"):
        PruneRequest.of(model, "repeats(norm)", 4)


def test_flash_attention_takes_no_counts(monkeypatch):
    model = build("qwen2_vl")
    monkeypatch.setattr(model.get_encoder("image").config, "_attn_implementation", "flash_attention_2")
    with pytest.raises(UnsupportedModelError, match="counted=False"):
        PruneRequest.of(model, "repeats(norm)", 4)
    assert PruneRequest.of(model, "repeats(norm):counted=False", 4).needs.repeats is not None


def test_more_than_is_left_and_no_pixels():
    model, inputs = build("qwen2_vl"), blank("qwen2_vl").inputs
    with pytest.raises(
        BudgetError, match="image 0 of sample 0, its repeats merged, has only 1 visual tokens: pass keep='<=4'"
    ):
        gripvlm.prune_inputs(model, inputs, "repeats(norm)", 4)
    assert gripvlm.prune_inputs(model, inputs, "repeats(norm)", "<=4", return_record=True)[1].kept == 3
    encoded = gripvlm.encode(model, inputs)
    without = {name: value for name, value in inputs.items() if name != "pixel_values"}
    with pytest.raises(InputError, match=r"'repeats' merges ahead of the vision tower.*leave the pixels"):
        gripvlm.prune_inputs(model, without, "repeats(norm)", "<=4", encoded=encoded)
    with pytest.raises(InputError, match="pixel_values have 1 patches, but the grids 288"):
        gripvlm.prune_inputs(model, inputs | {"pixel_values": inputs["pixel_values"][:1]}, "repeats(norm)", "<=4")
