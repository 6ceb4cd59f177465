"""Pruners inside the language model: published schedules, and each against its formula in float64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_input import scaled
from torch import Tensor

import second
from gripvlm.engine.llm_stage import checked_schedule
from gripvlm.engine.outputs import checked_selection
from gripvlm.errors import BudgetError, PrunerError
from gripvlm.pruners import LLMPruner, get_pruner, list_pruners
from gripvlm.pruners.llm.apet import ApET
from gripvlm.pruners.llm.clse import CLSE, evolution, fine_structure
from gripvlm.pruners.llm.dart import DART
from gripvlm.pruners.llm.fastv import FastV
from gripvlm.pruners.llm.ivc_prune import IVCPrune
from gripvlm.pruners.llm.mustdrop import MustDrop, MustDropLLM
from gripvlm.pruners.llm.priortr import PriorTR
from gripvlm.pruners.llm.ptp import PTP
from gripvlm.pruners.llm.pumer import PuMer
from gripvlm.pruners.llm.pyramiddrop import PyramidDrop
from gripvlm.pruners.llm.sparsevlm import SparseVLM, raters
from gripvlm.pruners.llm.v2drop import V2Drop
from gripvlm.pruners.llm.vlm_pruner import VLMPruner
from gripvlm.pruners.llm.vscan import VScan
from gripvlm.pruners.ops.merging import density_peaks
from gripvlm.pruners.ops.schedules import average_tokens, ratio_schedule, same_depths
from gripvlm.types import LLMTokens, Selection, VisualTokens
from pruner_inputs import GRIDS, cls, entering, image
from second import falling

IN_LAYERS = sorted(row.name for row in list_pruners() if row.stage == "llm")


def drawn(data, grid: tuple[int, int], seed: int, words: int = 4) -> LLMTokens:
    """Some words ahead of the image, and at least one after it."""
    n = grid[0] * grid[1]
    dropped, ahead = data.draw(st.integers(0, n - 1)), data.draw(st.integers(0, words - 1))
    return entering(*grid, data.draw(st.integers(1, n - dropped)), seed, words, dropped, ahead)


def said(tokens: LLMTokens) -> list[int]:
    """The words after the image."""
    assert tokens.after is not None
    return tokens.after.nonzero().flatten().tolist()


def agrees(tokens: LLMTokens, selection: Selection | Tensor | tuple, groups: dict[int, list[int]]) -> None:
    """Each key of `groups` is kept, as the mean of the hidden states of its group."""
    assert isinstance(selection, Selection)
    assert tokens.hidden is not None
    checked_selection("x", selection, tokens, "here")
    assert selection.indices.tolist() == sorted(groups)
    rows, x = tokens.hidden.double()[selection.indices], tokens.hidden.double()
    if selection.merge is not None:
        touched = selection.merge.destination.unique()
        rows[touched] = 0
        weights = selection.merge.weight.double()[:, None]
        rows.index_add_(0, selection.merge.destination, weights * x[selection.merge.source])
    want = torch.stack([x[sorted(groups[i])].mean(0) for i in sorted(groups)])
    torch.testing.assert_close(rows, want, atol=1e-5, rtol=1e-5)


def head_mean(attention: Tensor | None, rows: list[int] | None = None) -> list[float]:
    """[n] mean over heads and the given query rows."""
    assert attention is not None
    values = attention.double().mean(0)
    return (values if rows is None else values[rows].mean(0)).tolist()


@pytest.mark.parametrize("name", IN_LAYERS)
@settings(max_examples=30, deadline=None)
@given(st.data(), st.integers(1, 700), st.sampled_from([5, 12, 28, 32, 80]))
def test_schedules_pay_for_what_was_asked(name, data, n, layers):
    keep = data.draw(st.integers(1, n))
    pruner = get_pruner(name)
    assert isinstance(pruner, LLMPruner)
    tokens = VisualTokens(torch.zeros(n, 1), keep)
    try:
        plan = checked_schedule(pruner, tokens, layers)
    except BudgetError as error:
        least = int(str(error).split("pass keep=")[1].split(" ")[0])
        assert keep < least <= n  # and that is the least that works
        checked_schedule(pruner, VisualTokens(torch.zeros(n, 1), least), layers)
        with pytest.raises(BudgetError):
            pruner.schedule(n, least - 1, layers)
    else:
        assert average_tokens(n, plan, layers) == pytest.approx(keep, abs=0.5)


@pytest.mark.parametrize("name", IN_LAYERS)
@settings(max_examples=25, deadline=None)
@given(GRIDS, st.integers(0, 99), st.sampled_from([(0, 0), (1, 0), (1, 1), (4, 2), (4, 4)]), st.data())
def test_exactly_k_and_repeatable(name, grid, seed, words, data):
    n = grid[0] * grid[1]
    tokens = entering(*grid, data.draw(st.integers(1, n)), seed, words[0], ahead=words[1])
    pruner = get_pruner(name)
    assert isinstance(pruner, LLMPruner)
    one, two = pruner.select_at_layer(2, tokens), pruner.select_at_layer(2, tokens)
    assert isinstance(one, Selection)
    assert isinstance(two, Selection)
    assert torch.equal(one.indices, two.indices)
    checked_selection(name, one, tokens, "here")
    if tokens.keep == n:
        assert one.indices.tolist() == list(range(n))


def test_published_schedules():
    assert [FastV().schedule(576, k, 32) for k in (192, 128, 64)] == [{2: 166}, {2: 98}, {2: 30}]
    assert [FastV(3).schedule(576, k, 32) for k in (192, 128, 64)] == [{3: 152}, {3: 82}, {3: 11}]
    assert average_tokens(576, {8: 288, 16: 144, 24: 72}, 32) == 270
    assert PyramidDrop().schedule(576, 270, 32) == {8: 288, 16: 144, 24: 72}
    assert list(SparseVLM().schedule(576, 192, 32)) == [3, 7, 16]  # what it costs: test_authors_choices.py
    assert VScan().schedule(576, 64, 32) == {0: 96, 16: 32}
    assert DART().schedule(576, 192, 32) == {2: 166}
    assert list(PuMer().schedule(576, 250, 12)) == [3, 6, 9]
    # wiping everything after layer 24 (TwigVLM): (M K + R (24 - K)) / L with K = 2
    assert [(576 * 2 + r * 22) / 32 for r in (227, 134, 41)] == pytest.approx([192, 128, 64], abs=0.3)


def test_cuts_keep_their_relative_depth():
    assert same_depths((8, 16, 24), 32, 32) == [8, 16, 24]
    assert same_depths((8, 16, 24), 32, 28) == [7, 14, 21]
    assert same_depths((2, 6, 15), 32, 5) == [1, 2, 3]
    assert same_depths((2, 6, 15), 32, 2) == [1]
    assert same_depths((2, 5, 8), 12, 32) == [5, 13, 21]


@settings(max_examples=15, deadline=None)
@given(GRIDS, st.integers(0, 99), st.data())
def test_last_token_rankings(grid, seed, data):
    tokens = drawn(data, grid, seed)
    best = {i: [i] for i in falling(head_mean(tokens.last))[: tokens.keep]}
    for pruner in (FastV(), PyramidDrop(), VScan()):
        agrees(tokens, pruner.select_at_layer(2, tokens), best)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 16), st.integers(0, 99), st.data())
def test_density_peaks_follow_the_definition(m, seed, data):
    clusters = data.draw(st.integers(1, m))
    x = torch.randn(m, 4, generator=torch.Generator().manual_seed(seed))
    centres, to = density_peaks(x, clusters)
    assert (centres.tolist(), to.tolist()) == second.peaks(x, clusters)


def test_density_peaks_find_clusters():
    x = torch.tensor([[0.0, 0], [0.1, 0], [0, 0.1], [9, 9], [9.1, 9], [9, 9.1]])
    centres, to = density_peaks(x, 2)
    assert (centres.tolist(), to.tolist()) == ([0, 3], [0, 0, 0, 1, 1, 1])
    assert density_peaks(1000 * x, 2)[0].tolist() == [0, 3]  # where densities underflow


def test_density_counts_as_many_neighbours_as_clusters():
    """Two clusters, so each row and its nearest: exp(-0.1^2 / 2) for the pair, exp(-1 / 2) for 0, 1 and 2.

    10 is densest, 0 the first of the others, 10 away from it. Over all five rows 2 and 1 would be densest.
    """
    x = torch.tensor([[0.0], [1], [2], [10], [10.1]])
    assert density_peaks(x, 2)[0].tolist() == [0, 3]


def test_sparsevlm_raters():
    """Two tokens, three words: shares by softmax over the words, those above the mean rate."""
    visual, text = torch.tensor([[1.0, 0], [0, 1]]), torch.tensor([[2.0, 0], [0, 1], [0, 0]])
    shares = [
        (math.exp(2) / (math.exp(2) + 2) + 1 / (2 + math.e)) / 2,
        (1 / (math.exp(2) + 2) + math.e / (2 + math.e)) / 2,
        (1 / (math.exp(2) + 2) + 1 / (2 + math.e)) / 2,
    ]
    assert [round(share, 3) for share in shares] == [0.499, 0.341, 0.159]
    assert raters(visual, text).tolist() == [True, True, False]
    assert raters(visual, text[:1]).tolist() == [True]
    assert raters(visual, torch.ones(3, 2)).tolist() == [True] * 3


@settings(max_examples=25, deadline=None)
@given(GRIDS, st.integers(0, 99), st.sampled_from([0.0, 0.3, 1.0]), st.data())
def test_sparsevlm_follows_the_formula(grid, seed, recycle, data):
    """Raters are words after the image, chosen over all of its rows, also where the first ones are gone."""
    tokens = drawn(data, grid, seed)
    n, k = tokens.n, tokens.keep
    pruner = SparseVLM(recycle=recycle, cluster=2)
    assert tokens.hidden is not None
    assert tokens.words is not None
    chosen = second.raters(tokens.input.features, tokens.words[said(tokens)])
    score = head_mean(tokens.question, [said(tokens)[i] for i in chosen])
    fits = [s for s in range(1, k) if s + (int(recycle * (n - s)) + 1) // 2 + 1 == k] if recycle else []
    s = max(fits, default=k)
    groups = second.sparsevlm(score, tokens.hidden, s, int(recycle * (n - s)) + 1, k - s)
    agrees(tokens, pruner.select_at_layer(2, tokens), groups)


def test_sparsevlm_parts_as_published():
    """300 of 576 at the first cut: 83 of 277 recycled into 9 clusters, and all that is kept adds up."""
    for n, count in [(576, 300), (300, 200), (200, 110), (576, 66)]:
        kept, recycled, clusters = SparseVLM().parts(n, count)
        assert (recycled, clusters) == (int(0.3 * (n - kept)) + 1, (int(0.3 * (n - kept)) + 1) // 10 + 1)
        assert kept + clusters == count
    assert SparseVLM().parts(10, 1) == (1, 0, 0)


@settings(max_examples=25, deadline=None)
@given(GRIDS, st.integers(0, 99), st.sampled_from([0.0, 0.1, 1.0]), st.data())
def test_pumer_follows_the_rule(grid, seed, prune, data):
    tokens = drawn(data, grid, seed)
    n, k, keys = tokens.n, tokens.keep, tokens.keys
    assert keys is not None
    merged = min(k - 1, math.floor((n - k) * 0.3 / (prune + 0.3) + 0.5))
    groups = second.pumer(head_mean(tokens.question, said(tokens)), keys, n - k - merged, merged)
    agrees(tokens, PuMer(prune=prune).select_at_layer(2, tokens), groups)


def test_pumer_never_merges_the_best_token_away():
    """All keys alike: the pairs that are merged are those ahead in the order of c, but for the first."""
    tokens = entering(3, 3, 5, words=2)
    object.__setattr__(tokens, "keys", torch.ones(9, 5))
    best = falling(head_mean(tokens.question, [0, 1]))
    found = PuMer(prune=0.0, merge=1.0).select_at_layer(3, tokens)
    assert best[0] in found.indices.tolist()
    assert {*range(9)} - {*found.indices.tolist()} == {best[2], best[4], best[6], best[8]}
    assert PuMer(prune=0.0, merge=1.0).merges(9, 4) == 3  # (7 - 1) // 2 of the 7 that two pruned leave


@settings(max_examples=30, deadline=None)
@given(GRIDS, st.integers(0, 99), st.sampled_from([0.5, 1.1, 8.0]), st.sampled_from([0.0, 0.08, 0.5]), st.data())
def test_mustdrop_filters_by_both_thresholds(grid, seed, ratio, keys, data):
    """i falls through every value at which a token passes, g = ratio x i, until k are left."""
    tokens = drawn(data, grid, seed)
    n, k = tokens.n, tokens.keep
    assert tokens.question is not None
    a = tokens.question.double().mean(0)[said(tokens)].tolist()
    total = [sum(row[v] for row in a) / sum(map(sum, a)) for v in range(n)]
    peak = [max(row[v] for row in a) for v in range(n)]
    fixed = set(falling(cls(tokens.input, -1))[: math.ceil(keys * grid[0] * grid[1])])
    always = {v for v in range(n) if int(tokens.rows[v]) in fixed}
    kept: set[int] = set()
    for i in sorted({*peak, *(one / ratio for one in total)}, reverse=True):
        passes = {v for v in range(n) if total[v] >= ratio * i * (1 - 1e-12) or peak[v] >= i}
        kept = always & passes if len(always) >= k else always | passes
        if len(kept) >= k:
            break
    pruner = MustDropLLM(ratio=ratio, keys=keys)
    agrees(tokens, pruner.select_at_layer(2, tokens), {v: [v] for v in kept})
    assert len(kept) == k


def test_mustdrop_begins_in_the_vision_stage():
    known = image(6, 6, 12)
    ours, theirs = MustDropLLM().select(known), MustDrop().select(known)
    assert torch.equal(ours.indices, theirs.indices)
    assert MustDropLLM().schedule(576, 64, 32)[0] == 96
    assert list(MustDropLLM().schedule(576, 64, 32)) == [0, 3, 7, 11, 15]


@settings(max_examples=20, deadline=None)
@given(GRIDS, st.integers(0, 99), st.data())
def test_dart_reads_keys_and_states(grid, seed, data):
    tokens = drawn(data, grid, seed)
    assert tokens.norm is not None
    assert tokens.hidden is not None
    assert tokens.text is not None
    assert tokens.key_sizes is not None
    assert tokens.text_key_sizes is not None
    mine = said(tokens)
    chosen = second.dart(
        tokens.norm(tokens.hidden),
        tokens.key_sizes.tolist(),
        tokens.norm(tokens.text)[mine],
        tokens.text_key_sizes[mine].tolist(),
        tokens.keep,
    )
    agrees(tokens, DART().select_at_layer(2, tokens), {i: [i] for i in chosen})


@pytest.mark.parametrize("spec", ["pumer", "mustdrop_llm:keys=0", "sparsevlm:recycle=0"])
def test_without_text_after_the_image_the_last_token_decides(spec):
    """Words ahead of it see nothing: their zeros must not leave the choice to the order of the raster."""
    tokens = entering(3, 4, 5, words=3, ahead=3)
    score = head_mean(tokens.last)
    found = get_pruner(spec).select_at_layer(3, tokens)
    assert found.scores is not None
    assert falling(found.scores.tolist()) == falling(score)
    if spec != "pumer":  # which merges too
        assert found.indices.tolist() == sorted(falling(score)[:5])


def test_without_text_after_the_image_dart_and_ptp_go_by_the_image():
    tokens = entering(3, 4, 7, words=3, ahead=3)
    assert tokens.norm is not None
    assert tokens.hidden is not None
    assert tokens.key_sizes is not None
    alone = second.dart(tokens.norm(tokens.hidden), tokens.key_sizes.tolist(), tokens.hidden[:0], [], 7)
    assert DART().select_at_layer(2, tokens).indices.tolist() == alone
    assert PTP().select_at_layer(2, tokens).indices.tolist() == sorted(falling(cls(tokens.input, -2))[:7])


@settings(max_examples=20, deadline=None)
@given(GRIDS, st.integers(0, 99), st.sampled_from([0.0, 0.5, 1.0]), st.data())
def test_ptp_weighs_saliency_and_instruction(grid, seed, alpha, data):
    n = grid[0] * grid[1]
    tokens = entering(*grid, data.draw(st.integers(1, n)), seed)
    assert tokens.question is not None
    heads = tokens.question.double().mean(0)
    asked = scaled([max(float(heads[t, j]) for t in range(4)) for j in range(n)])
    base = scaled(cls(tokens.input, -2))
    f = [(1 - alpha) * b + alpha * c for b, c in zip(base, asked, strict=True)]
    agrees(tokens, PTP(alpha).select_at_layer(2, tokens), {i: [i] for i in falling(f)[: tokens.keep]})


def test_the_null_token_of_priortr_by_hand():
    """P .4, .2, .4 of the last word and Q .4, .4, .2 of the first: scores 0, -.14, .28."""
    tokens = entering(1, 3, 1, words=2)
    looks = torch.tensor([[[0.2, 0.2, 0.1], [0.2, 0.1, 0.2]]])
    tokens = replace(tokens, question=looks, last=looks[:, 1])
    score = PriorTR(last=True).score_at_layer(3, tokens)
    torch.testing.assert_close(score, torch.tensor([0.0, 0.2 * math.log(0.5), 0.4 * math.log(2)]))
    # of both words P is .4, .3, .3
    score = PriorTR().score_at_layer(3, tokens)
    torch.testing.assert_close(score, torch.tensor([0.0, 0.3 * math.log(0.75), 0.3 * math.log(1.5)]))
    alone = replace(tokens, after=torch.zeros(2, dtype=torch.bool))
    torch.testing.assert_close(PriorTR().score_at_layer(3, alone), looks[0, 1])


def test_v2drop_by_hand():
    tokens = entering(1, 3, 1)
    moved = torch.tensor([[3.0, 4], [0, 6], [1, 0]])
    tokens = replace(tokens, before=torch.ones(3, 2), hidden=1 + moved)
    assert V2Drop().score_at_layer(3, tokens).tolist() == [5, 6, 1]
    assert V2Drop().select_at_layer(3, tokens).indices.tolist() == [1]
    with pytest.raises(PrunerError, match="three of 1 or more"):
        V2Drop(layers=(3, 17))


def test_clse_by_hand():
    """A chessboard is all high frequency, an even field has none."""
    board = torch.tensor([[1.0, 5], [-1, 5], [-1, 5], [1, 5]])
    torch.testing.assert_close(fine_structure(board, (2, 2), 0.1), torch.full((4,), 0.5))  # of one of two channels
    # changes 0, 0, 0, 1/2 have mean 1/8 and deviation 1/4
    moved = evolution(torch.ones(4), torch.tensor([1.0, 1, 1, 2]), 1.0)
    torch.testing.assert_close(moved, torch.sigmoid(torch.tensor([-0.5, -0.5, -0.5, 1.5])), atol=1e-4, rtol=1e-4)


@settings(max_examples=15, deadline=None)
@given(GRIDS, st.integers(0, 99), st.sampled_from([0.1, 0.7]))
def test_clse_follows_the_formula(grid, seed, cutoff):
    tokens = entering(*grid, 1, seed)
    assert tokens.hidden is not None
    looked = head_mean(tokens.last)
    if tokens.n > 1:
        score = CLSE(cutoff=cutoff).score_at_layer(1, tokens)
        want = second.clse(tokens.input.features, tokens.hidden, looked, grid, cutoff, 0.1)
        torch.testing.assert_close(score, torch.tensor(want), atol=1e-4, rtol=1e-3)
    if tokens.n > 2:  # no grid any more
        fewer = entering(*grid, 1, seed, dropped=1)
        torch.testing.assert_close(CLSE().score_at_layer(11, fewer), torch.tensor(head_mean(fewer.last)))


def test_apet_compresses_states_too():
    tokens = entering(3, 4, 5)
    assert tokens.hidden is not None
    agrees(tokens, ApET(basis=2).select_at_layer(16, tokens), second.apet(tokens.hidden, 5, 2))


def test_schedules_in_proportion():
    assert ratio_schedule("x", 576, 208, 32, {1: 1.72, 11: 1.09, 21: 0.32}) == {1: 331, 11: 209, 21: 62}
    assert ratio_schedule("x", 576, 203, 32, {3: 1.0, 17: 0.5, 22: 0.0}) == {3: 288, 17: 143, 22: 2}
    assert ratio_schedule("x", 16, 16, 4, {1: 1.0, 2: 0.5, 3: 0.0}) == {1: 16, 2: 16, 3: 16}
    assert ApET().schedule(576, 64, 32) == {0: 96, 16: 32}
    assert PriorTR().schedule(576, 192, 32) == {3: 152}


def test_ivc_prune_by_hand():
    """One head of one channel. The word's value is ln 2, the image's are 1, 0, 2, 3: it gives 2, 1, 4, 8 fifteenths."""
    turns = torch.tensor([[0.0, 1], [1, 0], [0.5, 0.5], [0.4, 0.4]])[..., None]
    values, word = torch.tensor([1.0, 0, 2, 3])[:, None, None], torch.full((1, 1, 1), math.log(2))
    tokens = replace(entering(1, 4, 2, words=1), values=values, text_values=word, rotary=turns)
    fifteenths = torch.tensor([2.0, 1, 4, 8]) / 15
    again = (fifteenths + torch.tensor([3.0, 0, 6, 9]).softmax(0)) / 2  # the seed, token 3, asks too
    score = IVCPrune(coordinates=0).score_at_layer(2, tokens)
    torch.testing.assert_close(score, again + torch.tensor([0.0, 0, 0, 1]))
    # Of 2 tokens half for each kind of coordinate leaves nothing to the foreground; of 3 round(0.9) and the seed
    assert IVCPrune(coordinates=0.5).select_at_layer(2, tokens).indices.tolist() == [0, 1]
    assert IVCPrune(coordinates=0.3).select_at_layer(2, replace(tokens, keep=3)).indices.tolist() == [0, 1, 3]
    # text ahead of the image asks where there is no other, the image itself where there is none at all
    ahead = replace(tokens, after=torch.zeros(1, dtype=torch.bool))
    assert torch.equal(IVCPrune(coordinates=0).score_at_layer(2, ahead), score)
    none = replace(ahead, text_values=word[:0], after=ahead.after[:0])
    assert IVCPrune(coordinates=0, seeds=0.5).select_at_layer(2, none).indices.tolist() == [2, 3]
    assert IVCPrune().schedule(576, 432, 32) == {16: 288}
    assert (IVCPrune().evict_after_prefill(32), IVCPrune(decode=True).evict_after_prefill(32)) == (None, 1)
    with pytest.raises(PrunerError, match=r"in \[0, 0.5\]"):
        IVCPrune(coordinates=0.6)


@settings(max_examples=15, deadline=None)
@given(GRIDS, st.integers(0, 99), st.sampled_from([0.1, 0.2, 0.5]), st.integers(0, 4), st.data())
def test_ivc_prune_follows_the_rule(grid, seed, coordinates, ahead, data):
    tokens = entering(*grid, data.draw(st.integers(1, grid[0] * grid[1])), seed, ahead=ahead)
    assert tokens.values is not None
    assert tokens.text_values is not None
    assert tokens.rotary is not None
    text = tokens.text_values[ahead if ahead < 4 else 0 :]
    expected = second.ivc_prune(text, tokens.values, tokens.rotary, tokens.keep, coordinates, 0.1)
    assert IVCPrune(coordinates=coordinates, seeds=0.1).select_at_layer(2, tokens).indices.tolist() == expected


def test_vlm_pruner_by_hand():
    """Four tokens in a row; the pivot is 0. Cosines to it are 1, .6 and 0; 1 goes to 0, the only one kept beside 3."""
    states = torch.tensor([[2.0, 0], [5, 0], [3, 4], [0, 2]])
    keys = torch.tensor([[9.0], [1], [1], [1]])
    tokens = replace(entering(1, 4, 2), hidden=states, all_keys=keys)
    found = VLMPruner(pivots=1).select_at_layer(2, tokens)
    assert found.indices.tolist() == [0, 3]
    assert found.merge is not None
    # .3 of itself and .7 of what goes to it: 1 with cosine 1 to 0; 2 with .8 to 3
    rows = torch.zeros(2, 2).index_add(
        0, found.merge.destination, found.merge.weight[:, None] * states[found.merge.source]
    )
    torch.testing.assert_close(rows, torch.tensor([[0.6 + 3.5, 0], [2.1, 0.6 + 2.8]]))


def test_vlm_pruner_ends_where_hidden_states_are_not_finite():
    """No threshold is above NaN: passes would follow each other for ever."""
    tokens = entering(2, 3, 4)
    assert tokens.hidden is not None
    found = VLMPruner(pivots=1).select_at_layer(2, replace(tokens, hidden=torch.full_like(tokens.hidden, torch.nan)))
    assert found.k == 4


@settings(max_examples=15, deadline=None)
@given(GRIDS, st.integers(0, 99), st.integers(1, 4), st.integers(1, 5), st.data())
def test_vlm_pruner_follows_the_rule(grid, seed, pivots, batch, data):
    tokens = entering(*grid, data.draw(st.integers(1, grid[0] * grid[1])), seed)
    assert tokens.hidden is not None
    assert tokens.all_keys is not None
    pruner = VLMPruner(pivots=pivots, batch=batch)
    expected = second.vlm_pruner(tokens.hidden, tokens.all_keys, grid, tokens.keep, pivots, 0.8, batch)
    assert pruner.select_at_layer(2, tokens).indices.tolist() == expected
