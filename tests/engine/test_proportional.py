"""Size-aware attention: m equal tokens merged into one of size m give the logits of the uncut input."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import gripvlm
from gripvlm.engine.generate import CHUNKS_SINCE
from gripvlm.errors import InputError, UnsupportedModelError
from gripvlm.models import FAMILIES
from gripvlm.models.compat import installed
from gripvlm.models.hooks.attention import capture_attention
from gripvlm.models.positions import counting_rows
from gripvlm.pruners import LLMPruner, Pruner
from gripvlm.types import Merge, Selection, VisualTokens, sizes_after
from tiny_families import TINY, build, make
from tiny_families.base import IMAGE

NAMES = sorted(name for name in TINY if FAMILIES[name].equals == "masking")
BOTH_WAYS = {"gemma3", "gemma4_unified", "molmo2", "paligemma"} & set(TINY)  # their images see both directions
GREEDY = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}


def groups(n: int) -> list[list[int]]:
    """Rows that are to be one: {0, 2, n - 1}, {1, 3}, and the others by themselves."""
    named = [[0, 2, n - 1], [1, 3]] if n > 5 else [[0, n - 1]]
    taken = {i for group in named for i in group}
    return sorted([*named, *([i] for i in range(n) if i not in taken)])


def merge_of(parts: list[list[int]]) -> Merge:
    entries = [(i, slot, 1 / len(part)) for slot, part in enumerate(parts) if len(part) > 1 for i in part]
    source, slot, weight = zip(*entries, strict=True)
    return Merge(torch.tensor(source), torch.tensor(slot), torch.tensor(weight))


@dataclass(frozen=True)
class Joins(Pruner):
    """Merges `groups`, into the first row of each."""

    name: ClassVar[str] = "joins"

    def select(self, tokens: VisualTokens) -> Selection:
        parts = groups(tokens.n)
        return Selection(torch.tensor([part[0] for part in parts]), tokens.n, merge=merge_of(parts))


@dataclass(frozen=True)
class JoinsInside(LLMPruner):
    """The same, before the layers `cuts` of the language model; at each the first two that are left."""

    name: ClassVar[str] = "joins_inside"
    needs: ClassVar[frozenset[str]] = frozenset()
    llm_needs: ClassVar[frozenset[str]] = frozenset()

    cuts: tuple[int, ...] = (2,)

    def schedule(self, n: int, keep: int, layers: int) -> dict[int, int]:
        return {cut: n - i - 1 for i, cut in enumerate(self.cuts)}

    def select_at_layer(self, layer, tokens):
        merge = Merge(torch.tensor([0, 1]), torch.tensor([0, 0]), torch.tensor([0.5, 0.5]))
        return Selection(torch.tensor([0, *range(2, tokens.n)]), tokens.n, merge=merge)


def same_rows(item, parts: list[list[int]]):
    """The item with every row of a group equal to its first."""
    index = torch.empty(item.features.shape[0], dtype=torch.long)
    for part in parts:
        index[part] = part[0]
    return replace(item, features=item.features[index], deepstack=tuple(plane[index] for plane in item.deepstack))


def alike(model, inputs: dict) -> tuple[gripvlm.Encoded, dict, Tensor]:
    """An encoding in which groups are equal, inputs in which they stand at one position, and each token's slot."""
    with torch.no_grad():
        encoded = gripvlm.encode(model, inputs)
        positions = gripvlm.prune_inputs(model, inputs, "keep_all", encoded=encoded)["position_ids"].clone()
    slots = torch.arange(inputs["input_ids"].shape[1]).expand_as(inputs["input_ids"]).clone()
    samples = []
    for row, (ids, items) in enumerate(zip(inputs["input_ids"], encoded.samples, strict=True)):
        places, made = (ids == IMAGE).nonzero().flatten(), []
        for item in items:
            parts = groups(item.features.shape[0])
            mine, places = places[: item.features.shape[0]], places[item.placeholders :]
            for part in parts:
                slots[row, mine[part]] = mine[part[0]]
            made.append(same_rows(item, parts))
        samples.append(tuple(made))
        each = positions.expand(*positions.shape[:-2], *slots.shape)
        each[..., row, :] = each[..., row, slots[row]]
    return replace(encoded, samples=tuple(samples)), inputs | {"position_ids": positions}, slots


def counts(encoded) -> list[list[int]]:
    return [[len(groups(item.features.shape[0])) for item in items] for items in encoded.samples]


