"""Rows dropped inside the vision tower, against a whole tower in which their patches are masked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import gripvlm
from gripvlm.errors import BudgetError, InputError, PrunerError, UnsupportedModelError
from gripvlm.models import FAMILIES
from gripvlm.models.hooks.attention import blocks_of, modules_of
from gripvlm.models.hooks.calls import AttentionCall, call_hooks
from gripvlm.models.vision_rules import TowerItems
from gripvlm.pruners import get_pruner
from gripvlm.pruners.base import top_k
from gripvlm.pruners.baselines.given import Given
from tiny_families import TINY, build, make

NAMES = sorted(name for name in TINY if not isinstance(FAMILIES[name].drops, str))
REFUSED = sorted(name for name in TINY if isinstance(FAMILIES[name].drops, str))
WINDOWS, PLAIN = "qwen2_5_vl", "llava"
IMAGES, WORDS = [1, 2], [7, 9]
ONCE = {"max_new_tokens": 3, "do_sample": False}


@cache
def inputs_of(name: str) -> dict[str, Tensor]:
    """A ragged batch; with a video where the family takes any."""
    video = "video" in FAMILIES[name].modalities
    return make(TINY[name], ["iv", "i"] if video else IMAGES, WORDS).inputs


def indicators(model: Any, name: str, inputs: dict[str, Tensor], modality: str, sizes: list[int], length: int) -> Any:
    """[P, n] of each item: which of its rows each of the P places of a sequence is a part of, by the family's rule."""
    grids = inputs.get(f"{modality}_grid_thw")
    sequences = len(sizes) if grids is None else 1
    maps = torch.eye(length).expand(sequences, -1, -1)
    return FAMILIES[name].vision.rows(TowerItems(model, inputs, modality, sizes), [maps])


