"""Pruners at the input: each against its formula, in float64 and one step at a time."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import second
from gripvlm.errors import PrunerError
from gripvlm.pruners import get_pruner
from gripvlm.pruners.input.cdpruner import CDPruner
from gripvlm.pruners.input.divprune import DivPrune
from gripvlm.pruners.input.fastervlm import FasterVLM
from gripvlm.pruners.input.fopru import FoPru
from gripvlm.pruners.input.hawk import HAWK
from gripvlm.pruners.input.hiprune import HiPrune
from gripvlm.pruners.input.hired import HiRED
from gripvlm.pruners.input.holov import HoloV
from gripvlm.pruners.input.otprune import OTPrune
from gripvlm.pruners.input.prumerge import PruMerge, PruMergePlus
from gripvlm.pruners.input.prunesid import PruneSID, quotas
from gripvlm.pruners.input.scope import SCOPE
from gripvlm.pruners.input.svd_prune import SVDPrune
from gripvlm.pruners.input.visionzip import VisionZip
from gripvlm.pruners.input.vispruner import VisPruner
from gripvlm.pruners.llm.apet import ApETInput
from gripvlm.pruners.llm.dart import DARTInput
from gripvlm.pruners.llm.mustdrop import MustDrop
from gripvlm.pruners.llm.ptp import PTPVision
from gripvlm.pruners.llm.vscan import VScanVision
from gripvlm.pruners.ops.apportion import apportion
from gripvlm.types import Merge, Selection, VisionRows, VisualTokens
from naive import cosine
from pruner_inputs import GRIDS, attention, cls, image, picked, received
from second import falling


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rows_of(tokens: VisualTokens, selection: Selection) -> Tensor:
    """[k, d] rows that the language model gets, by the definition of a merge."""
    rows = tokens.features.double()[selection.indices]
    merge: Merge | None = selection.merge
    if merge is not None:
        for slot in set(merge.destination.tolist()):
            mine = (merge.destination == slot).nonzero().flatten().tolist()
            rows[slot] = sum(float(merge.weight[m]) * tokens.features[int(merge.source[m])].double() for m in mine)
    return rows


def agrees(tokens: VisualTokens, selection: Selection, expected: dict[int, Tensor]) -> None:
    """The kept rows are the keys of `expected`, and hold its values."""
    assert selection.indices.tolist() == sorted(expected)
    want = torch.stack([expected[i].double() for i in sorted(expected)])
    torch.testing.assert_close(rows_of(tokens, selection), want, atol=1e-5, rtol=1e-5)


def drawn(data, grid: tuple[int, int], seed: int) -> VisualTokens:
    return image(*grid, data.draw(st.integers(1, grid[0] * grid[1])), seed)


def test_divprune_takes_one_of_each_cluster_and_survives_duplicates():
    corners = torch.eye(4).repeat_interleave(3, dim=0)  # 4 directions, 3 equal rows each
    assert DivPrune().select(VisualTokens(corners, 4)).indices.tolist() == [0, 3, 6, 9]
    assert DivPrune().select(VisualTokens(corners, 11)).k == 11
    assert DivPrune().select(VisualTokens(torch.zeros(6, 4), 3)).indices.tolist() == [0, 1, 2]


def slow_leverage(features: Tensor, energy: float) -> list[float]:
    rows = features.double()
    left, values, _ = torch.linalg.svd(rows, full_matrices=False)
    r = next(r for r in range(1, len(values) + 1) if (values[:r] ** 2).sum() / (values**2).sum() >= energy - 1e-9)
    return [float((left[i, :r] ** 2).sum() / r) for i in range(len(rows))]


def test_svd_prune_by_hand():
    """Rows 0 and 1 span the two strong directions; 3 repeats half of row 0; 2 is weak."""
    rows = torch.tensor([[4.0, 0, 0], [0, 3, 0], [0, 0, 1], [2, 0, 0]])
    # squared singular values: 16 + 4 = 20 (rows 0, 3), 9 (row 1), 1 (row 2); 29/30 >= 0.9, so r = 2
    assert torch.allclose(SVDPrune().score(VisualTokens(rows, 1)), torch.tensor([0.8, 1.0, 0.0, 0.2]) / 2, atol=1e-6)
    assert picked(SVDPrune(), rows, 2) == [0, 1]
    assert picked(SVDPrune(energy=0.6), rows, 2) == [0, 3]  # 20/30 >= 0.6, so r = 1
    assert picked(SVDPrune(), torch.zeros(5, 3), 2) == [0, 1]


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 16), st.integers(1, 20), st.integers(0, 99), st.floats(0.2, 0.95))
def test_svd_prune_follows_the_formula(n, d, seed, energy):
    rows = randn(n, d, seed=seed) + 2
    fast, slow = SVDPrune(energy).score(VisualTokens(rows, 1)), slow_leverage(rows, energy)
    torch.testing.assert_close(fast, torch.tensor(slow), atol=1e-3, rtol=1e-3)
    assert float(fast.sum()) == pytest.approx(1, abs=1e-4)


def slow_cdpruner(features: Tensor, question: Tensor, k: int) -> list[int]:
    """argmax det L_S one token at a time, with real determinants."""
    n = len(features)
    c = [sum(cosine(x, e) for e in question) / len(question) for x in features]
    r = [(one - min(c)) / (max(c) - min(c)) + 1e-6 for one in c]
    kernel = torch.tensor(
        [[r[i] * cosine(features[i], features[j]) * r[j] for j in range(n)] for i in range(n)], dtype=torch.float64
    )
    chosen: list[int] = []
    while len(chosen) < k:
        rest = [i for i in range(n) if i not in chosen]
        chosen.append(max(rest, key=lambda i: float(torch.linalg.det(kernel[[*chosen, i]][:, [*chosen, i]]))))
    return sorted(chosen)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 14), st.integers(0, 99), st.data())
def test_cdpruner_follows_the_determinants(n, seed, data):
    k = data.draw(st.integers(1, min(n - 1, 6)))  # the last one's r is 1e-6: its determinants are rounding
    features, question = randn(n, 16, seed=seed), randn(3, 16, seed=seed + 1000)
    assert picked(CDPruner(), features, k, question=question) == slow_cdpruner(features, question, k)


def test_cdpruner_by_hand():
    """Relevance 1, 1, 0.5..., 0: of two equal relevant tokens only one is worth keeping."""
    rows = torch.tensor([[1.0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 0, 1]])
    question = torch.tensor([[1.0, 0, 0]])
    # r = 1, 1, 0.707, 1e-6; after 0: token 1 adds 0, token 2 adds 0.5 x 0.5
    assert picked(CDPruner(), rows, 2, question=question) == [0, 2]
    assert picked(CDPruner(), rows, 3, question=question) == [0, 2, 3]
    assert picked(CDPruner(), rows, 4, question=question) == [0, 1, 2, 3]
    assert picked(CDPruner(), rows, 1, question=-question) == [3]
    assert picked(CDPruner(), rows, 3, question=question[:0]) == [0, 2, 3]  # an empty question is none
    assert picked(CDPruner(), torch.ones(6, 3), 3, question=question) == [0, 1, 2]


def test_fastervlm_ranks_by_cls_attention():
    tokens = image(4, 4, 5)
    assert FasterVLM().select(tokens).indices.tolist() == sorted(falling(cls(tokens, -2))[:5])
    ties = VisualTokens(torch.zeros(4, 2), 2, vision=attention([0.1, 0.3, 0.3, 0.3]))
    assert FasterVLM().select(ties).indices.tolist() == [1, 2]
    no_cls = VisualTokens(torch.zeros(3, 2), 1, vision={-2: VisionRows(torch.tensor([[0.1, 0.2, 0.7]]))})
    assert FasterVLM().select(no_cls).indices.tolist() == [2]


def test_visionzip_published_budgets():
    assert [VisionZip().counts(k) for k in (192, 128, 64)] == [(162, 30), (108, 20), (54, 10)]


@settings(max_examples=25, deadline=None)
@given(GRIDS, st.integers(0, 99), st.sampled_from([0.0, 5 / 32, 0.5, 1.0]), st.data())
def test_visionzip_follows_the_formula(grid, seed, share, data):
    tokens = drawn(data, grid, seed)
    n, k, keys = tokens.n, tokens.keep, tokens.vision[-2].keys
    assert keys is not None
    few = math.floor(share * k + 0.5)
    dominant = falling(cls(tokens, -2))[: k - few]
    rest = [i for i in range(n) if i not in dominant]
    targets = [rest[i * (len(rest) // few)] for i in range(few)]
    went: dict[int, list[int]] = {target: [] for target in targets}
    for i in rest:
        if targets and i not in targets:
            went[max(targets, key=lambda t: cosine(keys[i], keys[t]))].append(i)
    x = tokens.features.double()
    expected = {i: x[i] for i in dominant}
    for target, those in went.items():
        expected[target] = (x[target] + sum(x[i] for i in those) / len(those)) / 2 if those else x[target]
    agrees(tokens, VisionZip(share).select(tokens), expected)


@settings(max_examples=25, deadline=None)
@given(GRIDS, st.integers(0, 99), st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from([1, 3, 8]), st.data())
def test_vispruner_follows_the_rule(grid, seed, important, step, data):
    tokens = drawn(data, grid, seed)
    k, x = tokens.keep, tokens.patches
    assert x is not None
    expected = second.vispruner(cls(tokens, -2), x, k, important, step)
    assert VisPruner(important, step).select(tokens).indices.tolist() == expected


def test_vispruner_by_hand():
    """Order 0..5; 4 repeats 3 and 2 repeats 5: of the even places (2, 4) the more alike goes first."""
    x = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [1, 1, 0.1], [0.5, 0, 1]])
    tokens = VisualTokens(x, 4, vision=attention([0.6, 0.5, 0.4, 0.3, 0.2, 0.1]), patches=x)
    # kept for attention: 0 1; rest 2 3 4 5: even places 2 4, odd 3 5; cos(4, 3) > cos(2, 5): 4, then of 2 3 5 ...
    # ... even places 2 5, odd 3: cos(2, 3) = 0, cos(5, 3) = 0.32: 5 goes
    assert VisPruner(step=1).select(tokens).indices.tolist() == [0, 1, 2, 3]


def slow_prumerge(tokens: VisualTokens, uniform: float, neighbours: int) -> dict[int, Tensor]:
    a, n, k = cls(tokens, -1), tokens.n, tokens.keep
    keys, x = tokens.vision[-1].keys, tokens.features.double()
    assert keys is not None
    if k == n:
        return dict(enumerate(x))
    more = int(1 < k < n)
    evenly = min(k - more - 1, math.floor(uniform * (k - more) + 0.5))
    kept = falling(a)[: k - more - evenly]
    others = [i for i in range(n) if i not in kept]
    kept += [others[j * len(others) // evenly] for j in range(evenly)]
    expected = {}
    for i in kept:
        near = sorted((j for j in range(n) if j != i), key=lambda j: -cosine(keys[i], keys[j]))[:neighbours]
        expected[i] = (x[i] + sum(a[j] * x[j] for j in near)) / (1 + sum(a[j] for j in near))
    if more:
        dropped = [i for i in range(n) if i not in kept]
        expected[falling(a, dropped)[0]] = sum(a[i] * x[i] for i in dropped) / sum(a[i] for i in dropped)
    return expected


@settings(max_examples=25, deadline=None)
@given(GRIDS, st.integers(0, 99), st.sampled_from([0, 2, 32]), st.booleans(), st.data())
def test_prumerge_follows_the_formula(grid, seed, neighbours, plus, data):
    tokens = drawn(data, grid, seed)
    pruner = (PruMergePlus if plus else PruMerge)(neighbours)
    agrees(tokens, pruner.select(tokens), slow_prumerge(tokens, 0.75 if plus else 0.0, neighbours))


def test_prumerge_counts_outliers():
    values = [0.1, 0.11, 0.12, 0.13, 0.14, 0.15, 0.16, 0.9]  # quartiles 0.1175, 0.1525: above 0.205
    assert PruMerge().count(VisualTokens(torch.zeros(8, 2), 1, vision=attention(values, -1))) == 1
    assert PruMerge().count(VisualTokens(torch.zeros(8, 2), 1, vision=attention([0.125] * 8, -1))) == 1


def test_hired_spends_where_the_thumbnail_looks():
    """Thumbnail 4 x 4 over 2 x 2 tiles; of its 8 strongest tokens 4, 2, 2 and 0 lie in the tiles."""
    early = torch.zeros(16)
    early[[0, 1, 4, 5, 2, 3, 8]] = torch.tensor([9.0, 8, 7, 6, 5, 4, 3])  # tiles 0, 1, 2
    early[9] = 2.0  # tile 2
    tiles = [image(4, 4, 4, seed=i, image=i) for i in range(4)]
    thumbnail = VisualTokens(torch.zeros(16, 2), 4, (4, 4), vision=attention(early.tolist(), 0))
    shares = HiRED(layout=(2, 2)).allocate_budget([*tiles, thumbnail], 1)
    assert shares == [*apportion(10, [4, 2, 2, 0], [16] * 4), 10]  # floor(0.5 x 20) for the thumbnail
    assert shares == [5, 2, 2, 1, 10]
    assert HiRED().allocate_budget([*tiles, thumbnail], 1) == [4] * 5
    with pytest.raises(PrunerError, match="means 4 tiles and a thumbnail, but this prompt has 3 items"):
        HiRED(layout=(2, 2)).allocate_budget(tiles[:3], 1)
    before = HiRED(layout=(2, 2), thumbnail="first").allocate_budget([thumbnail, *tiles], 1)
    assert before == [shares[-1], *shares[:-1]]
    tokens = image(3, 4, 5)
    assert HiRED().select(tokens).indices.tolist() == sorted(falling(cls(tokens, -2))[:5])
    assert (HiRED().vision_layers, get_pruner("hired:layout=(1,2)").vision_layers) == ((-2,), (0, -2))


@settings(max_examples=25, deadline=None)
@given(GRIDS, st.integers(0, 99), st.sampled_from([0.0, 0.5, 1.0]), st.data())
def test_hiprune_follows_the_rule(grid, seed, alpha, data):
    tokens = drawn(data, grid, seed)
    chosen = second.hiprune(received(tokens, 8), received(tokens, -2), grid[1], tokens.keep, alpha)
    assert HiPrune(alpha).select(tokens).indices.tolist() == chosen
    deep = second.hiprune(received(tokens, 8), received(tokens, -1), grid[1], tokens.keep, alpha)
    assert HiPrune(alpha, deep=-1).select(tokens).indices.tolist() == deep


def test_hiprune_counts_as_python_rounds():
    """75 x 0.1 / 5 = 1.5 is 2 anchors, 125 x 0.1 / 5 = 2.5 is 2; neighbours as the code takes them."""
    for keep, anchors in ((74, 1), (75, 2), (125, 2), (126, 3)):
        middle = torch.zeros(24 * 24)
        middle[[300, 420, 540]] = torch.tensor([3.0, 2, 1])
        vision = {8: VisionRows(middle[None]), -2: VisionRows(torch.linspace(1e-3, 0, 576)[None])}
        kept = HiPrune().select(VisualTokens(torch.zeros(576, 1), keep, (24, 24), vision=vision)).indices.tolist()
        around = {anchor + step for anchor in (300, 420, 540)[:anchors] for step in (0, -1, 1, -24, 24)}
        assert kept == [*range(keep - 5 * anchors), *sorted(around)]  # registers are at the top
    corner = {8: VisionRows(torch.tensor([[0.0, 0, 0, 1, 0, 0, 0, 0, 0]])), -2: VisionRows(torch.zeros(1, 9))}
    tokens = VisualTokens(torch.zeros(9, 1), 5, (3, 3), vision=corner)
    assert HiPrune(alpha=1.0).select(tokens).indices.tolist() == [0, 2, 3, 4, 6]  # 2 ends the row above


@settings(max_examples=25, deadline=None)
@given(GRIDS, st.integers(0, 99), st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from([1, 2, 3]), st.data())
def test_vscan_follows_the_rule(grid, seed, local, size, data):
    tokens = drawn(data, grid, seed)
    x = tokens.features.double()
    went = second.vscan(cls(tokens, 5), cls(tokens, -2), x, grid, tokens.keep, local, size)
    expected = {i: sum(x[j] for j in those) / len(those) for i, those in went.items()}
    agrees(tokens, VScanVision(local, size).select(tokens), expected)


def test_vscan_quota_is_equal_among_windows():
    """24 x 24, k = 64: 32 local tokens, two from each of 16 windows."""
    tokens = image(24, 24, 32)
    indices = VScanVision(local=1.0).select(tokens).indices
    window = indices // 24 // 6 * 4 + indices % 24 // 6
    assert torch.bincount(window).tolist() == [2] * 16


def test_mustdrop_merges_uniform_windows():
    """Rows 0-2 of a 4 x 4 raster: the window at the top left is uniform, and becomes its centre, 5."""
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
    window = [0, 1, 2, 4, 5, 6, 8, 9, 10]
    x[window] = torch.tensor([1.0, 0, 0, 0]) + 0.01 * torch.randn(9, 4, generator=torch.Generator().manual_seed(1))
    values = [0.01 * i for i in range(16)]
    values[0] = 0.5  # lifts the window's mean to 0.1, above tokens 3 and 7 but not 11..15
    tokens = VisualTokens(x, 6, (4, 4), vision=attention(values, -1))
    mean = {5: x[window].double().mean(0)}
    agrees(tokens, MustDrop(keys=0.0).select(tokens), {i: x[i] for i in range(11, 16)} | mean)
    agrees(tokens, MustDrop(keys=0.05).select(tokens), {i: x[i] for i in (0, *range(11, 16))})  # 0 is always kept
    agrees(tokens, MustDrop(tau=2.0, keys=0.0).select(tokens), {i: x[i] for i in (0, *range(11, 16))})
    nine = VisualTokens(x, 9, (4, 4), vision=attention(values, -1))  # merging would leave 8
    agrees(nine, MustDrop(keys=0.0).select(nine), {i: x[i] for i in (0, 8, 9, 10, *range(11, 16))})


def test_fopru_by_hand():
    values = [0.9, 0, 0, 0.3, 0.4, 0.35, 0.5, 0.3, 0.3]
    tokens = VisualTokens(torch.zeros(9, 2), 3, (3, 3), vision=attention(values))
    assert FoPru().select(tokens).indices.tolist() == [0, 4, 6]


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 9), st.integers(0, 99), st.floats(0, 8), st.data())
def test_fopru_takes_what_varies_more(n, seed, pull, data):
    """A full attention matrix of CLS and n patches; `pull` makes patches differ in what they give to the CLS token."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(2, n + 1, n + 1, generator=generator, dtype=torch.float64)
    scores[:, :, 0] += pull * torch.randn(n + 1, generator=generator, dtype=torch.float64)
    a = scores.softmax(-1)
    rows = VisionRows(
        *(x.float() for x in (a.mean(1)[:, 1:], a[:, 0, 1:])),
        patch_received=a[:, 1:, 1:].mean(1).float(),
        given=a[:, 1:, 1:].mean(2).float(),
    )
    inner = [[sum(float(head[i, j]) for head in a) / 2 for j in range(1, n + 1)] for i in range(1, n + 1)]
    u = [sum(inner[i][j] for i in range(n)) / n for j in range(n)]
    v = [sum(inner[i]) / n for i in range(n)]

    def variance(values: list[float]) -> float:
        return sum((x - sum(values) / n) ** 2 for x in values) / n

    g = u if variance(u) > variance(v) else v
    k = data.draw(st.integers(1, n))
    tokens = VisualTokens(torch.zeros(n, 2), k, (1, n), vision={-2: rows})
    assert FoPru().select(tokens).indices.tolist() == sorted(falling(g)[:k])


