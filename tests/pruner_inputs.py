"""Random inputs of pruners, and what their attention says, for the tests of all of them."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from gripvlm.types import LLMTokens, VisionRows, VisualTokens

GRIDS = st.tuples(st.integers(1, 4), st.integers(1, 4))


def image(h: int, w: int, k: int, seed: int = 0, **fields) -> VisualTokens:
    """Random tokens with random attention, keys and rows of the tower."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    vision = {
        layer: VisionRows(randn(2, h * w).softmax(-1), randn(2, h * w).softmax(-1), randn(h * w, 5))
        for layer in (0, 5, 8, -2, -1)
    }
    known = {"question": randn(3, 6), "vision": vision, "patches": randn(h * w, 7)}
    known |= {"first_queries": randn(3, 2, 5), "first_keys": randn(h * w, 2, 5)}
    return VisualTokens(randn(h * w, 6), k, (h, w), **known | fields)


def attention(values: list[float], layer: int = -2) -> dict[int, VisionRows]:
    """One head that says just these numbers, as CLS attention and as attention received."""
    row = torch.tensor([values])
    return {layer: VisionRows(row, row, torch.zeros(len(values), 2))}


def cls(tokens: VisualTokens, layer: int) -> list[float]:
    rows = tokens.vision[layer].cls
    assert rows is not None
    return [sum(float(head[j]) for head in rows.double()) / len(rows) for j in range(tokens.n)]


def received(tokens: VisualTokens, layer: int) -> list[float]:
    return tokens.vision[layer].received.double().mean(0).tolist()


def picked(pruner, features: Tensor, k: int, **fields) -> list[int]:
    return pruner.select(VisualTokens(features, k, **fields)).indices.tolist()


def entering(h: int, w: int, keep: int, seed: int = 0, words: int = 4, dropped: int = 0, ahead: int = 0) -> LLMTokens:
    """Random tokens as they enter a layer, after the first `dropped` of the image were dropped.

    The first `ahead` words are ahead of the image and see nothing of it.
    """
    known = image(h, w, keep, seed)
    generator = torch.Generator().manual_seed(seed + 1000)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    rows = torch.arange(dropped, h * w)
    n = rows.numel()
    question = randn(2, words, n).softmax(-1)
    question[:, :ahead] = 0
    return LLMTokens(
        layer=2,
        keep=keep,
        rows=rows,
        input=VisualTokens(known.features, keep, (h, w), vision=known.vision),
        hidden=randn(n, 6),
        before=randn(n, 6),
        last=randn(2, n).softmax(-1),
        question=question,
        text=randn(words, 6),
        after=torch.arange(words) >= ahead,
        words=randn(words, 6),
        keys=randn(n, 5),
        all_keys=randn(n, 10),
        key_sizes=randn(n).abs(),
        text_key_sizes=randn(words).abs(),
        values=randn(n, 2, 5),
        text_values=randn(words, 2, 5),
        rotary=randn(n, 2, 4),
        norm=lambda states: states * torch.tensor([3.0, 1, 1, 0.5, 1, 2]),
    )