def seen_together(slots: Tensor, real: Tensor) -> Tensor:
    """[B, 1, L, L] additive mask of the uncut input in which the tokens of a group are where their first one is."""
    sees = (slots[:, :, None] >= slots[:, None, :]) & real[:, None, :].bool()
    sees = sees | torch.eye(slots.shape[1], dtype=torch.bool)
    return torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.float32).min)[:, None]


def uncut(model, arguments: dict, encoded, slots: Tensor, new: Tensor) -> Tensor:
    """[B, 1 + t, V] logits of the uncut input, of its last token and of the t tokens `new` [B, t] behind it."""
    whole = gripvlm.prune_inputs(model, arguments, "keep_all", encoded=encoded)
    t, length = new.shape[1], slots.shape[1]
    positions = whole["position_ids"]
    highest = positions[-3:] if positions.ndim == 3 else positions
    highest = highest.amax(-1) if highest.ndim == 2 else highest.amax((0, 2))
    further = (highest[:, None] + 1 + torch.arange(t)).expand(*positions.shape[:-2], -1, -1)
    if positions.ndim == 3 and counting_rows(model, positions):
        further = torch.cat((length + torch.arange(t).expand(1, len(new), -1), further[1:]))
    slots = torch.cat((slots, (length + torch.arange(t)).expand(len(new), -1)), dim=1)
    real = torch.cat((whole["attention_mask"], torch.ones_like(new)), dim=1)
    ids = torch.cat((whole["input_ids"], new), dim=1)
    mask: Any = seen_together(slots, real)
    if model.config.model_type == "gemma4":  # in its sliding layers, images see themselves in both directions
        seen = ids == IMAGE
        block = (seen.int().diff(dim=-1, prepend=seen[:, :1].int()) != 0).cumsum(-1).masked_fill(~seen, -1)
        both = (block[:, :, None] == block[:, None, :]) & seen[:, None]
        mask = {"full_attention": mask, "sliding_attention": mask.masked_fill(both[:, None], 0.0)}
    more = {
        "input_ids": ids,
        "position_ids": torch.cat((positions, further), dim=-1),
        "attention_mask": mask,
        "mm_encoder_outputs": whole["mm_encoder_outputs"],
    }
    types = {"mm_token_type_ids": (ids == IMAGE).long()} if "mm_token_type_ids" in whole else {}
    with torch.no_grad():
        return model(**more, **types, use_cache=False).logits[:, length - 1 :]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", [name for name in NAMES if name not in BOTH_WAYS])
def test_equal_tokens_merged_give_the_logits_of_the_uncut_input(name, attention):
    """Prefill and three decoded tokens of a ragged batch; without sizes the logits are others."""
    model, inputs = build(name, attention), make(TINY[name], [1, 2], [7, 9]).inputs
    encoded, arguments, slots = alike(model, inputs)
    way = (model, arguments, Joins(), counts(encoded))
    found = {}
    for sized in (True, False):
        with torch.no_grad(), gripvlm.pruned_run(*way, encoded=encoded, proportional_attention=sized) as (short, _):
            found[sized] = model.generate(**short, **GREEDY)
    new = found[True].sequences[:, -4:]
    expected = uncut(model, arguments, encoded, slots, new[:, :-1])
    ours = torch.stack(found[True].logits, dim=1)
    torch.testing.assert_close(ours, expected, atol=2 * TINY[name].tolerance, rtol=2 * TINY[name].tolerance)
    assert float((found[False].logits[0] - expected[:, 0]).abs().max()) > 0.01
    assert not any(layer._forward_pre_hooks for layer in model.get_decoder().layers)
    assert not model._forward_pre_hooks
    assert not model._forward_hooks


@pytest.mark.parametrize("name", sorted(BOTH_WAYS))
def test_where_images_see_both_ways_the_uncut_model_itself_is_the_reference(name):
    model, inputs = build(name), make(TINY[name], [1, 1], [7, 9]).inputs
    encoded, arguments, _ = alike(model, inputs)
    with torch.no_grad():
        theirs = model.generate(**gripvlm.prune_inputs(model, arguments, "keep_all", encoded=encoded), **GREEDY)
        way = (model, arguments, Joins(), counts(encoded))
        with gripvlm.pruned_run(*way, encoded=encoded, proportional_attention=True) as (short, _):
            ours = model.generate(**short, **GREEDY)
    assert torch.equal(ours.sequences[:, -4:], theirs.sequences[:, -4:])
    for a, b in zip(ours.logits, theirs.logits, strict=True):
        torch.testing.assert_close(a, b, atol=TINY[name].tolerance, rtol=TINY[name].tolerance)


