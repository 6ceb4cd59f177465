"""Pruners inside the language model: FastV and others, against naive float64 choices and masked full models."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import pytest
import torch
from test_llm_drop import masking

import gripvlm
from gripvlm.errors import BudgetError, GripError, InputError, PrunerError, UnsupportedModelError
from gripvlm.models import FAMILIES
from gripvlm.models.compat import cache_of
from gripvlm.models.hooks.attention import capture_attention
from gripvlm.models.hooks.llm_drop import drop_in_layers
from gripvlm.models.text import words
from gripvlm.pruners import LLMPruner, LLMScorePruner, top_k
from gripvlm.pruners.llm.fastv import FastV
from gripvlm.pruners.ops.schedules import average_tokens, one_layer_schedule, pyramid_schedule
from gripvlm.types import LLMTokens, Merge, Selection
from tiny_families import TINY, build, make
from tiny_families.base import IMAGE
from tiny_families.reference import places_of

NAMES = sorted(name for name in TINY if FAMILIES[name].layers and FAMILIES[name].equals == "masking")
DELETION = sorted(name for name in TINY if FAMILIES[name].layers and FAMILIES[name].equals == "deletion")
GREEDY = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
IMAGES, WORDS = [1, 2, 0], [7, 9, 5]
KEEP = 0.75  # of 4 layers: half of the tokens in the last two


@dataclass(frozen=True)
class Steps(LLMPruner):
    """Drops at several layers by what the question looks at, and reads everything there is."""

    name: ClassVar[str] = "steps"
    needs: ClassVar[frozenset[str]] = frozenset({"features", "key"})
    llm_needs: ClassVar[frozenset[str]] = frozenset({"hidden", "last", "question", "keys"})

    cuts: tuple[int, ...] = (1, 3)

    def schedule(self, n: int, keep: int, layers: int) -> dict[int, int]:
        return pyramid_schedule(self.name, n, keep, layers, self.cuts)

    def select_at_layer(self, layer: int, tokens: LLMTokens) -> Selection:
        assert tokens.hidden.shape[0] == tokens.keys.shape[0] == tokens.last.shape[1] == tokens.n
        assert tokens.question.shape[1] == tokens.text.shape[0]
        assert (tokens.question.sum((0, 2))[tokens.after] > 0).all()
        assert torch.allclose(tokens.question[:, -1], tokens.last, atol=1e-6)  # a word is last here
        assert tokens.input.features[tokens.rows].shape[0] == tokens.n
        scores = tokens.question.mean((0, 1)) + 1e-3 * tokens.hidden.norm(dim=-1).float()
        return Selection(top_k(scores, tokens.keep), tokens.n)


@dataclass(frozen=True)
class Noting(Steps):
    """Notes what it is shown at its one cut."""

    llm_needs: ClassVar[frozenset[str]] = frozenset(
        {"hidden", "before", "text", "words", "all_keys", "key_sizes", "values", "rotary", "norm"}
    )

    cuts: tuple[int, ...] = (2,)
    seen: list[LLMTokens] = field(default_factory=list)

    def select_at_layer(self, layer: int, tokens: LLMTokens) -> Selection:
        self.seen.append(tokens)
        return Selection(torch.arange(tokens.keep), tokens.n)


def stages_of(ids, mask, selections) -> dict[int, torch.Tensor]:
    """layer -> [B, L] bool, what that layer sees, from the selections alone."""
    stages = {}
    for layer in range(1, 4):
        stages[layer] = mask.bool().clone()
        for row, seen, sample in zip(ids, stages[layer], selections, strict=True):
            for selection, mine in zip(sample, places_of(row, sample), strict=True):
                seen[mine] = False
                seen[mine[selection.layers[layer]]] = True
    return stages


def close(name, ours, theirs):
    tolerance = TINY[name].tolerance
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("pruner", [FastV(), Steps()], ids=lambda p: p.name)
@pytest.mark.parametrize("name", NAMES)
def test_generate_inside_the_block_equals_masking_the_later_layers(name, pruner, attention):
    """Ragged left-padded batch with an imageless prompt; the reference never saw the library's hooks."""
    model, inputs = build(name, attention), make(TINY[name], IMAGES, WORDS).inputs
    with gripvlm.prune(model, pruner, keep=KEEP) as record:
        ours = model.generate(**inputs, **GREEDY)
    stages = stages_of(inputs["input_ids"], inputs["attention_mask"], record.selections)
    reference = build(name, "eager")
    with masking(reference, stages):
        theirs = reference.generate(**inputs, **GREEDY)
    assert torch.equal(ours.sequences, theirs.sequences)
    close(name, ours.logits, theirs.logits)
    lengths = [layer.keys.shape[-2] for layer in ours.past_key_values.layers]
    full = inputs["input_ids"].shape[1] + 3
    assert lengths == [full, *(int(stages[layer].sum(-1).max()) + 3 for layer in (1, 2, 3))]
    assert lengths[3] < full
    assert all(abs(s.paid - KEEP * s.n) <= 0.5 for sample in record.selections for s in sample)
    assert not any(layer._forward_pre_hooks for layer in model.get_decoder().layers)