@contextmanager
def masked(model: Any, name: str, inputs: dict[str, Tensor], items: list[tuple[str, list[int], int]], block: int):
    """Inside, the tower's blocks from `block` on hide the patches of all rows but those of `items`: (modality, the rows
    that are seen, n) of each, in the order of the prompts."""
    hidden: list[Tensor] = []  # [b, P] of each run of the tower, in its order
    for modality in ("image", "video"):
        mine = [(rows, n) for kind, rows, n in items if kind == modality]
        if not mine:
            continue
        grids = inputs.get(f"{modality}_grid_thw")
        pixels = inputs["pixel_values"].shape
        tower = model.get_encoder("image")
        if grids is None:
            side = model.config.vision_config.patch_size
            side = side if isinstance(side, int) else side[0]
            length = (pixels[-1] // side) ** 2 + (name in ("llava", "internvl"))  # a CLS token
        else:
            length = int(grids.prod(-1).sum())
        own = indicators(model, name, inputs, modality, [n for _, n in mine], length)
        seen = [rows_of[:, rows].sum(1) > 0 for rows_of, (rows, _) in zip(own, mine, strict=True)]
        special = torch.stack([rows_of.sum(1) == 0 for rows_of in own]).all(0)  # parts of no row of any item
        if grids is None:
            hidden.append(~(torch.stack(seen) | special))
        else:
            hidden.append(~torch.stack(seen).any(0)[None])
    done: dict[Any, list[int]] = {}

    def hide(call: AttentionCall) -> None:
        run, start = done.setdefault(call.module, [0, 0])
        length = call.key.shape[2]
        part = hidden[run][:, start : start + length]
        done[call.module] = [run, start + length] if start + length < hidden[run].shape[1] else [run + 1, 0]
        # A window of which nothing is kept would be NaN, and no kept patch sees it.
        part = part & ~part.all(1, keepdim=True)
        lowest = torch.finfo(call.query.dtype).min
        call.mask = torch.zeros(part.shape).masked_fill(part, lowest)[:, None, None].expand(-1, 1, length, -1)

    tower = model.get_encoder("image")
    with call_hooks(attention=dict.fromkeys(modules_of(tower, range(block, len(blocks_of(tower)))), hide)):
        yield


def compared(name: str, attention: str, block: int, inside: str = "norm", keep: float = 0.4) -> Iterator[Any]:
    """(what pruning in the tower gives, what masking gives) of the kept rows: features, planes, logits."""
    model, inputs = build(name, attention), inputs_of(name)
    with torch.no_grad():
        # The budget is that of the tower, so nothing is chosen behind it, and the selections are the tower's.
        spec = f"tower({inside},norm):block={block},tower_keep={keep}"
        arguments, record = gripvlm.prune_inputs(model, inputs, spec, keep, return_record=True)
        kept = [[s.indices for s in sample] for sample in record.selections]
        whole = gripvlm.encode(model, inputs)
        items = [
            (item.modality, rows.tolist(), item.features.shape[0])
            for sample, selected in zip(whole.samples, kept, strict=True)
            for item, rows in zip(sample, selected, strict=True)
        ]
        with masked(model, name, inputs, items, block):
            encoded = gripvlm.encode(model, inputs)
        scores = [
            [torch.zeros(item.features.shape[0]).index_fill(0, rows, 1.0) for item, rows in zip(*pair, strict=True)]
            for pair in zip(encoded.samples, kept, strict=True)
        ]
        counts = [[len(rows) for rows in sample] for sample in kept]
        expected = gripvlm.prune_inputs(model, inputs, Given(scores), counts, encoded=encoded)
        for modality, output in arguments["mm_encoder_outputs"].items():
            want = expected["mm_encoder_outputs"][modality]
            yield from zip(output.pooler_output, want.pooler_output, strict=True)
            for one, two in zip(
                getattr(output, "deepstack_features", ()), getattr(want, "deepstack_features", ()), strict=True
            ):
                yield from zip(one, two, strict=True)
        assert torch.equal(arguments["position_ids"], expected["position_ids"])
        yield model(**arguments).logits, model(**expected).logits
        plain = gripvlm.prune_inputs(model, inputs, Given(scores), counts, encoded=whole)
        assert not torch.allclose(model(**plain).logits, model(**expected).logits, atol=1e-3)  # masking does something


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("block", [0, 1])
@pytest.mark.parametrize("name", NAMES)
def test_dropping_is_masking_from_that_block_on(name, block, attention):
    for ours, expected in compared(name, attention, block):
        # Logits spread over about +-10, and sums are taken in another order.
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("inside", ["random", "divprune", "hired"])
@pytest.mark.parametrize("name", [PLAIN, WINDOWS])
def test_any_score_that_can_be_had_there(name, inside):
    for ours, expected in compared(name, "sdpa", 1, inside, 0.3):
        torch.testing.assert_close(ours, expected, atol=3e-5, rtol=3e-5)


@pytest.mark.parametrize("name", NAMES)
def test_keeping_everything_is_the_untouched_model_and_the_tower_is_as_before(name):
    model, inputs = build(name), inputs_of(name)
    with torch.no_grad():
        plain = gripvlm.prune_inputs(model, inputs, "keep_all")
        whole = gripvlm.prune_inputs(model, inputs, "tower(random,norm):block=1,tower_keep=1.0", 1.0)
        gripvlm.prune_inputs(model, inputs, "tower(norm):block=0,tower_keep=0.5", 0.5)
        again = gripvlm.prune_inputs(model, inputs, "keep_all")
    for modality, output in plain["mm_encoder_outputs"].items():
        for other in (whole, again):
            rows = other["mm_encoder_outputs"][modality].pooler_output
            assert all(torch.equal(one, two) for one, two in zip(rows, output.pooler_output, strict=True))


@pytest.mark.parametrize("name", [PLAIN, WINDOWS])
def test_a_batch_is_its_samples_alone(name):
    """k' of n in the tower, then k of the k' that are left, by another score."""

    def chosen(only: int) -> list[list[tuple[int, ...]]]:
        model, inputs = build(name), make(TINY[name], IMAGES, WORDS, only=only).inputs
        with gripvlm.prune(model, "tower(random,divprune):block=1,tower_keep=0.5", "25%") as record:
            model.generate(**inputs, **ONCE)
        for selection in (selection for sample in record.selections for selection in sample):
            assert selection.tower == round(selection.n / 2 + 0.01)
            assert selection.k == max(1, int(selection.n / 4 + 0.5))
        assert f"{record.tower_kept} in the vision tower" in str(record)
        return [[tuple(s.indices.tolist()) for s in sample] for sample in record.selections]

    assert chosen(-1) == [chosen(0)[0], chosen(1)[0]]


@pytest.mark.parametrize("name", [PLAIN, WINDOWS])
def test_later_blocks_really_see_fewer_tokens(name):
    model, inputs = build(name), make(TINY[name], [1], [7]).inputs
    seen: list[int] = []
    blocks = blocks_of(model.get_encoder("image"))
    hooks = [block.mlp.register_forward_pre_hook(lambda m, args: seen.append(args[0].shape[-2])) for block in blocks]
    gripvlm.prune_inputs(model, inputs, "tower(norm):block=1,tower_keep=3", 2)
    for hook in hooks:
        hook.remove()
    # A CLS token stays in front of 3 patches; 3 rows have 2 x 2 patches each.
    assert seen[1:] == [4 if name == PLAIN else 12] * (len(blocks) - 1)
    assert seen[0] > seen[1]


def test_attention_in_the_tower_is_that_of_the_block_before():
    model, inputs = build(PLAIN), inputs_of(PLAIN)
    with torch.no_grad():
        _, record = gripvlm.prune_inputs(
            model, inputs, "tower(fastervlm,norm):block=1,tower_keep=5", 5, return_record=True
        )
        encoded = gripvlm.encode(model, inputs, [FasterVLM0()])
    for sample, selections in zip(encoded.samples, record.selections, strict=True):
        for item, selection in zip(sample, selections, strict=True):
            assert torch.equal(selection.indices, top_k(item.vision[0].cls.mean(0), 5))


class FasterVLM0(type(get_pruner("fastervlm"))):  # type: ignore[misc]
    """Reads block 0."""

    vision_layers = (0,)


def test_a_pruner_behind_the_tower_reads_its_last_blocks_as_the_rows_that_are_left_see_them():
    model, inputs = build(PLAIN), make(TINY[PLAIN], [1], [7]).inputs
    with torch.no_grad():
        spec = "tower(norm,norm):block=1,tower_keep=6"
        _, record = gripvlm.prune_inputs(model, inputs, spec, 6, return_record=True)
        rows = record.selections[0][0].indices
        with masked(model, PLAIN, inputs, [("image", rows.tolist(), 16)], 1):
            expected = gripvlm.encode(model, inputs, ["fastervlm"]).samples[0][0].vision[-2].cls
        _, record = gripvlm.prune_inputs(
            model, inputs, "tower(norm,fastervlm):block=1,tower_keep=6", 3, return_record=True
        )
    assert torch.equal(record.selections[0][0].indices, rows[top_k(expected[:, rows].mean(0), 3)])


@pytest.mark.parametrize("name", REFUSED)
def test_other_towers_are_refused_at_once_with_the_reason(name):
    with pytest.raises(UnsupportedModelError, match=f"inside {name}'s vision tower is not supported, as "):
        gripvlm.prune(build(name), "tower(norm)", 4)


@pytest.mark.parametrize(
    ("error", "match", "spec", "keep"),
    [
        (InputError, "blocks 0 to 1: pass block=1 or less", "tower(norm):block=2", 4),
        (BudgetError, "tower_keep=4 leaves 4 of them: pass a smaller keep", "tower(norm):block=1,tower_keep=4", 5),
        (BudgetError, "each image \\(tower_keep\\) has only 16", "tower(norm):block=1,tower_keep=17", 5),
        (BudgetError, "tower_keep=0 keeps nothing: .* such as tower_keep=", "tower(norm):block=1,tower_keep=0", 5),
        (PrunerError, "block=4, 0 or more", "tower(norm):block=-1", 4),
        (PrunerError, "takes one pruner, or two, got 3", "tower(norm,norm,norm)", 4),
        (PrunerError, "'cdpruner' needs question, which there is not", "tower(cdpruner,norm):block=1", 4),
        (PrunerError, "block=0 is the first", "tower(fastervlm,norm):block=0", 4),
        (PrunerError, "'grid' needs grid of all rows", "tower(norm,grid)", 4),
        (PrunerError, "drops them at llm", "tower(norm,fastv)", 4),
        (PrunerError, "drops them at vision", "spread(tower(norm))", 4),
    ],
)
def test_what_cannot_be_is_refused(error, match, spec, keep):
    model = build("paligemma")
    with pytest.raises(error, match=match):
        gripvlm.prune_inputs(model, inputs_of("paligemma"), spec, keep)


def test_an_encoding_of_all_rows_does_not_serve():
    model, inputs = build(PLAIN), inputs_of(PLAIN)
    encoded = gripvlm.encode(model, inputs)
    bare = {name: value for name, value in inputs.items() if name != "pixel_values"}
    with pytest.raises(InputError, match="works inside the vision tower"):
        gripvlm.prune_inputs(model, bare, "tower(norm):block=1", 4, encoded=encoded)
