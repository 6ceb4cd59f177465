"""Baselines by hand, and by the properties that define them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gripvlm.errors import BudgetError, PrunerError
from gripvlm.pruners import get_pruner
from gripvlm.pruners.baselines.given import Given
from gripvlm.pruners.baselines.grid import Grid, Pool, lattice
from gripvlm.pruners.baselines.norm import Norm
from gripvlm.pruners.baselines.random import Random
from gripvlm.types import VisualTokens
from pruner_inputs import image


def test_keep_all():
    for name in ("keep_all", "full"):
        chooser = get_pruner(name)
        assert chooser.name == name
        assert chooser.default_keep == 1.0
        assert chooser.select(image(3, 4, 12)).indices.tolist() == list(range(12))
        with pytest.raises(BudgetError, match=rf"'{name}' keeps every .* 5 of 12 cannot be met: leave keep out"):
            chooser.select(image(3, 4, 5))


def test_norm_keeps_the_longest_rows():
    features = torch.zeros(5, 3)
    features[:, 0] = torch.tensor([1.0, -9.0, 2.0, 9.0, -3.0])
    selection = Norm().select(VisualTokens(features, 3))
    assert selection.indices.tolist() == [1, 3, 4]
    assert selection.scores is not None
    assert selection.scores.tolist() == [1, 9, 2, 9, 3]


def test_random_is_uniform_nested_and_tied_to_seed_and_image():
    picks = [Random(seed).select(image(3, 4, 3)).indices for seed in range(2000)]
    counts = torch.bincount(torch.cat(picks), minlength=12)
    assert int(counts.min()) > 400  # 500 expected, standard deviation 19
    assert int(counts.max()) < 600
    few, many = (set(Random(5).select(image(3, 4, k)).indices.tolist()) for k in (4, 9))
    assert few < many
    base = Random(5).select(image(6, 6, 9, key=1)).indices
    assert torch.equal(base, Random(5).select(image(6, 6, 9, seed=1, key=1, sample=3)).indices)
    for other in (Random(6).select(image(6, 6, 9, key=1)), Random(5).select(image(6, 6, 9, key=2))):
        assert not torch.equal(base, other.indices)
    assert not torch.equal(base, Random(5).select(image(6, 6, 9, key=1, image=1)).indices)


def test_grid_is_even():
    assert Grid().select(image(4, 4, 4)).indices.tolist() == [5, 7, 13, 15]
    assert Grid().select(image(3, 9, 3)).indices.tolist() == [10, 13, 16]
    assert Grid().select(image(5, 5, 1)).indices.tolist() == [12]
    assert Grid().select(image(1, 7, 7)).indices.tolist() == list(range(7))


@given(st.integers(1, 30), st.integers(1, 30), st.data())
def test_lattice_covers_the_image(h, w, data):
    """No row or column of the raster is far from the chosen ones."""
    k = data.draw(st.integers(1, h * w))
    indices, centres = lattice((h, w), k)
    assert indices.unique().numel() == k
    assert bool((indices.diff() > 0).all()) if k > 1 else True
    assert bool((centres.floor()[:, 0] * w + centres.floor()[:, 1] == indices).all())
    rows = (indices // w).unique()
    per_row = torch.bincount(indices // w)[rows]
    assert int(per_row.max() - per_row.min()) <= 1
    gaps = torch.cat((rows[:1] + 1, rows.diff(), h - rows[-1:]))
    assert int(gaps.max()) <= -(-h // rows.numel()) + 1


def pooled(grid: tuple[int, int], k: int) -> tuple[Tensor, Tensor]:
    """Features [n, d] and what Pool makes of them [k, d], by the definition of a merge."""
    given_tokens = image(*grid, k)
    selection = Pool().select(given_tokens)
    merge = selection.merge
    assert merge is not None
    rows = torch.zeros(k, 6)
    rows.index_add_(0, merge.destination, given_tokens.features[merge.source] * merge.weight[:, None])
    return given_tokens.features, rows


@pytest.mark.parametrize(("h", "w", "r", "c"), [(4, 4, 2, 2), (6, 6, 2, 2), (6, 6, 3, 3), (6, 9, 2, 3), (24, 24, 8, 8)])
def test_pool_is_block_average_pooling_where_blocks_are_equal(h, w, r, c):
    features, rows = pooled((h, w), r * c)
    blocks = torch.nn.functional.avg_pool2d(features.T.reshape(1, 6, h, w), (h // r, w // c))
    torch.testing.assert_close(rows, blocks.flatten(2)[0].T)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.data())
def test_pool_shares_every_token_out_once(h, w, data):
    k = data.draw(st.integers(1, h * w))
    given_tokens = image(h, w, k)
    merge = Pool().select(given_tokens).merge
    assert merge is not None
    assert sorted(merge.source.tolist()) == list(range(h * w))
    sizes = torch.bincount(merge.destination, minlength=k)
    assert int(sizes.min()) >= 1
    torch.testing.assert_close(merge.weight, 1 / sizes[merge.destination])


def test_pool_leaves_no_anchor_empty():
    """On a crowded lattice some anchor's own cell lies nearer to another's point."""
    merge = Pool().select(image(12, 12, 130)).merge
    assert merge is not None
    assert int(torch.bincount(merge.destination, minlength=130).min()) == 1


def test_given_ranks_by_the_callers_scores():
    scores = [[torch.tensor([0.0, 5.0, 1.0, 4.0])], [torch.arange(4.0), -torch.arange(4.0)]]
    pruner = Given(scores)

    def picked(sample: int, image: int) -> list[int]:
        return pruner.select(VisualTokens(torch.zeros(4, 2), 2, sample=sample, image=image)).indices.tolist()

    assert (picked(0, 0), picked(1, 0), picked(1, 1)) == ([1, 3], [2, 3], [0, 1])
    with pytest.raises(PrunerError, match="no scores for image 1 of sample 0"):
        picked(0, 1)
    with pytest.raises(PrunerError, match=r"tensor \(9,\), got \(4,\)"):
        pruner.select(image(3, 3, 2))
