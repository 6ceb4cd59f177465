"""ToMe inside the vision tower, against a tower in float64 that does one token and one pair at a time."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import gripvlm
from gripvlm.engine.outputs import checked_selection
from gripvlm.errors import BudgetError, InputError, PrunerError, UnsupportedModelError
from gripvlm.models import FAMILIES
from gripvlm.pruners import Pruner, TowerPruner, get_pruner
from gripvlm.pruners.ops.merging import soft_matching
from gripvlm.pruners.tower.tome import ToMe
from gripvlm.types import VisualTokens, sizes_after
from naive import cosine
from tiny_families import TINY, build, make
from tiny_models import tiny_llava_own_tower

NAMES = sorted(name for name in TINY if FAMILIES[name].merges)
IMAGES, WORDS = [1, 2, 0], [7, 9, 5]
ONCE = {"max_new_tokens": 3, "do_sample": False}
CLS = {"llava": 1, "paligemma": 0}
BLOCKS = {"llava": 2, "paligemma": 2}  # llava has 3 and reads the last but one


def attended(block: Any, x: list[Tensor], sizes: list[int] | None) -> tuple[list[Tensor], list[Tensor]]:
    """Tokens after the attention of a block, one query at a time, and their keys, the mean over heads."""
    attention, normed = block.self_attn, [block.layer_norm1(one) for one in x]
    split = [[part(one).view(attention.num_heads, -1) for one in normed] for part in _parts(attention)]
    queries, keys, values = split
    out = []
    for i, one in enumerate(x):
        heads = []
        for h in range(attention.num_heads):
            scores = torch.stack([queries[i][h] @ key[h] / math.sqrt(len(key[h])) for key in keys])
            if sizes is not None:
                scores = scores + torch.tensor([math.log(size) for size in sizes], dtype=torch.float64)
            weights = scores.softmax(0)
            heads.append(sum(weight * value[h] for weight, value in zip(weights, values, strict=True)))
        out.append(one + attention.out_proj(torch.cat(heads)))
    return out, [key.mean(0) for key in keys]


def _parts(attention: Any) -> tuple[Any, Any, Any]:
    return attention.q_proj, attention.k_proj, attention.v_proj


def slow_tower(model: Any, name: str, pixels: Tensor, plan: list[int], proportional: bool) -> dict[int, tuple]:
    """Row -> (what the projector makes of it, the rows it stands for), for one image."""
    tower = model.get_encoder("image")
    tower = getattr(tower, "vision_model", tower)
    x = tower.embeddings(pixels[None])[0]
    x = list(tower.pre_layrnorm(x) if hasattr(tower, "pre_layrnorm") else x)
    members = [[i] for i in range(len(x))]
    fixed = CLS[name]
    for block, merges in zip(tower.encoder.layers, plan, strict=False):
        x, keys = attended(block, x, [len(m) for m in members] if proportional else None)
        edges = []
        for even in range(0, len(x), 2):
            if even >= fixed and len(x) > 1:
                odd = max(range(1, len(x), 2), key=lambda j: cosine(keys[even], keys[j]))
                edges.append((cosine(keys[even], keys[odd]), even, odd))
        for _, even, odd in sorted(edges, key=lambda edge: (-edge[0], edge[1]))[:merges]:
            a, b = len(members[even]), len(members[odd])
            x[odd] = (a * x[even] + b * x[odd]) / (a + b)
            members[odd], members[even] = [*members[odd], *members[even]], []
        left = [i for i in range(len(x)) if members[i]]
        x, members = [x[i] for i in left], [members[i] for i in left]
        x = [one + block.mlp(block.layer_norm2(one)) for one in x]
    rows = torch.stack(x)
    rows = tower.post_layernorm(rows) if name == "paligemma" else rows
    rows = model.base_model.multi_modal_projector(rows[fixed:])
    return {m[0] - fixed: (row, sorted(i - fixed for i in m)) for row, m in zip(rows, members[fixed:], strict=True)}


@pytest.mark.parametrize("proportional", [True, False])
@pytest.mark.parametrize("keep", [4, 7, 9, 12])
@pytest.mark.parametrize("name", NAMES)
def test_tome_is_the_naive_tower(name, keep, proportional):
    """Which rows merge, what they become, and where they stand, image by image."""
    pruner = ToMe(proportional)
    model, batch = build(name), make(TINY[name], [1, 2], [7, 9])
    double = copy.deepcopy(model).double()
    plan = pruner.plan(16 + CLS[name], keep + CLS[name], BLOCKS[name], CLS[name])
    with torch.no_grad():
        arguments, record = gripvlm.prune_inputs(model, batch.inputs, pruner, keep, return_record=True)
        rows = list(arguments["mm_encoder_outputs"]["image"].pooler_output)
        selections = [s for sample in record.selections for s in sample]
        for pixels, row, selection in zip(batch.inputs["pixel_values"], rows, selections, strict=True):
            expected = slow_tower(double, name, pixels.double(), plan, proportional)
            assert selection.indices.tolist() == sorted(expected)
            want = torch.stack([expected[i][0] for i in sorted(expected)])
            torch.testing.assert_close(row.double(), want, atol=2e-5, rtol=2e-5)
            sizes = sizes_after(selection.indices, selection.n, selection.merge)
            assert sizes.tolist() == [len(expected[i][1]) for i in sorted(expected)]
            if selection.merge is not None:
                went: dict[int, list[int]] = {}
                for source, slot in zip(
                    selection.merge.source.tolist(), selection.merge.destination.tolist(), strict=True
                ):
                    went.setdefault(int(selection.indices[slot]), []).append(source)
                assert went == {i: group for i, (_, group) in expected.items() if len(group) > 1}


@pytest.mark.parametrize("name", NAMES)
def test_a_ragged_batch_like_its_samples_alone_and_sdpa_like_eager(name):
    def chosen(attention: str = "sdpa", **only: int) -> list[list[list[int]]]:
        model = build(name, attention)
        with gripvlm.prune(model, "tome", 0.4) as record:
            model.generate(**make(TINY[name], IMAGES, WORDS, **only).inputs, **ONCE)
        assert all(s.k == 6 for sample in record.selections for s in sample)
        return [[s.indices.tolist() for s in sample] for sample in record.selections]

    together = chosen()
    assert together == [chosen(only=i)[0] for i in range(3)]
    assert together == chosen("eager")


@pytest.mark.parametrize("name", NAMES)
def test_keeping_everything_is_the_untouched_model_and_the_tower_is_as_before(name):
    model, inputs = build(name), make(TINY[name], IMAGES, WORDS).inputs
    blocks = list(model.get_encoder("image").modules())
    whole = gripvlm.prune_inputs(model, inputs, "keep_all")
    plain = model(**whole).logits
    with torch.no_grad(), gripvlm.pruned_run(model, inputs, "tome", 1.0) as (arguments, record):
        assert torch.equal(model(**arguments).logits, plain)
    assert record.selections[0][0].merge is None
    with pytest.raises(BudgetError), gripvlm.prune(model, "tome", 1):
        model.generate(**inputs, **ONCE)
    assert not any("forward" in vars(block) for block in blocks)
    again = gripvlm.prune_inputs(model, inputs, "keep_all")["mm_encoder_outputs"]["image"].pooler_output
    for one, two in zip(again, whole["mm_encoder_outputs"]["image"].pooler_output, strict=True):
        assert torch.equal(one, two)


def test_later_blocks_really_see_fewer_tokens():
    model, inputs = build("llava"), make(TINY["llava"], [2], [7]).inputs
    seen: list[int] = []
    blocks = model.get_encoder("image").encoder.layers
    hooks = [block.mlp.register_forward_pre_hook(lambda m, args: seen.append(args[0].shape[1])) for block in blocks]
    gripvlm.prune_inputs(model, inputs, "tome", 6)
    for hook in hooks:
        hook.remove()
    assert seen == [12, 7, 7]  # CLS and 16; five merged in each of the two blocks that count


def test_sizes_reach_the_language_model():
    """`proportional_attention` weighs a row by the patches in it, as a merge after the encoder would."""
    model, inputs = build("paligemma"), make(TINY["paligemma"], [1], [7]).inputs
    logits = {}
    for sized in (True, False):
        with torch.no_grad(), gripvlm.pruned_run(model, inputs, "tome", 5, proportional_attention=sized) as (short, _):
            logits[sized] = model(**short).logits
    assert float((logits[True] - logits[False]).abs().max()) > 0.01


def test_an_encoding_of_all_rows_is_not_used():
    model, inputs = build("llava"), make(TINY["llava"], [1], [7]).inputs
    encoded = gripvlm.encode(model, inputs, ["tome", "divprune"])
    whole = gripvlm.prune_inputs(model, inputs, "tome", 6)
    again = gripvlm.prune_inputs(model, inputs, "tome", 6, encoded=encoded)
    one, two = (a["mm_encoder_outputs"]["image"].pooler_output[0] for a in (whole, again))
    assert torch.equal(one, two)
    bare = {name: value for name, value in inputs.items() if name != "pixel_values"}
    with pytest.raises(InputError, match=r"'tome' works inside the vision tower, .* leave the pixels in the inputs"):
        gripvlm.prune_inputs(model, bare, "tome", 6, encoded=encoded)


# --- the schedule and the matching ---------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 600), st.integers(1, 24), st.integers(0, 1), st.data())
def test_plans_are_exact_and_as_even_as_can_be(n, blocks, fixed, data):
    keep, pruner = data.draw(st.integers(1, n)), ToMe()
    try:
        plan = pruner.plan(n + fixed, keep + fixed, blocks, fixed)
    except BudgetError as error:
        least = int(str(error).split("pass keep=")[1].split(" ")[0])
        assert keep < least <= n
        assert sum(pruner.plan(n + fixed, least + fixed, blocks, fixed)) == n - least
        return
    assert len(plan) == blocks
    assert sum(plan) == n - keep
    left = n
    for merges in plan:
        assert 0 <= merges <= left // 2
        left -= merges
    assert plan == sorted(plan, reverse=True)


def test_plans_by_hand():
    assert ToMe().plan(577, 193, 23, 1) == [17] * 22 + [10]  # 384 = 22 x 17 + 10
    assert ToMe().plan(577, 65, 23, 1)[0] == 23  # 23 a block would be 529 > 512, 22 would be 506
    assert ToMe().plan(17, 5, 2, 1) == [8, 4]
    with pytest.raises(BudgetError, match=r"3 of 16 visual tokens .* tower's 2 blocks .* pass keep=4 or more"):
        ToMe().plan(17, 4, 2, 1)


def test_matching_by_hand():
    keys = torch.tensor([[1.0, 0], [1, 0.1], [0, 1], [0.5, 1], [1, 0.2]])[None]  # even places 0, 2, 4; odd 1, 3
    source, destination = soft_matching(keys, 2)  # cosines: 0-1 0.995, 2-3 0.894, 4-1 0.9952
    assert list(zip(source[0].tolist(), destination[0].tolist(), strict=True)) == [(4, 1), (0, 1)]
    source, destination = soft_matching(keys, 2, fixed=1)
    assert list(zip(source[0].tolist(), destination[0].tolist(), strict=True)) == [(4, 1), (2, 3)]
    same = torch.ones(2, 6, 3)
    assert soft_matching(same, 2)[0].tolist() == [[0, 2]] * 2
    assert soft_matching(same, 2)[1].tolist() == [[1, 1]] * 2


def test_groups_become_a_selection():
    tokens = VisualTokens(torch.zeros(6, 2), 3, groups=torch.tensor([1, 1, 4, 3, 4, 4]))
    selection = checked_selection("tome", ToMe().select(tokens), tokens, "here")
    assert selection.indices.tolist() == [1, 3, 4]
    assert selection.merge is not None
    assert selection.merge.source.tolist() == [0, 1, 2, 4, 5]
    assert selection.merge.destination.tolist() == [0, 0, 2, 2, 2]
    assert sizes_after(selection.indices, 6, selection.merge).tolist() == [2, 1, 3]


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted({"qwen2_5_vl", "internvl", "gemma3", "llava_next", "idefics3"} & set(TINY)))
def test_towers_whose_rows_need_every_patch_are_refused(name):
    with (
        pytest.raises(UnsupportedModelError, match=rf"inside {name}'s vision tower .* it is for llava, paligemma"),
        gripvlm.prune(build(name), "tome", 4),
    ):
        pytest.fail("the block opened")


def test_what_else_is_refused(monkeypatch):
    model, inputs = build("llava"), make(TINY["llava"], [1, 2], [7, 9]).inputs
    with pytest.raises(BudgetError, match=r"'tome' merges all images of a batch together.*pass one keep"):
        gripvlm.prune_inputs(model, inputs, "tome", [4, 5])
    with pytest.raises(InputError, match="TinyTower has no blocks"):
        gripvlm.prune_inputs(tiny_llava_own_tower(), inputs, "tome", 4)
    with pytest.raises(PrunerError, match="'mmr' wraps pruners that drop tokens at the input, but 'tome'"):
        get_pruner("mmr(tome)")
    block = model.get_encoder("image").encoder.layers[0]
    with monkeypatch.context() as changed:
        changed.setattr(model.config, "vision_feature_layer", [-2, -1])
        with pytest.raises(UnsupportedModelError, match=r"vision_feature_layer=\[-2, -1\] reads several"):
            gripvlm.prune_inputs(model, inputs, "tome", 4)
    mlp = block.mlp
    del block.mlp
    try:
        with pytest.raises(UnsupportedModelError, match="a CLIPEncoderLayer has no mlp"):
            gripvlm.prune_inputs(model, inputs, "tome", 4)
    finally:
        block.mlp = mlp


@dataclass(frozen=True)
class Odd(Pruner):
    """Says it is something else."""

    name: ClassVar[str] = "odd"
    stage: ClassVar[str] = "vision"

    def select(self, tokens: VisualTokens) -> Any:
        raise AssertionError


@dataclass(frozen=True)
class Both(ToMe):
    """Wants what a tower that merges has not."""

    name: ClassVar[str] = "both"
    needs: ClassVar[frozenset[str]] = frozenset({"groups", "patches"})


@dataclass(frozen=True)
class Alone(Odd):
    """Groups without merging."""

    name: ClassVar[str] = "alone"
    stage: ClassVar[str] = "input"
    needs: ClassVar[frozenset[str]] = frozenset({"groups"})


def test_what_a_tower_pruner_must_be():
    model, inputs = build("llava"), make(TINY["llava"], [1], [7]).inputs
    for pruner, says in [
        (Odd(), "stage 'vision', but its base class at 'input'"),
        (Both(), "then has no patches for each row"),
        (Alone(), "'alone' needs groups, which only a"),
    ]:
        with pytest.raises(PrunerError, match=says):
            gripvlm.prune_inputs(model, inputs, pruner, 4)
    assert issubclass(ToMe, TowerPruner)


def test_its_time_in_the_tower_is_its_own():
    """Images that were encoded for other pruners do not lend it their time."""
    from gripvlm.eval import answer, make_inputs
    from tiny_train import picture, tiny_vlm

    vlm, processor = tiny_vlm()
    inputs = make_inputs(vlm, processor, ["is there a cat?"], [picture(0)])
    encoded = replace(gripvlm.encode(vlm, inputs), watch=SimpleNamespace(seconds=lambda: {"vision": 123.0}))
    told = {"max_new_tokens": 1, "encoded": encoded}
    assert answer(vlm, processor, inputs, "norm", 8, **told).seconds["vision"] == 123.0
    assert 0 < answer(vlm, processor, inputs, "tome", 8, **told).seconds["vision"] < 100
