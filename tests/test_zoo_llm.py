"""Pruners inside the language model: published schedules, and each against its formula in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gripvlm.checks import checked_schedule
from gripvlm.errors import BudgetError, PrunerError
from gripvlm.pruners import LayerPruner, LayerTokens, Selection, VisualTokens, get_pruner, list_pruners
from gripvlm.pruners.clusters import density_peaks
from gripvlm.pruners.dart import DART
from gripvlm.pruners.depths import at_depths
from gripvlm.pruners.fastv import FastV
from gripvlm.pruners.layered import average
from gripvlm.pruners.matching import soft_matching
from gripvlm.pruners.mustdrop import MustDrop
from gripvlm.pruners.mustdrop_llm import MustDropLLM
from gripvlm.pruners.ptp import PTP
from gripvlm.pruners.pumer import PuMer
from gripvlm.pruners.pyramiddrop import PyramidDrop
from gripvlm.pruners.sparsevlm import SparseVLM, raters
from gripvlm.pruners.vscan import VScan
from gripvlm.selections import checked_selection
from test_zoo_vision import cls, cosine, falling, made, scaled

IN_LAYERS = sorted(row.name for row in list_pruners() if row.stage == "llm")


def entering(h: int, w: int, keep: int, seed: int = 0, words: int = 4, dropped: int = 0) -> LayerTokens:
    """Random tokens as they enter a layer, after the first `dropped` of the image were dropped."""
    known = made(h, w, keep, seed)
    generator = torch.Generator().manual_seed(seed + 1000)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    rows = torch.arange(dropped, h * w)
    n = rows.numel()
    return LayerTokens(
        layer=2,
        keep=keep,
        rows=rows,
        input=VisualTokens(known.features, keep, (h, w), randn(words, 6), vision=known.vision),
        hidden=randn(n, 6),
        last=randn(2, n).softmax(-1),
        question=randn(2, words, n).softmax(-1),
        text=randn(words, 6),
        keys=randn(n, 5),
    )


def drawn(data, grid: tuple[int, int], seed: int, words: int = 4) -> LayerTokens:
    n = grid[0] * grid[1]
    dropped = data.draw(st.integers(0, n - 1))
    return entering(*grid, data.draw(st.integers(1, n - dropped)), seed, words, dropped)


def agrees(tokens: LayerTokens, selection: Selection | Tensor | tuple, groups: dict[int, list[int]]) -> None:
    """Each key of `groups` is kept, as the mean of the hidden states of its group."""
    assert isinstance(selection, Selection)
    assert tokens.hidden is not None
    checked_selection("x", selection, tokens.n, tokens.keep, torch.device("cpu"), "here")
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


GRIDS = st.tuples(st.integers(1, 4), st.integers(1, 4))

# --- what all must do ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", IN_LAYERS)
@settings(max_examples=30, deadline=None)
@given(st.data(), st.integers(1, 700), st.sampled_from([5, 12, 28, 32, 80]))
def test_schedules_pay_for_what_was_asked(name, data, n, layers):
    keep = data.draw(st.integers(1, n))
    pruner = get_pruner(name)
    assert isinstance(pruner, LayerPruner)
    tokens = VisualTokens(torch.zeros(n, 1), keep)
    try:
        plan = checked_schedule(pruner, tokens, layers)
    except BudgetError as error:
        least = int(str(error).split("type keep=")[1].split(" ")[0])
        assert keep < least <= n  # and what it says to type does work
        checked_schedule(pruner, VisualTokens(torch.zeros(n, 1), least), layers)
    else:
        assert average(n, plan, layers) == pytest.approx(keep, abs=0.5)


@pytest.mark.parametrize("name", IN_LAYERS)
@settings(max_examples=25, deadline=None)
@given(GRIDS, st.integers(0, 99), st.sampled_from([0, 1, 4]), st.data())
def test_exactly_k_and_repeatable(name, grid, seed, words, data):
    n = grid[0] * grid[1]
    tokens = entering(*grid, data.draw(st.integers(1, n)), seed, words)
    pruner = get_pruner(name)
    assert isinstance(pruner, LayerPruner)
    one, two = pruner.select_at(2, tokens), pruner.select_at(2, tokens)
    assert isinstance(one, Selection)
    assert isinstance(two, Selection)
    assert torch.equal(one.indices, two.indices)
    checked_selection(name, one, n, tokens.keep, torch.device("cpu"), "here")
    if tokens.keep == n:
        assert one.indices.tolist() == list(range(n))


# --- published schedules -------------------------------------------------------------------------


def test_published_schedules():
    assert [FastV().schedule(576, k, 32) for k in (192, 128, 64)] == [{2: 166}, {2: 98}, {2: 30}]
    assert [FastV(3).schedule(576, k, 32) for k in (192, 128, 64)] == [{3: 152}, {3: 82}, {3: 11}]
    assert average(576, {8: 288, 16: 144, 24: 72}, 32) == 270
    assert PyramidDrop().schedule(576, 270, 32) == {8: 288, 16: 144, 24: 72}
    published = [{2: 300, 6: 200, 15: 110}, {2: 303, 6: 110, 15: 36}, {2: 66, 6: 30, 15: 17}]
    assert [round(average(576, plan, 32)) for plan in published] == [188, 124, 62]
    assert list(SparseVLM().schedule(576, 192, 32)) == [2, 6, 15]
    assert VScan().schedule(576, 64, 32) == {0: 96, 16: 32}
    assert DART().schedule(576, 192, 32) == {2: 166}
    assert list(PuMer().schedule(576, 192, 12)) == [2, 5, 8]
    # wiping everything after layer 24 (TwigVLM): (M K + R (24 - K)) / L with K = 2
    assert [(576 * 2 + r * 22) / 32 for r in (227, 134, 41)] == pytest.approx([192, 128, 64], abs=0.3)


def test_cuts_keep_their_relative_depth():
    assert at_depths((8, 16, 24), 32, 32) == [8, 16, 24]
    assert at_depths((8, 16, 24), 32, 28) == [7, 14, 21]
    assert at_depths((2, 6, 15), 32, 5) == [1, 2, 3]
    assert at_depths((2, 6, 15), 32, 2) == [1]
    assert at_depths((2, 5, 8), 12, 32) == [5, 13, 21]


# --- what each one computes ----------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(GRIDS, st.integers(0, 99), st.data())
def test_last_token_rankings(grid, seed, data):
    tokens = drawn(data, grid, seed)
    best = {i: [i] for i in falling(head_mean(tokens.last))[: tokens.keep]}
    for pruner in (FastV(), PyramidDrop(), VScan()):
        agrees(tokens, pruner.select_at(2, tokens), best)


def slow_peaks(x: Tensor, clusters: int) -> tuple[list[int], list[int]]:
    m, d = x.shape
    far = [[float((x[i].double() - x[j].double()).norm()) / math.sqrt(d) for j in range(m)] for i in range(m)]
    near = [sorted(far[i])[:5] for i in range(m)]
    density = [math.exp(-sum(one**2 for one in few) / len(few)) for few in near]
    value = []
    for i in range(m):
        denser = [far[i][j] for j in range(m) if (density[j], -j) > (density[i], -i)]
        value.append(density[i] * (min(denser) if denser else max(map(max, far))))
    centres = sorted(falling(value)[:clusters])
    to = [min(range(clusters), key=lambda c: (centres[c] != i, far[i][centres[c]])) for i in range(m)]
    return centres, to


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 16), st.integers(0, 99), st.data())
def test_density_peaks_follow_the_definition(m, seed, data):
    clusters = data.draw(st.integers(1, m))
    x = torch.randn(m, 4, generator=torch.Generator().manual_seed(seed))
    centres, to = density_peaks(x, clusters)
    assert (centres.tolist(), to.tolist()) == slow_peaks(x, clusters)


def test_density_peaks_find_clusters():
    x = torch.tensor([[0.0, 0], [0.1, 0], [0, 0.1], [9, 9], [9.1, 9], [9, 9.1]])
    centres, to = density_peaks(x, 2, neighbours=3)
    assert (centres.tolist(), to.tolist()) == ([0, 3], [0, 0, 0, 1, 1, 1])
    assert density_peaks(1000 * x, 2, neighbours=3)[0].tolist() == [0, 3]  # where densities underflow


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
@given(GRIDS, st.integers(0, 99), st.booleans(), st.sampled_from([0.0, 0.3, 1.0]), st.data())
def test_sparsevlm_follows_the_formula(grid, seed, given_question, recycle, data):
    tokens = drawn(data, grid, seed)
    n, k = tokens.n, tokens.keep
    pruner = SparseVLM(recycle=recycle, cluster=2)
    assert tokens.hidden is not None
    visual, text = tokens.input.features[tokens.rows], tokens.input.question
    if not given_question:
        object.__setattr__(tokens.input, "question", None)
        visual, text = tokens.hidden, tokens.text
    assert text is not None
    share = (visual.double() @ text.double().T).softmax(1).mean(0)
    words = [t for t in range(4) if float(share[t]) >= 0.25]
    score = head_mean(tokens.question, words)
    order = falling(score)
    fits = [s for s in range(1, k) if s + (int(recycle * (n - s)) + 1) // 2 + 1 == k] if recycle else []
    if not fits:
        agrees(tokens, pruner.select_at(2, tokens), {i: [i] for i in order[:k]})
        return
    s = max(fits)
    pool = sorted(order[s : s + int(recycle * (n - s)) + 1])
    centres, to = slow_peaks(tokens.hidden[pool], k - s)
    groups = {i: [i] for i in order[:s]} | {pool[c]: [] for c in centres}
    for i, centre in zip(pool, to, strict=True):
        groups[pool[centres[centre]]].append(i)
    agrees(tokens, pruner.select_at(2, tokens), groups)


def test_sparsevlm_parts_as_published():
    """300 of 576 at the first cut: 83 of 277 recycled into 9 clusters, and all that is kept adds up."""
    for n, count in [(576, 300), (300, 200), (200, 110), (576, 66)]:
        kept, recycled, clusters = SparseVLM().parts(n, count)
        assert (recycled, clusters) == (int(0.3 * (n - kept)) + 1, (int(0.3 * (n - kept)) + 1) // 10 + 1)
        assert kept + clusters == count
    assert SparseVLM().parts(10, 1) == (1, 0, 0)


def test_soft_matching_by_hand():
    keys = torch.tensor([[1.0, 0], [1, 0.1], [0, 1], [0.5, 1], [1, 0.2]])  # even places 0, 2, 4; odd 1, 3
    # cosines: 0-1 0.995, 2-3 0.894, 4-1 0.9952
    source, destination = soft_matching(keys, 2)
    assert sorted(zip(source.tolist(), destination.tolist(), strict=True)) == [(0, 1), (4, 1)]


@settings(max_examples=25, deadline=None)
@given(GRIDS, st.integers(0, 99), st.sampled_from(["score", "raster"]), st.sampled_from([0.0, 0.1, 1.0]), st.data())
def test_pumer_follows_the_rule(grid, seed, order, prune, data):
    tokens = drawn(data, grid, seed)
    n, k, keys = tokens.n, tokens.keep, tokens.keys
    assert keys is not None
    merged = min(k, math.floor((n - k) * 0.3 / (prune + 0.3) + 0.5))
    line = falling(head_mean(tokens.question, [0, 1, 2, 3]))[: k + merged]
    line = sorted(line) if order == "raster" else line
    edges = []
    for a in line[::2]:
        if line[1::2]:
            b = max(line[1::2], key=lambda b: cosine(keys[a], keys[b]))
            edges.append((cosine(keys[a], keys[b]), a, b))
    edges = sorted(edges, key=lambda edge: -edge[0])[:merged]
    groups = {i: [i] for i in line if i not in [a for _, a, _ in edges]}
    for _, a, b in edges:
        groups[b].append(a)
    agrees(tokens, PuMer(prune=prune, order=order).select_at(2, tokens), groups)


@settings(max_examples=30, deadline=None)
@given(GRIDS, st.integers(0, 99), st.sampled_from([0.5, 1.1, 8.0]), st.sampled_from([0.0, 0.08, 0.5]), st.data())
def test_mustdrop_filters_by_both_thresholds(grid, seed, ratio, keys, data):
    """i falls through every value at which a token passes, g = ratio x i, until k are left."""
    tokens = drawn(data, grid, seed)
    n, k = tokens.n, tokens.keep
    assert tokens.question is not None
    a = tokens.question.double().mean(0).tolist()
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
    agrees(tokens, pruner.select_at(2, tokens), {v: [v] for v in kept})
    assert len(kept) == k


def test_mustdrop_begins_in_the_vision_stage():
    known = made(6, 6, 12)
    ours, theirs = MustDropLLM().select(known), MustDrop().select(known)
    assert torch.equal(ours.indices, theirs.indices)
    assert MustDropLLM().schedule(576, 64, 32)[0] == 96
    assert list(MustDropLLM().schedule(576, 64, 32)) == [0, 2, 6, 15]


@settings(max_examples=20, deadline=None)
@given(GRIDS, st.integers(0, 99), st.data())
def test_dart_reads_keys_and_states(grid, seed, data):
    tokens = drawn(data, grid, seed)
    k, keys, x, text = tokens.keep, tokens.keys, tokens.hidden, tokens.text
    assert keys is not None
    assert x is not None
    assert text is not None
    own = sorted(falling(keys.abs().sum(1).tolist())[: min(k, 4)])
    chosen, ends = list(own), [x[i] for i in own] + list(text)
    for number, end in enumerate(ends):
        share = (k - len(own)) // len(ends) + (number < (k - len(own)) % len(ends))
        chosen += sorted((i for i in range(tokens.n) if i not in chosen), key=lambda i: cosine(x[i], end))[:share]
    agrees(tokens, DART().select_at(2, tokens), {i: [i] for i in chosen})


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
    agrees(tokens, PTP(alpha).select_at(2, tokens), {i: [i] for i in falling(f)[: tokens.keep]})


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("mustdrop_llm:ratio=0", "ratio=1.1"),
        ("sparsevlm:recycle=2", "recycle=0.3"),
        ("pumer:order=rank", "order=score"),
        ("pumer:prune=0,merge=0", "not both 0"),
        ("dart:pivots=0", "pivots=4"),
        ("vscan:first=0.5", "first=1.5"),
        ("ptp:alpha=2", "alpha=0.5"),
        ("ptp:windows=0", "windows=4"),
    ],
)
def test_what_they_refuse(spec, says):
    with pytest.raises(PrunerError, match=says):
        get_pruner(spec)
