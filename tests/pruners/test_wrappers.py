"""Wrappers, and pruners that move a budget between images: against their formulas, and on a model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import permutations
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import gripvlm
from gripvlm.errors import PrunerError
from gripvlm.pruners import Pruner, get_pruner
from gripvlm.pruners.baselines.given import Given
from gripvlm.pruners.baselines.grid import lattice
from gripvlm.pruners.baselines.norm import Norm
from gripvlm.pruners.input.divprune import DivPrune
from gripvlm.pruners.llm.ptp import PTP, PTPVision
from gripvlm.pruners.ops.apportion import apportion, nearest
from gripvlm.pruners.wrappers.ensemble import Ensemble, mid_ranks
from gripvlm.pruners.wrappers.mmr import MMR
from gripvlm.pruners.wrappers.restore import Restore
from gripvlm.pruners.wrappers.split import Split
from gripvlm.pruners.wrappers.spread import Spread
from gripvlm.types import Selection, VisionRows, VisualTokens
from pruner_inputs import picked
from tiny_families import TINY, build, make


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


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


def test_restore_by_hand():
    """Row 3 is kept. D is 3 for 0, 2 and 4, one direction, and 1 for 1: 0 and 2 are anchors, and all else goes to 0."""
    rows = torch.tensor([[1.0, 0], [0, 1], [2, 0], [9, 9], [3, 0]])
    found = Restore("norm", pruned=0.34).select(VisualTokens(rows, 3))
    assert found.indices.tolist() == [1, 2, 3]  # 1 is the middle one of 0, 1 and 4
    assert found.merge is not None
    assert found.merge.source.tolist() == [0, 1, 4]
    assert found.merge.destination.tolist() == [0, 0, 0]
    assert torch.allclose(found.merge.weight, torch.tensor(1 / 3))
    assert Restore("norm").select(VisualTokens(rows, 1)).merge.source.tolist() == [0, 1, 2, 3, 4]  # half of 1 is none
    with pytest.raises(PrunerError, match=r"pruned=0\.5, in \[0, 1\)"):
        Restore("norm", pruned=1.0)


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
    assert Split("norm").select(sample[0]).indices.tolist() == [0, 1, 2]
    assert Norm().allocate_budget(sample, 1) == [3, 3]


def test_a_wrapper_drops_merges():
    tokens = VisualTokens(randn(16, 4), 5, grid=(4, 4))
    assert get_pruner("pool").select(tokens).merge is not None
    wrapped: Selection = get_pruner("spread(pool)").select(tokens)
    assert wrapped.merge is None


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


@dataclass(frozen=True)
class Uneven(Pruner):
    """All spare rows to the last image; `wrong` breaks the contract."""

    name: ClassVar[str] = "uneven"
    wrong: str = ""

    def allocate_budget(self, images, num_layers):
        total = sum(tokens.keep for tokens in images)
        counts = [1] * (len(images) - 1) + [total - len(images) + 1]
        return {"": counts, "sum": [k + 1 for k in counts], "zero": [0, *counts[1:]], "length": counts[:-1]}[self.wrong]

    def select(self, tokens):
        return Selection(torch.arange(tokens.keep), tokens.n)


@pytest.fixture(scope="module")
def llava():
    return build("llava"), make(TINY["llava"], [1, 2], [7, 9])


def counts(pruner, llava, keep=5):
    model, batch = llava
    with gripvlm.prune(model, pruner, keep=keep) as record:
        model.generate(**batch.inputs, max_new_tokens=2, do_sample=False)
    return [[selection.k for selection in sample] for sample in record.selections]


def test_a_budget_moves_between_the_images_of_a_prompt(llava):
    assert counts(Uneven(), llava) == [[5], [1, 9]]


def test_split_shares_by_variety(llava):
    one, two = counts("split(norm)", llava)
    assert one == [5]
    assert sum(two) == 10
    assert min(two) >= 1


@pytest.mark.parametrize("wrong", ["sum", "zero", "length"])
def test_a_wrong_allotment_is_refused(llava, wrong):
    with pytest.raises(PrunerError, match=r"allots .* of sample"):
        counts(Uneven(wrong), llava)
    assert counts(Uneven(), llava)[0] == [5]  # the model is as it was


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_the_nearest_counts(data):
    """No other counts with the same sum, one moved, are nearer to what is wished."""
    size = data.draw(st.integers(1, 5))
    least = data.draw(st.lists(st.integers(0, 4), min_size=size, max_size=size))
    most = [low + data.draw(st.integers(0, 6)) for low in least]
    wished = data.draw(st.lists(st.floats(0, 12), min_size=size, max_size=size))
    total = data.draw(st.integers(sum(least), sum(most)))
    counts = nearest(total, wished, least, most)
    assert sum(counts) == total
    assert all(low <= count <= high for low, count, high in zip(least, counts, most, strict=True))
    for up, down in permutations(range(size), 2):
        if counts[up] < most[up] and counts[down] > least[down]:
            gain = abs(wished[up] - counts[up]) - abs(wished[up] - counts[up] - 1)
            assert gain <= abs(wished[down] - counts[down] + 1) - abs(wished[down] - counts[down]) + 1e-6


@pytest.mark.parametrize("keep", [37, 40, 64, 200])
def test_regions_share_what_goes_on_after_the_cut(keep):
    """576 tokens an image, 2 of 32 layers see them all: 37 is the least of each, whatever it matters."""
    noise = torch.Generator().manual_seed(0)
    rows = [torch.rand(1, 576, generator=noise) ** power for power in (8, 1, 1)]
    images = [
        VisualTokens(torch.randn(576, 4, generator=noise), keep, vision={-2: VisionRows(received)}) for received in rows
    ]
    counts = PTP().allocate_budget(images, 32)
    assert sum(counts) == 3 * keep
    after = [PTP().schedule(576, count, 32)[2] for count in counts]
    asked = PTP().schedule(576, keep, 32)[2]
    shares = PTPVision().allocate_budget([replace(tokens, keep=asked) for tokens in images], 32)
    assert all(abs(one - other) <= 1 for one, other in zip(after, shares, strict=True))
    assert counts[0] < counts[1] or keep == 37
