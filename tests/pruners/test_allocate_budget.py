"""Pruners that move a prompt's budget between its images: the sum is what was asked, image by image it may differ."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import permutations
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gripvlm
from gripvlm.errors import PrunerError
from gripvlm.pruners import Pruner
from gripvlm.pruners.input.ptp_vision import PTPVision
from gripvlm.pruners.llm.ptp import PTP
from gripvlm.pruners.ops.apportion import nearest
from gripvlm.types import Selection, VisionRows, VisualTokens
from tiny_families import TINY, build, make


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