@pytest.mark.parametrize("name", NAMES)
def test_a_layer_shows_the_text_around_each_image(name):
    """Keys and their sizes, states, embeddings and what comes after the image, as the full model has them."""
    model, batch, spy = build(name), make(TINY[name], IMAGES, WORDS), Noting()
    with gripvlm.prune(model, spy, keep=KEEP):
        model.generate(**batch.inputs, **GREEDY)
    entered: list[torch.Tensor] = []
    turns: list[torch.Tensor] = []

    def note(module, args, kwargs):
        entered.append(args[0])
        turns.append(kwargs["position_embeddings"])

    hook = model.get_decoder().layers[1].register_forward_pre_hook(note, with_kwargs=True)
    once = cache_of(model.generate(**batch.inputs, **{**GREEDY, "max_new_tokens": 1}))
    hook.remove()
    keys = once.layers[1].keys.transpose(1, 2).flatten(2)
    sizes = once.layers[1].keys.abs().sum((1, 3))
    values = once.layers[1].values.transpose(1, 2)
    assert {tokens.input.sample for tokens in spy.seen} == {0, 1}
    visual = [(ids == IMAGE).nonzero().flatten() for ids in batch.inputs["input_ids"]]
    for tokens in spy.seen:
        ids = batch.inputs["input_ids"][tokens.input.sample]
        said, left = words(model, batch.inputs)[tokens.input.sample].nonzero().flatten(), visual[tokens.input.sample]
        mine, visual[tokens.input.sample] = left[: tokens.n], left[tokens.n + FAMILIES[name].tail :]
        assert tokens.after.tolist() == [place > int(mine[-1]) for place in said.tolist()]
        torch.testing.assert_close(tokens.before, entered[0][tokens.input.sample, mine], atol=1e-5, rtol=1e-5)
        if name != "kimi_k25":  # whose cache holds what keys are made from
            torch.testing.assert_close(tokens.all_keys, keys[tokens.input.sample, mine], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(tokens.key_sizes, sizes[tokens.input.sample, mine], atol=1e-4, rtol=1e-5)
            torch.testing.assert_close(tokens.text_key_sizes, sizes[tokens.input.sample, said], atol=1e-4, rtol=1e-5)
            torch.testing.assert_close(tokens.values, values[tokens.input.sample, mine], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(tokens.text_values, values[tokens.input.sample, said], atol=1e-5, rtol=1e-5)
        for part, turn in zip(tokens.rotary.unbind(dim=1), turns[0], strict=True):
            own = min(tokens.input.sample, turn.shape[-3] - 1)  # one for all samples where they are the same
            whole = turn[..., own, mine, :]
            torch.testing.assert_close(part, whole if whole.ndim == 2 else torch.cat([*whole], dim=-1), atol=0, rtol=0)
        torch.testing.assert_close(tokens.words, model.get_input_embeddings()(ids[said]), atol=0, rtol=0)
        torch.testing.assert_close(tokens.norm(tokens.text), model.get_decoder().norm(tokens.text), atol=0, rtol=0)
        assert tokens.text.shape == tokens.words.shape


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl", "gemma3", "mistral3"])
def test_fastv_keeps_what_naive_attention_says(name):
    """The last token's row of layer 1, from eager weights of the full model, in float64, image by image."""
    model, batch = build(name), make(TINY[name], IMAGES, WORDS)
    with gripvlm.prune(model, "fastv", keep=KEEP) as record:
        model.generate(**batch.inputs, **GREEDY)
    with torch.no_grad():
        weights = build(name, "eager")(**batch.inputs, output_attentions=True).attentions[1].double()
    for sample, selections in enumerate(record.selections):
        row = weights[sample, :, -1].mean(0)
        places = (batch.inputs["input_ids"][sample] == IMAGE).nonzero().flatten()
        for selection in selections:
            mine, places = places[: selection.n], places[selection.n :]
            order = sorted(range(selection.n), key=lambda i: (-float(row[mine[i]]), i))
            assert selection.indices.tolist() == sorted(order[: selection.k])
            assert selection.scores is not None
            torch.testing.assert_close(selection.scores.double(), row[mine], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "internvl"])
def test_the_choice_is_the_same_under_sdpa_and_eager_and_in_a_batch_of_one(name):
    chosen = []
    for attention in ("sdpa", "eager"):
        with gripvlm.prune(build(name, attention), "fastv", keep=KEEP) as record:
            build(name, attention).generate(**make(TINY[name], IMAGES, WORDS).inputs, **GREEDY)
        chosen.append([[s.indices.tolist() for s in sample] for sample in record.selections])
    assert chosen[0] == chosen[1]
    model = build(name)
    with gripvlm.prune(model, "fastv", keep=KEEP) as record:
        together = model.generate(**make(TINY[name], IMAGES, WORDS).inputs, **GREEDY)
        for sample in range(3):
            alone = model.generate(**make(TINY[name], IMAGES, WORDS, only=sample).inputs, **GREEDY)
            assert [s.indices.tolist() for s in record.selections[0]] == chosen[0][sample]
            close(name, [a[0] for a in alone.logits], [b[sample] for b in together.logits])


@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "gemma3"])
def test_keeping_everything_is_the_untouched_model_bit_for_bit(name):
    model, inputs = build(name), make(TINY[name], IMAGES, WORDS).inputs
    plain = model.generate(**inputs, **GREEDY)
    for pruner in (FastV(), Steps()):
        with gripvlm.prune(model, pruner, keep=1.0) as record:
            same = model.generate(**inputs, **GREEDY)
        assert all(torch.equal(a, b) for a, b in zip(same.logits, plain.logits, strict=True))
        assert record.kept == record.total == record.paid


