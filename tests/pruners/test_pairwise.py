"""Greedy methods on a batch choose what they choose of each image alone, and what they chose one image at a time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from gripvlm.pruners import get_pruner
from gripvlm.pruners.input.cdpruner import EPS
from gripvlm.pruners.ops import pairwise as together
from gripvlm.types import VisualTokens

METHODS = [
    "divprune",
    "cdpruner",
    "mmr(norm)",
    "mmr(norm):balance=0",
]


def divprune(pruner, tokens: VisualTokens) -> list[int]:
    rows = normalize(tokens.features.float(), dim=-1)
    cosine = rows @ rows.T
    distance = 1 - torch.maximum(cosine, cosine.T)
    distance.fill_diagonal_(torch.inf)
    chosen = [int(distance.amin(dim=1).argmax())]
    while len(chosen) < tokens.keep:
        nearest = distance[chosen].amin(dim=0)
        nearest[chosen] = -torch.inf
        chosen.append(int(nearest.argmax()))
    return sorted(chosen)


def cdpruner(pruner, tokens: VisualTokens) -> list[int]:
    rows = normalize(tokens.features.float(), dim=-1)
    quality, cosine = pruner.quality(rows, tokens), rows @ rows.T
    cosine = torch.maximum(cosine, cosine.T)
    left, chosen = cosine.diagonal().clone(), []
    factor = rows.new_zeros(tokens.keep, tokens.n)
    for step in range(tokens.keep):
        gain = torch.where(left > EPS, quality.square() * left, quality - quality.max() - 1)
        gain[chosen] = -torch.inf
        pick = int(gain.argmax())
        chosen.append(pick)
        part = cosine[pick] - (factor[:step, pick, None] * factor[:step]).sum(dim=0)
        if left[pick] > EPS:
            factor[step] = part * left[pick].rsqrt()
        left = left - factor[step].square()
    return sorted(chosen)


def mmr(pruner, tokens: VisualTokens) -> list[int]:
    scores = tokens.features.float().norm(dim=-1)
    low, high = scores.aminmax()
    scores = (scores - low) / (high - low) if high > low else torch.ones_like(scores)
    rows = normalize(tokens.features.float(), dim=-1)
    cosine = torch.maximum(rows @ rows.T, (rows @ rows.T).T)
    chosen = [int(scores.argmax())]
    while len(chosen) < tokens.keep:
        value = pruner.balance * scores - (1 - pruner.balance) * cosine[chosen].amax(dim=0)
        value[chosen] = -torch.inf
        chosen.append(int(value.argmax()))
    return sorted(chosen)


ONE_BY_ONE = {"divprune": divprune, "cdpruner": cdpruner, "mmr": mmr}


def image(n: int, keep: int, seed: int, repeats: int) -> VisualTokens:
    """Random rows, the last `repeats` of them copies of the first ones, and a row of zeros where n allows."""
    random = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, 6, generator=random)
    rows[n - repeats :] = rows[:repeats]
    if n > 4:
        rows[n // 2] = 0
    return VisualTokens(rows, keep, question=torch.randn(2, 6, generator=random))


@pytest.mark.parametrize("spec", METHODS)
@settings(max_examples=25, deadline=None)
@given(st.data())
def test_a_batch_is_its_images_one_by_one(spec, data):
    pruner = get_pruner(spec)
    images = []
    for _ in range(data.draw(st.integers(1, 4))):
        n = data.draw(st.integers(1, 40))
        images.append(image(n, data.draw(st.integers(1, n)), data.draw(st.integers(0, 99)), n // 3))
    found = [selection.indices.tolist() for selection in pruner.select_batch(images)]
    assert found == [pruner.select(tokens).indices.tolist() for tokens in images]
    assert found == [ONE_BY_ONE[pruner.name](pruner, tokens) for tokens in images]


@pytest.mark.parametrize("spec", METHODS)
def test_many_tokens_as_well(spec):
    """Where products and sums take other paths than for a handful."""
    pruner = get_pruner(spec)
    images = [image(576, 64, 1, 0), image(300, 30, 2, 0), image(576, 100, 3, 0)]
    found = [selection.indices.tolist() for selection in pruner.select_batch(images)]
    assert found == [ONE_BY_ONE[pruner.name](pruner, tokens) for tokens in images]


@pytest.mark.parametrize("side", [1, 3, 4, 9, 256])
def test_products_are_symmetric_to_the_bit_whatever_the_strips(monkeypatch, side):
    monkeypatch.setattr(together, "STRIP", side)
    each = [torch.randn(n, 7, generator=torch.Generator().manual_seed(n)) for n in (9, 4, 8)]
    whole = together.products(each)
    assert whole.shape == (3, 9, 9)
    assert torch.equal(whole, whole.mT)
    for found, rows in zip(whole, each, strict=True):
        n = len(rows)
        torch.testing.assert_close(found[:n, :n], rows @ rows.T)
        assert not found[n:].any()
        assert not found[:, n:].any()
    assert torch.equal(whole[1, :4, :4], together.products(each[1:2])[0])


def test_batches_have_room(monkeypatch):
    images = [image(n, 1, 0, 0) for n in (4, 4, 10, 3, 3, 3)]
    monkeypatch.setattr(together, "MAX_ELEMENTS", 100)
    assert [[tokens.n for tokens in some] for some in together.batches(images)] == [[4, 4], [10], [3, 3, 3]]
    assert list(together.batches([])) == []
    kept = [replace(tokens, keep=tokens.n) for tokens in images]
    assert [selection.k for selection in get_pruner("divprune").select_batch(kept)] == [4, 4, 10, 3, 3, 3]
