"""Wrappers, and pruners that move a budget between images: against their formulas, and on a model."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from itertools import combinations, permutations
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
from gripvlm.pruners.wrappers.gumbel import Gumbel
from gripvlm.pruners.wrappers.mmr import MMR
from gripvlm.pruners.wrappers.restore import Restore
from gripvlm.pruners.wrappers.split import Split, effective_rank
from gripvlm.pruners.wrappers.spread import Spread
from gripvlm.pruners.wrappers.top_p import TopP
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


def test_the_effective_rank_by_hand():
    assert float(effective_rank(torch.eye(6)[:4])) == pytest.approx(4)
    assert float(effective_rank(3 * torch.ones(6, 4))) == pytest.approx(1)
    assert float(effective_rank(torch.zeros(3, 4))) == 0
    two = torch.eye(4)[[0, 0, 0, 0, 1]]  # singular values 2 and 1
    shares = torch.tensor([2 / 3, 1 / 3])
    assert float(effective_rank(two)) == pytest.approx(float((-shares * shares.log()).sum().exp()))
    sample = [VisualTokens(torch.ones(6, 4), 3, image=0), VisualTokens(torch.eye(6)[:, :5], 3, image=1)]
    assert Split("norm", by="spectrum").allocate_budget(sample, 1) == [1, 5]


def logits(*images: list[float]) -> tuple[Given, list[VisualTokens]]:
    """A pruner whose scores are the logs of these probabilities (or weights), and images for it that keep two rows."""
    sizes = [len(weights) for weights in images]
    pruner = Given([[torch.tensor(weights).log() for weights in images]])
    return pruner, [VisualTokens(randn(n, 3), 2, image=i) for i, n in enumerate(sizes)]


def test_split_by_mass_shares_by_probability():
    inner, images = logits([6, 6, 6, 6], [3, 1, 1, 1])
    assert Split(inner, by="mass").allocate_budget(images, 1) == [3, 1]  # 24 and 6 of 30
    with pytest.raises(PrunerError, match="'split' with by=mass needs scores that are logits, and those of 'norm' are"):
        Split("norm", by="mass")
    with pytest.raises(PrunerError, match="pass by=rows, by=spectrum or by=mass"):
        Split("norm", by="size")  # type: ignore[arg-type]
    with pytest.raises(PrunerError, match=r"would undo what 'top_p' adds: use top_p\(split"):
        get_pruner("split(top_p(grip))")


def test_top_p_adds_tokens_where_two_do_not_have_enough():
    inner, images = logits([0.5, 0.3, 0.1, 0.05, 0.05], [0.2] * 5, [0.9, 0.05, 0.03, 0.01, 0.01])
    for p, most, expected in (
        (0.75, 2.0, [2, 4, 2]),
        (0.85, 2.0, [3, 4, 2]),
        (0.85, 9.0, [3, 5, 2]),
        (0.85, 1.0, [2] * 3),
    ):
        pruner = TopP(inner, p, most)
        assert pruner.allocate_budget(images, 1) == expected
        kept = pruner.select_batch([replace(t, keep=k) for t, k in zip(images, expected, strict=True)])
        assert [selection.k for selection in kept] == expected
    assert kept[0].indices.tolist() == [0, 1]
    with pytest.raises(PrunerError, match=r"pass p=0\.9, above 0 and below 1"):
        TopP(inner, 1.0)
    with pytest.raises(PrunerError, match=r"pass most=2\.0, 1 or more"):
        TopP(inner, most=0.5)
    with pytest.raises(PrunerError, match="'top_p' needs scores that are logits, and those of 'mmr' are not"):
        TopP("mmr(grip)")


def test_gumbel_draws_each_set_as_often_as_its_probability():
    """Of four tokens, two are drawn one after the other: P({a, b}) = pa pb / (1 - pa) + pb pa / (1 - pb)."""
    weights, temperature, draws = [8.0, 4.0, 2.0, 1.0], 2.0, 4000
    inner, (tokens,) = logits(weights)
    found = Counter(tuple(Gumbel(inner, temperature, seed).select(tokens).indices.tolist()) for seed in range(draws))
    share = torch.tensor(weights) ** (1 / temperature)
    p = (share / share.sum()).tolist()
    for a, b in combinations(range(4), 2):
        expected = p[a] * p[b] / (1 - p[a]) + p[b] * p[a] / (1 - p[b])
        assert found[a, b] / draws == pytest.approx(expected, abs=4 * (expected / draws) ** 0.5)


def test_gumbel_is_one_draw_for_each_picture_whatever_else_is_in_the_batch():
    inner, images = logits([1.0] * 12, [2.0] * 12)
    keyed = [replace(tokens, keep=5, key=key) for tokens, key in zip(images, (7, 8), strict=True)]
    together = [selection.indices.tolist() for selection in Gumbel(inner).select_batch(keyed)]
    assert together == [Gumbel(inner).select(tokens).indices.tolist() for tokens in keyed]
    assert together[0] != together[1] != Gumbel(inner, seed=1).select(keyed[1]).indices.tolist()
    assert Gumbel(inner).select(replace(keyed[0], key=9)).indices.tolist() != together[0]
    # Near 0 the highest scores.
    ranked, (tokens,) = logits([1.0, 5.0, 2.0, 9.0, 3.0])
    assert Gumbel(ranked, 1e-3).select(tokens).indices.tolist() == [1, 3]
    with pytest.raises(PrunerError, match=r"pass temperature=0\.5, above 0"):
        Gumbel(inner, 0)
    with pytest.raises(PrunerError, match="'gumbel' needs scores that are logits, and those of 'norm' are not"):
        Gumbel("norm")


def test_gumbel_of_a_joint_pruner_draws_from_all_images_of_a_prompt():
    @dataclass(frozen=True)
    class Joint(Given):
        joint: ClassVar[bool] = True

    high, low = torch.full((6,), 50.0), torch.zeros(6)
    inner = Joint([[high, low], [low, high, low]])
    images = [VisualTokens(randn(6, 3), 2, sample=s, image=i) for s, i in ((0, 0), (0, 1), (1, 0), (1, 1), (1, 2))]
    assert [selection.k for selection in Gumbel(inner).select_batch(images)] == [4, 0, 0, 6, 0]


def test_top_p_of_a_joint_pruner_raises_one_count_for_the_prompt():
    @dataclass(frozen=True)
    class Joint(Given):
        joint: ClassVar[bool] = True

    _, images = logits([1, 1, 1, 1], [1, 1, 1, 1])
    even = Joint([[torch.zeros(4), torch.zeros(4)]])
    assert TopP(even, 0.7).joint
    assert TopP(even, 0.7).allocate_budget(images, 1) == [3, 3]  # 6 of 8 have 0.75
    with pytest.raises(PrunerError, match=r"shares a prompt's budget out, and so does 'given' itself"):
        Split(even)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=4), st.integers(0, 99), st.floats(0.01, 0.99), st.floats(1, 5))
def test_budgets_by_picture_are_exact_in_the_mean_and_top_p_never_takes_away(sizes, seed, p, most):
    scores = [3 * randn(n, seed=seed + i) for i, n in enumerate(sizes)]
    images = [VisualTokens(randn(n, 5, seed=seed), (n + 1) // 2, image=i) for i, n in enumerate(sizes)]
    asked = [tokens.keep for tokens in images]
    for by in ("rows", "spectrum", "mass"):
        counts = Split(Given([scores]), by=by).allocate_budget(images, 1)
        assert sum(counts) == sum(asked)
        assert all(1 <= k <= n for k, n in zip(counts, sizes, strict=True))
    raised = TopP(Given([scores]), p, most).allocate_budget(images, 1)
    for tokens, score, count in zip(images, scores, raised, strict=True):
        assert tokens.keep <= count <= max(tokens.keep, int(most * tokens.keep))
        mass = score.double().softmax(0).sort(descending=True).values
        if count > tokens.keep:
            assert float(mass[: count - 1].sum()) < p + 1e-6
        if count < min(tokens.n, int(most * tokens.keep)):
            assert float(mass[:count].sum()) > p - 1e-6


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


def test_top_p_keeps_more_than_the_budget_on_a_model_and_says_so(llava):
    model, batch = llava
    plenty = Given([[torch.zeros(64)[:n] for n in sample] for sample in sizes_of(llava)])
    assert counts(TopP(plenty, 0.5, most=1.6), llava) == [[8], [8, 8]]
    with gripvlm.prune(model, TopP(plenty, 0.5, most=1.6), keep=5) as record:
        model.generate(**batch.inputs, max_new_tokens=1)
    assert record.paid == 24


def sizes_of(llava) -> list[list[int]]:
    model, batch = llava
    return [[tokens.n for tokens in sample] for sample in gripvlm.visual_tokens(model, batch.inputs)]


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
