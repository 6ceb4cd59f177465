"""Pruners that move a prompt's budget between its images: the sum is what was asked, image by image it may differ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import gripvlm
from gripvlm.errors import PrunerError
from gripvlm.pruners import Pruner, Selection
from tiny_families import TINY, build, make


@dataclass(frozen=True)
class Uneven(Pruner):
    """All spare rows to the last image; `wrong` breaks the contract."""

    name: ClassVar[str] = "uneven"
    wrong: str = ""

    def allot(self, sample):
        total = sum(tokens.keep for tokens in sample)
        counts = [1] * (len(sample) - 1) + [total - len(sample) + 1]
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