def test_schedules_by_hand():
    """The numbers of the paper's comparison: 576 tokens, 32 layers, two of them see everything."""
    assert [FastV().schedule(576, keep, 32)[2] for keep in (192, 128, 64, 576)] == [166, 98, 30, 576]
    assert abs(average_tokens(576, {2: 166}, 32) - 192) < 0.5
    assert one_layer_schedule("x", 10, 5, 4, 1) == {1: 3}  # (20 - 10) / 3 = 3.33
    assert pyramid_schedule("x", 576, 270, 32, (8, 16, 24)) == {8: 288, 16: 144, 24: 72}  # PyramidDrop's halves
    with pytest.raises(
        BudgetError, match=r"30 of 576 visual .* 32 layers .* through the first 2; pass keep=37 or more"
    ):
        FastV().schedule(576, 30, 32)
    with pytest.raises(BudgetError, match="drops before layer 32, but this language model has 32 layers"):
        FastV(layer=32).schedule(576, 300, 32)


@pytest.mark.parametrize("n", [1, 2, 7, 16, 100])
@pytest.mark.parametrize("cuts", [(1,), (2,), (1, 2), (1, 2, 3), (3,)])
def test_schedules_are_as_near_as_whole_rows_allow(n, cuts):
    for layers in (4, 5, 24):
        for keep in range(1, n + 1):
            try:
                plan = pyramid_schedule("x", n, keep, layers, cuts)
            except BudgetError:
                continue
            counts = [n, *(plan[cut] for cut in cuts)]
            assert counts == sorted(counts, reverse=True)
            assert counts[-1] >= 1
            assert abs(average_tokens(n, plan, layers) - keep) <= 0.5