def first_three_equal(model, inputs: dict) -> tuple[gripvlm.Encoded, dict]:
    """The first three rows of every image equal and at one position."""
    with torch.no_grad():
        encoded = gripvlm.encode(model, inputs)
        positions = gripvlm.prune_inputs(model, inputs, "keep_all", encoded=encoded)["position_ids"].clone()
    samples = []
    for row, (ids, items) in enumerate(zip(inputs["input_ids"], encoded.samples, strict=True)):
        start = int((ids == IMAGE).nonzero()[0])
        positions[row, start : start + 3] = positions[row, start]
        parts = [[0, 1, 2], *([i] for i in range(3, items[0].features.shape[0]))]
        samples.append(tuple(same_rows(item, parts) for item in items))
    return replace(encoded, samples=tuple(samples)), inputs | {"position_ids": positions}


WAYS = [
    {},
    {"use_cache": False},
    {"num_beams": 3, "num_return_sequences": 2},
    {"do_sample": True, "num_return_sequences": 3, "temperature": 3.0},
]


@pytest.mark.parametrize("options", WAYS, ids=str)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_merges_inside_the_language_model_carry_their_sizes(attention, options):
    """Two of three equal tokens merge before layer 1, the third joins before layer 3: sizes 2 and then 3."""
    model, inputs = build("paligemma", attention), make(TINY["paligemma"], [1, 1], [7, 9]).inputs
    encoded, arguments = first_three_equal(model, inputs)
    options = {"max_new_tokens": 4, "do_sample": False} | options
    n = encoded.samples[0][0].features.shape[0]
    whole = gripvlm.prune_inputs(model, arguments, "keep_all", encoded=encoded)
    outcomes = []
    with torch.no_grad():
        logits = model(**whole, use_cache=False).logits[:, -1]
        for sized in (True, False):
            way = (model, arguments, JoinsInside((1, 3)), n - 1)
            with gripvlm.pruned_run(*way, encoded=encoded, proportional_attention=sized) as (short, record):
                outcomes.append(model(**short).logits[:, -1])
            assert record.selections[0][0].counts == [n, n - 1, n - 1, n - 2]
        torch.manual_seed(5)
        theirs = model.generate(**whole, **options)
        torch.manual_seed(5)
        with gripvlm.pruned_run(*way, encoded=encoded, proportional_attention=True) as (short, _):
            ours = model.generate(**short, **options)
    torch.testing.assert_close(outcomes[0], logits, atol=3e-5, rtol=3e-5)
    assert float((outcomes[1] - logits).abs().max()) > 0.01
    assert torch.equal(ours, theirs)


def test_who_watches_sees_the_weights_that_count():
    """The last token's weight on a merged token is that on its copies together."""
    model, inputs = build("paligemma"), make(TINY["paligemma"], [1], [7]).inputs
    encoded, arguments, _ = alike(model, inputs)
    whole = gripvlm.prune_inputs(model, arguments, "keep_all", encoded=encoded)
    places = (inputs["input_ids"][0] == IMAGE).nonzero().flatten()
    with torch.no_grad(), capture_attention(model.get_decoder(), [0, 3], [-1]) as full:
        model(**whole)
    way = (model, arguments, Joins(), counts(encoded))
    with torch.no_grad(), gripvlm.pruned_run(*way, encoded=encoded, proportional_attention=True) as (short, _):  # noqa: SIM117
        with capture_attention(model.get_decoder(), [0, 3], [-1]) as seen:
            model(**short)
    mine = (short["input_ids"][0] == IMAGE).nonzero().flatten()
    for layer in (0, 3):
        for slot, part in enumerate(groups(places.numel())):
            expected = full[layer][0][0, :, 0, places[part]].sum(-1)
            torch.testing.assert_close(seen[layer][0][0, :, 0, mine[slot]], expected, atol=1e-6, rtol=1e-4)


@pytest.mark.skipif(installed() < CHUNKS_SINCE, reason="transformers does not cut encoded images into chunks")
def test_a_prompt_in_chunks_carries_its_sizes(model, inputs):
    encoded, arguments, _ = alike(model, inputs)
    with gripvlm.pruned_run(
        model, arguments, Joins(), counts(encoded), encoded=encoded, proportional_attention=True
    ) as (
        short,
        _,
    ):
        at_once = model.generate(**short, **GREEDY)
        in_parts = model.generate(**short, **GREEDY, prefill_chunk_size=7)
    assert torch.equal(at_once.sequences, in_parts.sequences)
    for a, b in zip(at_once.logits, in_parts.logits, strict=True):
        torch.testing.assert_close(a, b, atol=3e-5, rtol=3e-5)


