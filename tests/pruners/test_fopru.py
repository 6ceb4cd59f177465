"""FoPru against its formula: what patches give to and receive from one another, in float64 and one at a time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_zoo_vision import GRIDS, attention, drawn, falling, received

from gripvlm.errors import PrunerError
from gripvlm.pruners import get_pruner
from gripvlm.pruners.input.fopru import FoPru
from gripvlm.types import VisionRows, VisualTokens


def test_fopru_keeps_tokens_or_whole_rows():
    values = [0.9, 0, 0, 0.3, 0.4, 0.35, 0.5, 0.3, 0.3]  # rows of 3: 0.9, 1.05, 1.1
    tokens = VisualTokens(torch.zeros(9, 2), 3, (3, 3), vision=attention(values))
    assert FoPru().select(tokens).indices.tolist() == [0, 4, 6]
    assert FoPru("row").select(tokens).indices.tolist() == [6, 7, 8]
    five = VisualTokens(torch.zeros(9, 2), 5, (3, 3), vision=attention(values))
    assert FoPru("row").select(five).indices.tolist() == [4, 5, 6, 7, 8]  # the next row's two best


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
    assert FoPru(significance="received").select(tokens).indices.tolist() == sorted(falling(u)[:k])
    assert FoPru(significance="given").select(tokens).indices.tolist() == sorted(falling(v)[:k])


@settings(max_examples=20, deadline=None)
@given(GRIDS, st.integers(0, 99), st.data())
def test_fopru_rows_follow_the_rule(grid, seed, data):
    tokens = drawn(data, grid, seed)
    g, (h, w) = received(tokens, -2), grid
    sums = [sum(g[y * w : y * w + w]) for y in range(h)]
    chosen: list[int] = []
    for y in falling(sums):
        row = range(y * w, y * w + w)
        chosen += falling(g, row)[: tokens.keep - len(chosen)]
    assert FoPru("row").select(tokens).indices.tolist() == sorted(chosen)
    assert get_pruner("fopru:strategy=row").needs == {"vision_attention", "vision_given", "grid"}


@pytest.mark.parametrize(
    ("spec", "says"), [("strategy=column", "strategy=row"), ("significance=sum", "=variance|received")]
)
def test_what_it_refuses(spec, says):
    with pytest.raises(PrunerError, match="fopru") as caught:
        get_pruner(f"fopru:{spec}")
    assert says in str(caught.value)