WAYS = [
    {"use_cache": False},
    {"num_beams": 3},
    {"num_beams": 3, "num_return_sequences": 2},
    {"do_sample": True, "num_return_sequences": 3, "temperature": 3.0},
]


@pytest.mark.parametrize("options", WAYS, ids=str)
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl", "idefics3"])
def test_every_way_to_decode_equals_masking(name, options):
    """Without a cache the choice of the first step stays; repeated rows choose alike."""
    model, inputs = build(name), make(TINY[name], [1, 2], [7, 9]).inputs
    options = {"max_new_tokens": 4, "do_sample": False} | options
    torch.manual_seed(5)
    with gripvlm.prune(model, "fastv", keep=KEEP) as record:
        ours = model.generate(**inputs, **options)
    stages = stages_of(inputs["input_ids"], inputs["attention_mask"], record.selections)
    repeat = max(options.get("num_beams", 1), options.get("num_return_sequences", 1))
    reference = build(name, "eager")
    torch.manual_seed(5)
    cached = options | {"use_cache": True}
    with masking(reference, {k: stage.repeat_interleave(repeat, 0) for k, stage in stages.items()}):
        theirs = reference.generate(**inputs, **cached)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"prefill_chunk_size": 7}, "prefill_chunk_size: .* drops inside the language model"),
        ({"cache_implementation": "static"}, "default dynamic cache"),
        ({"prompt_lookup_num_tokens": 3}, "speculative decoding is not supported"),
    ],
    ids=str,
)
def test_ways_to_decode_that_are_refused(options, says):
    model, inputs = build("llava"), make(TINY["llava"], [1], [7]).inputs
    with gripvlm.prune(model, "fastv", keep=KEEP), pytest.raises(InputError, match=says):
        model.generate(**inputs, max_new_tokens=2, do_sample=False, **options)
    assert not any(layer._forward_pre_hooks for layer in model.get_decoder().layers)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl"])
def test_dropping_at_the_input_and_then_inside(name):
    """Low level: `drop_in_layers` counts the tokens that `gripvlm.prune` left; the reference masks both."""
    model, inputs = build(name), make(TINY[name], IMAGES, WORDS).inputs
    with gripvlm.prune(model, "random", keep=6) as record:
        halves = lambda hidden, visual: visual & (visual.cumsum(-1) % 2 == 0)  # noqa: E731
        with drop_in_layers(model, {2: halves}):
            ours = model.generate(**inputs, **GREEDY)
    stages = {}
    mask = inputs["attention_mask"].bool()
    for layer in (1, 2, 3):
        stages[layer] = mask.clone()
        for row, seen, sample in zip(inputs["input_ids"], stages[layer], record.selections, strict=True):
            places = (row == IMAGE).nonzero().flatten()
            if not sample:
                continue
            kept = places[torch.cat([s.mask() for s in sample])]
            seen[places] = False
            seen[kept if layer < 2 else kept[1::2]] = True
    whole = inputs | {"attention_mask": stages[1].long()}
    whole["position_ids"] = model._prepare_position_ids_for_generation(inputs["input_ids"], dict(inputs))
    reference = build(name, "eager")
    with masking(reference, {2: stages[2]}):
        theirs = reference.generate(**whole, **GREEDY)
    close(name, ours.logits, theirs.logits)