@settings(max_examples=15, deadline=None)
@given(st.integers(3, 6), st.integers(3, 6), st.integers(0, 99), st.data())
def test_mustdrop_follows_the_rule(h, w, seed, data):
    tokens = image(h, w, data.draw(st.integers(1, h * w)), seed)
    x, a, fixed = tokens.features.double(), cls(tokens, -1), falling(cls(tokens, -1))[: math.ceil(0.08 * h * w)]
    alike = {}
    for y0 in range(0, h - 2, 3):
        for x0 in range(0, w - 2, 3):
            cells = [(y0 + b) * w + x0 + c for b in range(3) for c in range(3)]
            pairs = [cosine(x[i], x[j]) for i in cells for j in cells if i < j]
            assert len(pairs) == 36
            if not set(cells) & set(fixed):
                alike[tuple(cells)] = sum(pairs) / 36
    merged = [
        cells for cells in sorted(alike, key=lambda c: -alike[c])[: (h * w - tokens.keep) // 8] if alike[cells] >= 0
    ]
    value = {i: a[i] for i in range(h * w)}
    for cells in merged:
        for i in cells:
            del value[i]
        value[cells[4]] = sum(a[i] for i in cells) / 9
    chosen = sorted(sorted(value), key=lambda i: -value[i])[: tokens.keep]
    means = {cells[4]: x[list(cells)].mean(0) for cells in merged}
    agrees(tokens, MustDrop(tau=0.0).select(tokens), {i: means.get(i, x[i]) for i in chosen})


@settings(max_examples=25, deadline=None)
@given(GRIDS, st.integers(0, 99), st.integers(1, 4), st.integers(0, 4), st.data())
def test_dart_follows_the_rule(grid, seed, pivots, words, data):
    tokens = drawn(data, grid, seed)
    x, text, k = tokens.features, tokens.question, tokens.keep
    assert text is not None
    sizes = [part.abs().sum(1).tolist() for part in (x, text)]
    expected = second.dart(x, sizes[0], text, sizes[1], k, pivots, words)
    assert DARTInput(pivots, words).select(tokens).indices.tolist() == expected


def scaled(values: list[float]) -> list[float]:
    low, high = min(values), max(values)
    return [(one - low) / (high - low) if high > low else 0.0 for one in values]


def test_ptp_shares_among_tiles():
    tiles = [image(3, 3, 4, seed=i, image=i) for i in range(3)]
    weights = [sum(scaled(cls(tile, -2))) / 9 for tile in tiles]
    assert PTPVision().allocate_budget(tiles, 1) == apportion(12, weights, [9] * 3)
    best = sorted(falling(cls(tiles[0], -2))[:4])
    assert PTPVision().select(tiles[0]).indices.tolist() == best


def test_otprune_by_hand():
    """Columns of length 1 make rows (.7, 0), (.7, 0), (0, 1): det K_i is 1 + .5 gamma twice and 1 + gamma."""
    rows = torch.tensor([[2.0, 0], [2, 0], [0, 5]])
    assert picked(OTPrune(), rows, 1) == [2]
    assert picked(OTPrune(), rows, 2) == [0, 2]  # 0 and 1 are equal: the lower first
    assert picked(OTPrune(), torch.zeros(4, 2), 2) == [0, 1]
    with pytest.raises(PrunerError, match=r"gamma=0\.01, above 0"):
        OTPrune(gamma=0)


@settings(max_examples=15, deadline=None)
@given(st.integers(2, 9), st.integers(0, 99), st.sampled_from([0.01, 1.0]), st.data())
def test_otprune_follows_the_determinants(n, seed, gamma, data):
    k, rows = data.draw(st.integers(1, n)), randn(n, 6, seed=seed)
    assert picked(OTPrune(gamma), rows, k) == second.otprune(rows, k, gamma)


def test_scope_by_hand():
    """Gains 2, 2, 1 x saliency .1, .2, .3: first token 1, then 2, as 0 adds nothing to what 1 covers."""
    rows = torch.tensor([[1.0, 0], [1, 0], [0, 1]])
    seen = {"patches": rows, "vision": attention([0.1, 0.2, 0.3])}
    assert picked(SCOPE(), rows, 1, **seen) == [1]
    assert picked(SCOPE(), rows, 2, **seen) == [1, 2]
    assert picked(SCOPE(alpha=0), rows, 2, **seen) == [0, 2]
    assert picked(SCOPE(alpha=4), rows, 1, **seen) == [2]


@settings(max_examples=15, deadline=None)
@given(GRIDS, st.integers(0, 99), st.sampled_from([0.5, 1.0]), st.data())  # without saliency, two may cover as much
def test_scope_follows_the_formula(grid, seed, alpha, data):
    tokens = drawn(data, grid, seed)
    k = min(tokens.keep, max(1, tokens.n // 2))  # once all is covered the last gains are rounding
    tokens = replace(tokens, keep=k)
    assert tokens.patches is not None
    expected = second.scope(cls(tokens, -2), tokens.patches, k, alpha)
    assert SCOPE(alpha).select(tokens).indices.tolist() == expected


def test_holov_by_hand():
    """Two crops of four, no two tokens alike: .6 and .4 of four tokens are 2 and 1, and the first crop has one more."""
    crops = HoloV(crops=2)
    shares = attention([0.3, 0.2, 0.05, 0.05, 0.1, 0.1, 0.1, 0.1])
    assert picked(crops, torch.eye(8), 4, vision=shares) == [0, 1, 2, 4]
    full = attention([0.9, 0.05, 0.01, 0.01, 0.01, 0.01, 0.005, 0.005])
    assert picked(crops, torch.eye(8), 6, vision=full) == [0, 1, 2, 3, 4, 5]  # no room for two of the first crop's


@settings(max_examples=15, deadline=None)
@given(GRIDS, st.integers(0, 99), st.sampled_from([1, 3, 16]), st.sampled_from([0.0, 0.09, 2.0]), st.data())
def test_holov_follows_the_formula(grid, seed, crops, alpha, data):
    tokens = drawn(data, grid, seed)
    expected = second.holov(cls(tokens, -2), tokens.features, tokens.keep, crops, alpha)
    assert HoloV(crops, alpha).select(tokens).indices.tolist() == expected


def test_apet_by_hand():
    """A basis of the longest row: it reproduces row 1, but not 2 and 3. What is not kept goes to 2, the only one."""
    rows = torch.tensor([[3.0, 0], [1, 0], [0, 1], [0, 0.9]])
    tokens = VisualTokens(rows, 2, patches=rows)
    agrees(tokens, ApETInput(basis=1).select(tokens), {0: rows[0], 2: rows[1:].mean(0)})
    assert picked(ApETInput(), rows, 2, patches=rows) == [0, 2]  # both of the basis: (0, 1) is the farthest from (3, 0)
    assert ApETInput().select(tokens).merge is None
    assert picked(ApETInput(), torch.ones(4, 2), 2, patches=torch.ones(4, 2)) == [0, 1]


@settings(max_examples=15, deadline=None)
@given(GRIDS, st.integers(0, 99), st.integers(1, 4), st.data())
def test_apet_follows_the_formula(grid, seed, basis, data):
    tokens = drawn(data, grid, seed)
    assert tokens.patches is not None
    groups = second.apet(tokens.patches, tokens.keep, basis)
    means = {i: tokens.features[those].double().mean(0) for i, those in groups.items()}
    agrees(tokens, ApETInput(basis).select(tokens), means)


def test_prunesid_shares_by_hand():
    """One each, the other five by 3 : 1 : 1 tokens apart; four groups, the last of them empty."""
    assert quotas(torch.tensor([6, 4, 2, 0]), torch.tensor([3, 1, 1, 0]), 8).tolist() == [4, 2, 2, 0]
    # 3 + 1 + 1 apart leave no room for 8: one more of each group, as far as it goes
    assert quotas(torch.tensor([9, 1]), torch.tensor([1, 1]), 4).tolist() == [3, 1]
    assert quotas(torch.tensor([3, 3]), torch.tensor([3, 3]), 3).tolist() == [1, 2]  # ends .5 and 1 round to 0 and 1


def test_prunesid_takes_the_first_of_equal_rows():
    rows = randn(12, 20)[[0, 1, 2, 11, 3, 4, 5, 11, 6, 7, 8, 11]]
    for k in range(1, 13):
        kept = [i for i in picked(PruneSID(), rows, k) if i in (3, 7, 11)]
        assert kept == [3, 7, 11][: len(kept)]


@settings(max_examples=10, deadline=None)
@given(GRIDS, st.integers(0, 99), st.data())
def test_prunesid_follows_the_rule(grid, seed, data):
    n = grid[0] * grid[1]
    rows, k = randn(n, 20, seed=seed), data.draw(st.integers(1, n))
    assert picked(PruneSID(), rows, k) == second.prunesid(rows, k)


def test_hawk_by_hand():
    """Two heads of two channels; the words' mean queries are (1, 0) and (0, 2)."""
    queries = torch.tensor([[[2.0, 0], [0, 1]], [[0, 0], [0, 3]]])
    keys = torch.tensor([[[3.0, 9], [9, 1]], [[4, 9], [9, 0]], [[0, 9], [9, -1]]])
    tokens = VisualTokens(torch.zeros(3, 1), 1, first_queries=queries, first_keys=keys)
    # products 3, 4, 0 of length 5 and 2, 0, -2 of length sqrt(8); / sqrt(2) falls away
    half = 0.5**0.5
    torch.testing.assert_close(HAWK(weights=(1, 0)).score(tokens), torch.tensor([0.6, 0.8, 0]))
    torch.testing.assert_close(HAWK(weights=(1, 3)).score(tokens), torch.tensor([0.6 + 3 * half, 0.8, -3 * half]))
    torch.testing.assert_close(HAWK().score(tokens), torch.tensor([0.3 + half / 2, 0.4, -half / 2]))
    assert get_pruner("hawk:weights=(1,0)").select(tokens).indices.tolist() == [1]
    assert HAWK().score(replace(tokens, first_queries=queries[:0])).tolist() == [0, 0, 0]
    with pytest.raises(PrunerError, match="has 3 weights, but the first layer has 2 heads: measure them"):
        HAWK(weights=(1, 1, 1)).score(tokens)
    for wrong in ((0.0, 0.0), (1.0, -1.0)):
        with pytest.raises(PrunerError, match="none below 0 and not all 0"):
            HAWK(weights=wrong)


@settings(max_examples=15, deadline=None)
@given(GRIDS, st.integers(0, 99))
def test_hawk_follows_the_formula(grid, seed):
    tokens = image(*grid, 1, seed)
    expected = second.hawk(tokens.first_queries, tokens.first_keys, (0.3, 0.7))
    torch.testing.assert_close(HAWK(weights=(0.3, 0.7)).score(tokens), torch.tensor(expected), atol=1e-5, rtol=1e-4)
