"""Every pruner x every family that supplies what it needs x every budget x a ragged batch x sdpa and eager.

Selections are made for all k from 1 to n; the models run for a few of them. The rest of the layer pruners' budgets:

    python -m pytest -q tests/pruners/test_matrix.py -m slow
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import gripvlm
from gripvlm.engine.outputs import checked_selection
from gripvlm.errors import BudgetError, InputError, UnsupportedModelError
from gripvlm.models import FAMILIES
from gripvlm.pruners import LLMPruner, get_pruner
from gripvlm.pruners.registry import _BUILT_IN
from gripvlm.types import Merge, Selection
from matrix import (
    EVERYTHING,
    IMAGES,
    NAMES,
    SPECS,
    TOWER,
    Case,
    Spy,
    budgets,
    case,
    chosen,
    decided_by_rounding,
    feasible,
    few,
    lacking,
    misplaced_pairs,
    needs_of,
    pairs,
    pruner_of,
    refused_pairs,
    same,
    seen,
    sound,
)
from tiny_families import TINY, build, make

BOTH = ("sdpa", "eager")


def run(here: Case, pruner, keep, encoded=None):
    """The logits behind each prompt, and what was selected."""
    encoded = here.encoded if encoded is None else encoded
    with (
        torch.no_grad(),
        gripvlm.pruned_run(here.model, here.inputs, pruner, keep, encoded=encoded) as (arguments, record),
    ):
        logits = here.model(**arguments).logits
    return logits, record.selections


def rows(selections: list[list[Selection]]) -> list[list[list[int]]]:
    return [[selection.indices.tolist() for selection in sample] for sample in selections]


def test_the_matrix_has_every_pruner_and_every_family():
    tried = {name.strip() for spec in SPECS for name in [spec.partition(":")[0].partition("(")[0]]}
    elsewhere = {"gumbel", "repeats", "top_p"}  # test_wrappers.py, test_repeats.py
    assert tried | {*EVERYTHING, *TOWER} | elsewhere == {*_BUILT_IN}
    covered = {name for stage in ("input", "llm") for _, name in pairs(stage)}
    assert covered == set(NAMES) <= set(FAMILIES)
    tried = len(pairs("input")) + len(pairs("llm")) + len(misplaced_pairs())
    assert tried + len(refused_pairs()) == len(SPECS) * len(NAMES)


@pytest.mark.parametrize(("spec", "name"), pairs("input"))
def test_selections_at_every_budget(spec, name):
    """Exact, sound, the same in the batch and alone, and the same for the same rows whatever the budget before."""
    here, pruner = case(name), pruner_of(spec, name)
    images = seen(here, pruner)
    most = max(max(sample) for sample in here.sizes)
    alone = []
    for sample in range(len(IMAGES)):
        only = case(name, only=sample)
        alone.append(
            (pruner_of(spec, name, sample), seen(only, pruner_of(spec, name, sample), here.encoded.take([sample])))
        )
    for k in range(1, most + 1):
        together = chosen(pruner, images, k)
        for sample, mine in enumerate(together):
            for tokens, selection in mine:
                sound(selection, tokens.n, tokens.keep)
                checked_selection(spec, selection, tokens, "here")
            if k not in few(most):
                continue
            single, its = alone[sample]
            (own,) = chosen(single, its, k)
            assert all(same(one, other) for (_, one), (_, other) in zip(mine, own, strict=True)), k


@pytest.mark.parametrize(("spec", "name"), [pair for pair in pairs("input") if not decided_by_rounding(*pair)])
def test_models_run_on_what_is_selected(spec, name):
    """k = n is the unpruned model bit for bit; half of the rows: finite, alone as in the batch, sdpa as eager."""
    picked = []
    for attention in BOTH:
        here, pruner = case(name, attention), pruner_of(spec, name)
        logits, selections = run(here, pruner, 1.0)
        assert here.unpruned(logits)
        half = max(max(sample) for sample in here.sizes) // 2
        keep = budgets(here.sizes, half)
        logits, selections = run(here, pruner, keep)
        assert bool(logits.isfinite().all())
        assert [sum(s.k for s in sample) for sample in selections] == [sum(sample) for sample in keep]
        picked.append(rows(selections))
        for sample in range(len(IMAGES)) if attention == "sdpa" else ():
            only = case(name, attention, sample)
            single, its = run(only, pruner_of(spec, name, sample), [keep[sample]])
            assert rows(its) == [picked[0][sample]]
            tolerance = 3 * TINY[name].tolerance  # some selections round worse than others
            torch.testing.assert_close(single[0, -1], logits[sample, -1], atol=tolerance, rtol=tolerance)
    assert picked[0] == picked[1]


def levels(pruner: LLMPruner, here: Case, everything: bool) -> list[int]:
    """The least budget, one in the middle, one less than all; or every budget that there is."""
    able = list(feasible(here, pruner))
    assert able, "no budget but all rows"
    return able if everything else sorted({able[0], able[len(able) // 2], able[-2]})


def inside(spec: str, name: str, everything: bool) -> None:
    """A layer pruner on one family: see the tests that call it."""
    picked: dict[str, list] = {}
    for attention in BOTH:
        here, pruner = case(name, attention), pruner_of(spec, name)
        layers = len(here.model.get_decoder().layers)
        logits, selections = run(here, pruner, 1.0)
        assert here.unpruned(logits)
        for k in levels(pruner, here, everything):
            keep = budgets(here.sizes, k)
            logits, selections = run(here, pruner, keep)
            assert bool(logits.isfinite().all())
            for sample, asked in zip(selections, keep, strict=True):
                assert abs(sum(s.paid for s in sample) - sum(asked)) <= 0.5 * len(asked)
                for selection in sample:
                    assert len(selection.counts) == layers
                    before = torch.arange(selection.n)
                    for left in selection.layers:  # sorted, unique, and never one that was dropped before
                        assert bool((left.diff() > 0).all())
                        assert bool(torch.isin(left, before).all())
                        before = left
                    assert torch.equal(before, selection.indices)
            picked.setdefault(attention, []).append(
                [[[x.tolist() for x in s.layers] for s in own] for own in selections]
            )
            for sample in range(len(IMAGES)) if attention == "sdpa" else ():
                single, its = run(case(name, attention, sample), pruner, [keep[sample]])
                assert [[x.tolist() for x in s.layers] for s in its[0]] == picked["sdpa"][-1][sample]
                tolerance = 3 * TINY[name].tolerance  # some selections round worse than others
                torch.testing.assert_close(single[0, -1], logits[sample, -1], atol=tolerance, rtol=tolerance)
    assert picked["sdpa"] == picked["eager"]


@pytest.mark.parametrize(("spec", "name"), pairs("llm"))
def test_layer_pruners_at_some_budgets(spec, name):
    """k = n is the unpruned model; counts as scheduled; finite; alone as in the batch; sdpa as eager."""
    inside(spec, name, everything=False)


@pytest.mark.slow
@pytest.mark.parametrize(("spec", "name"), pairs("llm"))
def test_layer_pruners_at_every_budget(spec, name):
    inside(spec, name, everything=True)


@pytest.mark.parametrize(("spec", "name"), pairs("llm"))
def test_choices_inside_the_layers_at_every_count(spec, name):
    """What a layer pruner was shown, asked again for every count from 1 to all."""
    here = case(name)
    spy = Spy(pruner_of(spec, name), [])
    for k in levels(spy, here, False):
        if not spy.shown:  # the smallest budget may drop all at the input
            run(here, spy, budgets(here.sizes, k))
    assert spy.shown
    for layer, tokens in spy.shown:
        for count in range(1, tokens.n + 1):
            answer = spy.inner.select_at_layer(layer, replace(tokens, keep=count))
            sound(answer, tokens.n, count)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("spec", EVERYTHING)
def test_keeping_all(spec, name):
    for attention in BOTH:
        here = case(name, attention)
        logits, selections = run(here, spec, None)
        assert here.unpruned(logits)
        assert [[s.k for s in sample] for sample in selections] == here.sizes
        with pytest.raises(BudgetError, match="cannot be met"):
            run(here, spec, 3)


HAVE = {
    "vision_attention": [name for name in FAMILIES if FAMILIES[name].vision is not None],
    "grid": [name for name in FAMILIES if FAMILIES[name].has_rasters],
    "layers": [name for name in FAMILIES if FAMILIES[name].layers],
}
HAVE["patches"] = HAVE["vision_attention"]
HAVE["first_layer"] = []  # it is known of a model, not of a family: the message names another pruner


PROMPTS = [1, 2, 0], [7, 9, 5]  # pictures and words of each prompt; the last has no picture


def generated(name: str, spec: str, attention: str = "sdpa", **only: int) -> list[list[list[int]]]:
    """What is kept of each image in the block around `generate`."""
    model, batch = build(name, attention), make(TINY[name], *PROMPTS, **only)
    keep = 0.4 if get_pruner(spec).stage == "input" else 0.75
    with gripvlm.prune(model, spec, keep=keep) as record:
        model.generate(**batch.inputs, max_new_tokens=2, do_sample=False, pad_token_id=0)
    for sample in record.selections:  # a pruner may move its budget between the images of a prompt
        counts = sum(gripvlm.Budget.of(keep).count(selection.n) for selection in sample)
        assert abs(sum(s.paid for s in sample) - counts) <= (keep == 0.75) * 0.5 * len(sample)
    return [[selection.indices.tolist() for selection in sample] for sample in record.selections]


@pytest.mark.parametrize("spec", [s for s in SPECS if s.partition(":")[0] not in ("given", "grip", "relaxed")])
def test_every_pruner_around_generate(spec):
    """A ragged batch, one prompt without any picture, is like its prompts alone, and sdpa like eager."""
    together = generated("llava", spec)
    assert together == [generated("llava", spec, only=i)[0] for i in range(3)]
    assert together == generated("llava", spec, "eager")


@pytest.mark.parametrize(("spec", "name"), refused_pairs())
def test_pairs_that_cannot_work_are_refused_when_attached(spec, name):
    """Before any picture is seen, by a message that says what is missing and which families have it."""
    model, pruner = build(name), pruner_of(spec, name)
    ways = (
        lambda: gripvlm.prune(model, pruner, 4),
        lambda: gripvlm.pruned_run(model, {"input_ids": torch.zeros(1, 1).long(), "pixel_values": None}, pruner, 4),
    )
    told = []
    with pytest.raises(UnsupportedModelError) as error, ways[0]():
        pytest.fail("the block opened")
    told.append(str(error.value))
    with pytest.raises(UnsupportedModelError) as error, ways[1]():
        pytest.fail("the block opened")
    told.append(str(error.value))
    for text in told:
        assert repr(get_pruner(pruner).name) in text
        assert name in text
        first = lacking(spec, name)[0]
        families = set(text.replace(",", " ").replace(":", " ").split())
        assert {*HAVE[first]} - {name} <= families
        assert needs_of(spec)[1] == "llm" or first in text


@pytest.mark.parametrize(("spec", "name"), misplaced_pairs())
def test_layers_where_a_model_of_recurrent_layers_cannot_drop_are_refused(spec, name):
    here, pruner = case(name), pruner_of(spec, name)

    def every_budget() -> None:  # at some of them these layers let all through
        for k in levels(pruner, here, False):
            run(here, pruner, budgets(here.sizes, k))

    with pytest.raises(InputError, match=r"no layer 1 to drop before: use 2 to 3|all are recurrent: choose other"):
        every_budget()


@pytest.mark.parametrize("spec", ["hiprune", "vscan_vision:window=2", "spread(hiprune)"])
def test_blocks_that_a_tower_does_not_have_are_refused_when_attached(spec):
    """llava's tiny tower has 3 blocks; the published ones are CLIP's."""
    said = r"reads a block of the vision tower by its number, but there is no layer [58] in this CLIP\w+: it has 3"
    with pytest.raises(InputError, match=rf"{said}, from 0 to 2; the pruner's options are \w"):
        gripvlm.prune(build("llava"), spec, 4).__enter__()


def test_the_invariants_can_fail():
    """The matrix's own checks, on selections that are wrong."""
    four = torch.arange(4)
    merged = Merge(torch.tensor([0, 5]), torch.tensor([0, 0]), torch.tensor([0.5, 0.5]))
    sound(Selection(four, 8, torch.ones(8), merged), 8, 4)
    wrong = [
        Selection(torch.arange(3), 8),
        Selection(four.flip(0), 8),
        Selection(torch.tensor([0, 1, 1, 2]), 8),
        Selection(four + 5, 8),
        Selection(four, 9),
        Selection(four, 8, torch.full((8,), torch.nan)),
        Selection(four, 8, merge=replace(merged, weight=torch.tensor([0.5, 0.4]))),
        Selection(four, 8, merge=replace(merged, weight=torch.tensor([1.5, -0.5]))),
        Selection(four, 8, merge=replace(merged, source=torch.tensor([0, 8]))),
        Selection(four, 8, merge=replace(merged, destination=torch.tensor([4, 4]))),
    ]
    for selection in wrong:
        with pytest.raises(AssertionError):
            sound(selection, 8, 4)
    assert not same(wrong[6], wrong[7])