@dataclass(frozen=True)
class TwoStages(Steps):
    """Half of the rows go at the input already."""

    name: ClassVar[str] = "two_stages"
    llm_needs: ClassVar[frozenset[str]] = frozenset()

    def schedule(self, n: int, keep: int, layers: int) -> dict[int, int]:
        return {0: n // 2} | one_layer_schedule(self.name, n // 2, keep, layers, 2)

    def select(self, tokens):
        return Selection(torch.arange(tokens.n - tokens.keep, tokens.n), tokens.n)

    def select_at_layer(self, layer, tokens):
        return Selection(torch.arange(tokens.keep), tokens.n)


def test_a_schedule_may_begin_at_the_input():
    model, inputs = build("llava"), make(TINY["llava"], IMAGES, WORDS).inputs
    with gripvlm.prune(model, TwoStages(), keep=6) as record:
        model.generate(**inputs, **GREEDY)
    for selection in record.selections[1]:
        assert selection.counts == [8, 8, 4, 4]
        assert selection.paid == 6
        assert selection.layers[0].tolist() == list(range(8, 16))
        assert selection.indices.tolist() == [8, 9, 10, 11]


@dataclass(frozen=True)
class Absorbs(FastV):
    """Keeps the first rows; the first of them becomes the mean of all."""

    name: ClassVar[str] = "absorbs"
    llm_needs: ClassVar[frozenset[str]] = frozenset({"hidden"})

    def select_at_layer(self, layer, tokens):
        n = tokens.n
        merge = Merge(torch.arange(n), torch.zeros(n, dtype=torch.long), torch.full((n,), 1 / n))
        return Selection(torch.arange(tokens.keep), n, merge=merge)


def test_states_may_be_merged_on_the_way():
    model, inputs = build("llava"), make(TINY["llava"], [1], [7]).inputs
    seen = []
    layer = model.get_decoder().layers[2]
    with torch.no_grad():
        with gripvlm.pruned_run(model, inputs, Absorbs(), 12) as (arguments, record):
            hook = layer.register_forward_pre_hook(lambda layer, args: seen.append(args[0]))  # behind gripvlm's own
            model(**arguments)
        model(**inputs)
    hook.remove()
    places = (inputs["input_ids"][0] == IMAGE).nonzero().flatten()
    full = seen[1][0, places]
    start = int(places[0])
    torch.testing.assert_close(seen[0][0, start], full.mean(0), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(seen[0][0, start + 1 : start + 8], full[1:8], atol=1e-5, rtol=1e-5)
    assert record.selections[0][0].counts == [16, 16, 8, 8]


def test_an_encoding_is_reused_and_a_direct_forward_runs():
    model, inputs = build("llava"), make(TINY["llava"], IMAGES, WORDS).inputs
    with torch.no_grad():
        encoded = gripvlm.encode(model, inputs)
        with gripvlm.pruned_run(model, inputs, "fastv", KEEP, encoded=encoded) as (arguments, record):
            assert record.selections[0][0].k == 16  # nothing has run
            logits = model(**arguments).logits
    assert record.seconds["vision"] == 0
    assert [s.counts for s in record.selections[1]] == [[16, 16, 8, 8]] * 2
    with gripvlm.prune(model, "fastv", KEEP):
        generated = model.generate(**inputs, **GREEDY)
    torch.testing.assert_close(logits[:, -1], generated.logits[0], atol=2e-5, rtol=2e-5)


@dataclass(frozen=True)
class Wrong(FastV):
    """Says whatever it is told to."""

    name: ClassVar[str] = "wrong"
    answer: object = None
    plan: object = None

    def schedule(self, n, keep, layers):
        return self.plan or super().schedule(n, keep, layers)

    def select_at_layer(self, layer, tokens):
        return self.answer


@pytest.mark.parametrize(
    ("pruner", "says"),
    [
        (
            Wrong(answer=Selection(torch.arange(5), 16)),
            r"before layer 2: returned 5 indices, but the budget is exactly 8 of 16",
        ),
        (Wrong(answer="x"), "returned a str"),
        (Wrong(answer=Selection(torch.arange(8).flip(0), 16)), "ascending"),
        (Wrong(answer=Selection(torch.arange(8), 16, torch.full((16,), torch.nan))), "16 of 16 scores are NaN"),
        (Wrong(plan={2: 3}), "pays for 9.5 rows on average over 4 layers, but the budget is 12"),
        (Wrong(plan={2: 17}), "must go down from 16"),
        (Wrong(plan={4: 8}), "names layer 4, but there are 4"),
        (Wrong(plan=[2, 3]), "must be a dict of ints"),
    ],
)
def test_what_such_a_pruner_returns_is_checked(pruner, says):
    model, inputs = build("llava"), make(TINY["llava"], [1], [7]).inputs
    with gripvlm.prune(model, pruner, keep=12), pytest.raises(PrunerError, match=f"'wrong' on image 0.*{says}"):
        model.generate(**inputs, max_new_tokens=1)


def test_what_is_refused_and_what_it_says():
    model, inputs = build("llava"), make(TINY["llava"], [1], [7]).inputs
    with pytest.raises(PrunerError, match=r"'fastv' drops inside the language model.*gripvlm.pruned_run\(model"):
        gripvlm.prune_inputs(model, inputs, "fastv", keep=KEEP)
    assert gripvlm.prune_inputs(model, inputs, "fastv", keep=1.0)["input_ids"].shape == inputs["input_ids"].shape
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, "llava", replace(FAMILIES["llava"], layers=False))
        with (
            pytest.raises(UnsupportedModelError, match="drop at the input with"),
            gripvlm.prune(model, "fastv", keep=KEEP),
        ):
            pytest.fail("the block opened")
    with gripvlm.prune(model, "random", keep=4), pytest.raises(GripError, match="already inside"):  # noqa: SIM117
        with gripvlm.prune(model, "fastv", keep=KEEP):
            pytest.fail("the inner block opened")
    with gripvlm.prune(model, "fastv", keep=4), pytest.raises(BudgetError, match="pass keep=9 or more"):
        model.generate(**inputs, max_new_tokens=1)
    with gripvlm.prune(model, "fastv:layer=4", keep=8), pytest.raises(BudgetError, match="pass a layer from 1 to 3"):
        model.generate(**inputs, max_new_tokens=1)


@pytest.mark.parametrize("scores", [None, [0.0] * 12, torch.zeros(3)])
def test_scores_in_a_layer_that_are_no_tensor_of_n_name_the_pruner(scores):
    @dataclass(frozen=True)
    class Odd(LLMScorePruner):
        name = "odd"
        layer: int = 1

        def score_at_layer(self, layer, tokens):
            return scores

    inputs = make(TINY["llava"], [1], [7]).inputs
    model = build("llava")
    with gripvlm.prune(model, Odd(), keep=0.75), pytest.raises(PrunerError, match=r"'odd': score_at_layer\(\)"):
        model(**inputs)


@pytest.mark.parametrize("name", DELETION)
def test_recurrent_layers_are_passed_over_for_attention(name):
    """Before layer 3 the pruner reads layer 1, which attends; layer 2 does not."""
    model, inputs, spy = build(name), make(TINY[name], [1], [7]).inputs, Noting((3,))
    with capture_attention(model.get_decoder(), [1], "all_keys") as seen, gripvlm.prune(model, spy, keep=KEEP):
        model.generate(**inputs, max_new_tokens=1, do_sample=False)
    visual = (inputs["input_ids"][0] == IMAGE).nonzero().flatten()
    keys = torch.cat([tokens.all_keys for tokens in spy.seen])  # of all tiles of the picture
    torch.testing.assert_close(keys, seen[1][0][0, visual])
    assert all(tokens.norm(tokens.text).shape == tokens.text.shape for tokens in spy.seen)
    with (
        gripvlm.prune(model, Noting((2, 3)), keep=KEEP),
        pytest.raises(
            InputError, match="'steps' reads attention ahead of layer 3, but of the layers 2 to 2 all are recurrent"
        ),
    ):
        model.generate(**inputs, max_new_tokens=1, do_sample=False)
