"""Pruners of features and question, and wrappers: each against its formula, in float64 and one step at a time."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gripvlm.errors import PrunerError
from gripvlm.pruners import get_pruner
from gripvlm.pruners.baselines.given import Given
from gripvlm.pruners.baselines.grid import lattice
from gripvlm.pruners.baselines.norm import Norm
from gripvlm.pruners.baselines.random import Random
from gripvlm.pruners.input.cdpruner import CDPruner
from gripvlm.pruners.input.divprune import DivPrune
from gripvlm.pruners.input.svd_prune import SVDPrune
from gripvlm.pruners.ops.apportion import apportion
from gripvlm.pruners.wrappers.ensemble import Ensemble, mid_ranks
from gripvlm.pruners.wrappers.mmr import MMR
from gripvlm.pruners.wrappers.split import Split
from gripvlm.pruners.wrappers.spread import Spread
from gripvlm.types import Selection, VisualTokens
from gripvlm.utils.spec import split_specs
from naive import cosine


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def best(values: list[float], k: int) -> list[int]:
    """Indices of the k largest, ascending; among equals the lower."""
    return sorted(sorted(range(len(values)), key=lambda i: -values[i])[:k])


def picked(pruner, features: Tensor, k: int, **fields) -> list[int]:
    return pruner.select(VisualTokens(features, k, **fields)).indices.tolist()


# --- SVD-Prune ----------------------------------------------------------------------------------


def slow_leverage(features: Tensor, energy: float, centre: bool = False) -> list[float]:
    rows = features.double()
    rows = rows - rows.mean(0) if centre else rows
    left, values, _ = torch.linalg.svd(rows, full_matrices=False)
    r = next(r for r in range(1, len(values) + 1) if (values[:r] ** 2).sum() / (values**2).sum() >= energy - 1e-9)
    return [float((left[i, :r] ** 2).sum() / r) for i in range(len(rows))]


def test_svd_prune_by_hand():
    """Rows 0 and 1 span the two strong directions; 3 repeats half of row 0; 2 is weak."""
    rows = torch.tensor([[4.0, 0, 0], [0, 3, 0], [0, 0, 1], [2, 0, 0]])
    # squared singular values: 16 + 4 = 20 (rows 0, 3), 9 (row 1), 1 (row 2); 29/30 >= 0.9, so r = 2
    assert torch.allclose(SVDPrune().leverage(rows), torch.tensor([0.8, 1.0, 0.0, 0.2]) / 2, atol=1e-6)
    assert picked(SVDPrune(), rows, 2) == [0, 1]
    assert picked(SVDPrune(rank=1), rows, 2) == [0, 3]
    assert picked(SVDPrune(energy=0.6), rows, 2) == [0, 3]  # 20/30 >= 0.6, so r = 1
    assert SVDPrune().count(rows) == 2  # 0.5 + 0.4 >= 0.9
    assert SVDPrune(energy=0.91).count(rows) == 3
    assert picked(SVDPrune(), torch.zeros(5, 3), 2) == [0, 1]


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 16), st.integers(1, 20), st.integers(0, 99), st.booleans(), st.floats(0.2, 0.95))
def test_svd_prune_follows_the_formula(n, d, seed, centre, energy):
    rows = randn(n, d, seed=seed) + 2
    if centre and n == 1:
        return
    fast, slow = SVDPrune(energy, centre=centre).leverage(rows), slow_leverage(rows, energy, centre)
    torch.testing.assert_close(fast, torch.tensor(slow), atol=1e-3, rtol=1e-3)
    assert float(fast.sum()) == pytest.approx(1, abs=1e-4)


def test_svd_prune_adaptive_shares_by_count():
    flat, rich = torch.ones(8, 16), randn(8, 16)
    sample = [VisualTokens(flat, 4), VisualTokens(rich, 4)]
    plain, adaptive = SVDPrune(), SVDPrune(adaptive=True)
    counts = [plain.count(flat), plain.count(rich)]
    assert list(plain.allocate_budget(sample, 1)) == [4, 4]
    assert adaptive.allocate_budget(sample, 1) == apportion(8, counts, [8, 8])
    assert plain.count(flat) == 8  # equal rows have equal leverage 1/8: 7/8 < 0.9


# --- CDPruner -----------------------------------------------------------------------------------


def slow_cdpruner(features: Tensor, question: Tensor, k: int, sign: float, theta: float | None) -> list[int]:
    """argmax det L_S one token at a time, with real determinants."""
    n = len(features)
    c = [sign * sum(cosine(x, e) for e in question) / len(question) for x in features]
    r = [(one - min(c)) / (max(c) - min(c)) + 1e-6 for one in c]
    if theta is not None:
        r = [math.exp(theta / (2 * (1 - theta)) * one) for one in r]
    kernel = torch.tensor(
        [[r[i] * cosine(features[i], features[j]) * r[j] for j in range(n)] for i in range(n)], dtype=torch.float64
    )
    chosen: list[int] = []
    while len(chosen) < k:
        rest = [i for i in range(n) if i not in chosen]
        chosen.append(max(rest, key=lambda i: float(torch.linalg.det(kernel[[*chosen, i]][:, [*chosen, i]]))))
    return sorted(chosen)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 14), st.integers(0, 99), st.sampled_from(["positive", "negative"]), st.data())
def test_cdpruner_follows_the_determinants(n, seed, relevance, data):
    k = data.draw(st.integers(1, min(n - 1, 6)))  # the last one's r is 1e-6: its determinants are rounding
    theta = data.draw(st.sampled_from([None, 0.3, 0.8]))
    features, question = randn(n, 16, seed=seed), randn(3, 16, seed=seed + 1000)
    sign = 1.0 if relevance == "positive" else -1.0
    expected = slow_cdpruner(features, question, k, sign, theta)
    assert picked(CDPruner(relevance, theta), features, k, question=question) == expected


def test_cdpruner_by_hand():
    """Relevance 1, 1, 0.5..., 0: of two equal relevant tokens only one is worth keeping."""
    rows = torch.tensor([[1.0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 0, 1]])
    question = torch.tensor([[1.0, 0, 0]])
    # r = 1, 1, 0.707, 1e-6; after 0: token 1 adds 0, token 2 adds 0.5 x 0.5
    assert picked(CDPruner(), rows, 2, question=question) == [0, 2]
    assert picked(CDPruner(), rows, 3, question=question) == [0, 2, 3]
    assert picked(CDPruner(), rows, 4, question=question) == [0, 1, 2, 3]
    assert picked(CDPruner("negative"), rows, 1, question=question) == [3]
    assert picked(CDPruner("none"), rows, 3) == [0, 2, 3]
    assert picked(CDPruner(), rows, 3, question=question[:0]) == [0, 2, 3]  # an empty question is none
    assert picked(CDPruner(), torch.ones(6, 3), 3, question=question) == [0, 1, 2]


# --- wrappers -----------------------------------------------------------------------------------


def slow_mmr(features: Tensor, scores: list[float], k: int, balance: float) -> list[int]:
    low, high = min(scores), max(scores)
    s = [(one - low) / (high - low) if high > low else 1.0 for one in scores]
    chosen = [max(range(len(s)), key=lambda i: s[i])]
    while len(chosen) < k:
        rest = [i for i in range(len(s)) if i not in chosen]

        def value(i: int) -> float:
            return balance * s[i] - (1 - balance) * max(cosine(features[i], features[j]) for j in chosen)

        chosen.append(max(rest, key=value))
    return sorted(chosen)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 16), st.integers(0, 99), st.sampled_from([0.0, 0.3, 0.5, 1.0]), st.data())
def test_mmr_follows_the_formula(n, seed, balance, data):
    k = data.draw(st.integers(1, n))
    features = randn(n, 6, seed=seed)
    expected = slow_mmr(features, features.norm(dim=1).tolist(), k, balance)
    assert picked(MMR("norm", balance), features, k) == expected


def test_mmr_by_hand():
    rows = torch.tensor([[5.0, 0], [4.9, 0], [0, 3], [0, 1]])
    assert picked(MMR(Norm()), rows, 2) == [0, 2]
    assert picked(MMR(Norm(), balance=1.0), rows, 2) == [0, 1]
    endless = Given([[torch.tensor([0.0, torch.inf, -torch.inf, 1.0])]])
    assert picked(MMR(endless, 1.0), rows, 2) == [1, 3]
    with pytest.raises(PrunerError, match="'mmr' needs scores, but 'divprune' chooses a set without any"):
        MMR("divprune").select(VisualTokens(rows, 2))


def test_spread_keeps_the_lattice_and_the_best_of_the_rest():
    scores = torch.arange(16.0)
    tokens = VisualTokens(randn(16, 4), 8, grid=(4, 4))
    even = lattice((4, 4), 4)[0].tolist()
    assert even == [5, 7, 13, 15]
    assert Spread(Given([[scores]]), 0.5).select(tokens).indices.tolist() == sorted([*even, 14, 12, 11, 10])
    assert Spread(Given([[scores]]), 0.0).select(tokens).indices.tolist() == list(range(8, 16))
    assert Spread("norm", 1.0).select(tokens).indices.tolist() == lattice((4, 4), 8)[0].tolist()
    assert Spread("norm", 1.0).select(VisualTokens(randn(9, 4), 3)).indices.tolist() == [1, 4, 7]  # no raster: a line


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 9), st.data())
def test_spread_around_a_set_takes_the_longest_prefix_that_fits(h, w, seed, data):
    """DivPrune's choices are nested: the smallest that fills the union up to k."""
    k = data.draw(st.integers(1, h * w))
    features = randn(h * w, 8, seed=seed)
    even = set(lattice((h, w), k // 2)[0].tolist()) if k > 1 else set()
    asked = next(m for m in range(1, h * w + 1) if len(even | set(picked(DivPrune(), features, m))) == k)
    expected = sorted(even | set(picked(DivPrune(), features, asked)))
    assert picked(Spread("divprune", 0.5), features, k, grid=(h, w)) == expected


def test_ensemble_averages_ranks():
    assert mid_ranks(torch.tensor([3.0, 1.0, 3.0, 9.0])).tolist() == [1.5, 0, 1.5, 3]
    one, two = Given([[torch.tensor([4.0, 3, 2, 1])]]), Given([[torch.tensor([0.0, 50, 0.2, 0.1])]])
    # ranks 3 2 1 0 and 0 3 2 1
    rows = randn(4, 3)
    selection = Ensemble((one, two)).select(VisualTokens(rows, 2))
    assert selection.indices.tolist() == [0, 1]
    assert selection.scores is not None
    assert selection.scores.tolist() == [1.5, 2.5, 1.5, 0.5]
    assert picked(Ensemble((one, two), weights=(1, 3)), rows, 2) == [1, 2]  # 0.75 2.75 1.75 0.75
    corners = torch.eye(4)[[0, 0, 1, 1]] * torch.tensor([[1.0], [2], [3], [4]])
    # divprune of 2: rows 0 and 2, ranks 2.5 0.5 2.5 0.5; norm: 0 1 2 3
    assert picked(Ensemble(("norm", "divprune")), corners, 2) == [2, 3]


def test_split_shares_one_budget():
    same, mixed = torch.ones(6, 4), torch.eye(4)[[0, 1, 2, 3, 0, 1]]
    sample = [VisualTokens(same, 3, image=0), VisualTokens(mixed, 3, image=1)]
    assert Split("norm").allocate_budget(sample, 1) == [1, 5]  # equal rows: weight 0, but one row at least
    assert Split("norm", "tokens").allocate_budget(sample, 1) == [3, 3]
    assert Split("norm", "scores").allocate_budget([VisualTokens(same, 3), VisualTokens(same * 2, 3)], 1) == [2, 4]
    assert Split("norm").select(sample[0]).indices.tolist() == [0, 1, 2]
    assert Norm().allocate_budget(sample, 1) == [3, 3]
    with pytest.raises(PrunerError, match="scores >= 0"):
        Split(Given([[-torch.ones(6)]]), "scores").allocate_budget(sample[:1], 1)


@given(st.lists(st.tuples(st.integers(1, 30), st.floats(0, 5)), min_size=1, max_size=9), st.data())
def test_apportion_is_exact_and_fair(rows, data):
    caps, weights = [cap for cap, _ in rows], [weight for _, weight in rows]
    total = data.draw(st.integers(len(caps), sum(caps)))
    counts = apportion(total, weights, caps)
    assert sum(counts) == total
    assert all(1 <= count <= cap for count, cap in zip(counts, caps, strict=True))
    for i, (count, cap) in enumerate(zip(counts, caps, strict=True)):  # heavier ones never get much less
        if count < cap:
            assert all(weights[j] >= weights[i] or counts[j] <= count + 1 for j in range(len(caps)))


def test_apportion_by_hand():
    assert apportion(10, [3, 1, 1], [9, 9, 9]) == [6, 2, 2]
    assert apportion(8, [3, 1, 1], [3, 9, 9]) == [3, 3, 2]  # 4 capped to 3, 1, 1: 3 left, one more round each
    assert apportion(4, [0, 0, 0], [4, 4, 4]) == [2, 1, 1]
    assert apportion(3, [100, 1, 1], [9, 9, 9]) == [1, 1, 1]
    assert apportion(5, [1, 1], [9, 9], least=0) == [3, 2]


def test_wrappers_on_the_command_line():
    assert get_pruner("mmr(norm)") == MMR(Norm()) == get_pruner("mmr:inner=norm")
    assert get_pruner("mmr( random:seed=3 ):balance=0.7") == MMR(Random(3), 0.7)
    assert get_pruner("spread(mmr(norm):balance=1.0):floor=0.5") == Spread(MMR(Norm(), 1.0), 0.5)
    assert get_pruner("ensemble(random:seed=1,norm,divprune):weights=(1,2,3)").weights == (1, 2, 3)
    assert split_specs("norm,mmr(random:seed=1,norm):a=1,b=2,grid") == [
        "norm",
        "mmr(random:seed=1,norm):a=1,b=2",
        "grid",
    ]
    assert get_pruner("mmr(cdpruner)").needs == {"features", "question"}
    assert get_pruner("ensemble(grid,random)").needs == {"grid", "key"}


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("mmr(norm", "cannot read"),
        ("mmr()", r"use wrapper\(pruner\)"),
        ("mmr(norm)x", "cannot read"),
        ("mmr(nrom)", "unknown pruner 'nrom': did you mean 'norm'"),
        ("mmr(norm,grid)", "takes one pruner, got 2"),
        ("mmr(norm):balance=2", "balance=0.5, in"),
        ("norm(grid)", "'norm' has no option 'inner'"),
        ("ensemble(norm,grid):weights=(1,)", "one above 0 for each of the 2 pruners"),
        ("split(norm):by=size", "by=tokens.scores.variety; got Split"),
        ("mmr(fastv)", "'fastv' drops them at llm"),
        ("cdpruner:theta=1", "theta=0.5"),
        ("svd_prune:energy=0", "energy=0.9"),
    ],
)
def test_what_wrappers_refuse(spec, says):
    with pytest.raises(PrunerError, match=says):
        get_pruner(spec)


def test_a_wrapper_drops_merges():
    tokens = VisualTokens(randn(16, 4), 5, grid=(4, 4))
    assert get_pruner("pool").select(tokens).merge is not None
    wrapped: Selection = get_pruner("spread(pool)").select(tokens)
    assert wrapped.merge is None