def test_a_cache_that_keeps_the_last_of_a_window_keeps_their_sizes():
    """Sliding layers of six tokens: with the cache and without, the same logits; without sizes, others."""
    model, inputs = build("gemma3", sliding_window=6), make(TINY["gemma3"], [1, 1], [3, 4]).inputs
    encoded, arguments, _ = alike(model, inputs)
    way = (model, arguments, Joins(), counts(encoded))
    found = []
    for sized, cached in ((True, True), (True, False), (False, True)):
        with gripvlm.pruned_run(*way, encoded=encoded, proportional_attention=sized) as (short, _):
            assert short["input_ids"].shape[1] > 6
            found.append(torch.stack(model.generate(**short, **GREEDY | {"use_cache": cached}).logits))
    torch.testing.assert_close(found[0], found[1], atol=TINY["gemma3"].tolerance, rtol=TINY["gemma3"].tolerance)
    assert float((found[0][1] - found[2][1]).abs().max()) > 0.01


@pytest.mark.parametrize("pruner", ["pool", "visionzip", "prumerge", "random"])
def test_the_block_of_any_pruner(model, inputs, pruner):
    """`gripvlm.prune` carries sizes through; without merges, or keeping everything, nothing changes at all."""
    tokens = {}
    for sized in (False, True):
        for keep in (5, 1.0):
            with gripvlm.prune(model, pruner, keep, proportional_attention=sized) as record:
                tokens[sized, keep] = model.generate(**inputs, **GREEDY).logits
    assert all(torch.equal(a, b) for a, b in zip(tokens[True, 1.0], tokens[False, 1.0], strict=True))
    same = all(torch.equal(a, b) for a, b in zip(tokens[True, 5], tokens[False, 5], strict=True))
    assert same == (pruner == "random")
    assert record.kept == record.total
    assert "generate" not in vars(model)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.data())
def test_sizes_add_up(n, data):
    """Against a loop over rows: every row that is in any slot is shared equally among its slots."""
    k = data.draw(st.integers(1, n))
    indices = sorted(data.draw(st.permutations(range(n)))[:k])
    pairs = data.draw(st.lists(st.tuples(st.integers(0, n - 1), st.integers(0, k - 1)), unique=True, max_size=12))
    before = data.draw(st.lists(st.integers(1, 5), min_size=n, max_size=n))
    slots: list[list[int]] = [[row for row, slot in pairs if slot == s] or [indices[s]] for s in range(k)]
    share = [sum(row in slot for slot in slots) for row in range(n)]
    expected = [sum(before[row] / share[row] for row in slot) for slot in slots]
    merge = None
    if pairs:
        source, slot = map(torch.tensor, zip(*pairs, strict=True))
        merge = Merge(source, slot, torch.ones(len(pairs)))
    found = sizes_after(torch.tensor(indices), n, merge, torch.tensor(before, dtype=torch.float32))
    assert found.tolist() == pytest.approx(expected, rel=1e-5)
    assert float(found.sum()) == pytest.approx(sum(b for b, s in zip(before, share, strict=True) if s), rel=1e-5)


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lfm2_vl", *(["qwen3_5"] if "qwen3_5" in TINY else [])])
def test_families_without_scores_are_refused(name):
    with (
        pytest.raises(
            UnsupportedModelError, match=r"linear attention or convolutions.*leave proportional_attention out"
        ),
        gripvlm.prune(build(name), "pool", 4, proportional_attention=True),
    ):
        pytest.fail("the block opened")


def test_other_attention_and_caches_are_refused(model, inputs, monkeypatch):
    with (
        gripvlm.prune(model, "pool", 4, proportional_attention=True),
        pytest.raises(InputError, match=r"static cache .* use the default dynamic cache"),
    ):
        model.generate(**inputs, max_new_tokens=2, cache_implementation="static")
    monkeypatch.setattr(model.get_decoder().config, "_attn_implementation", "flex_attention")
    with (
        pytest.raises(UnsupportedModelError, match=r"flex_attention does not take: load .*attn_implementation='sdpa'"),
        gripvlm.prune(model, "pool", 4, proportional_attention=True),
    ):
        pytest.fail("the block opened")


def test_layers_that_were_not_given_their_sizes_are_an_error(model, inputs, monkeypatch):
    monkeypatch.setattr("gripvlm.models.hooks.proportional._SizeBias.before_attention", lambda self, layer, call: None)
    with (
        gripvlm.prune(model, "pool", 4, proportional_attention=True),
        pytest.raises(InputError, match=r"attention of layer 0 .* does not go through transformers' attention"),
    ):
        model.generate(**inputs, max_new_tokens=2)
    assert not model._forward_pre_hooks
