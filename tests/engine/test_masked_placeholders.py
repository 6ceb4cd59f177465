"""Prompts in which some placeholders are masked, and masks of any type: no text is lost."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import gripvlm
from gripvlm.errors import PrunerError
from gripvlm.types import Merge, Selection
from gripvlm.utils.batching import rows_of
from tiny_models import IMAGE, build

ROW = [1, *range(3, 13), *[IMAGE] * 16, 20]


def inputs(row: list[int], masked: range, dtype: torch.dtype = torch.long) -> dict:
    ids = torch.tensor([row])
    mask = torch.ones_like(ids)
    mask[0, list(masked)] = 0
    return {"input_ids": ids, "attention_mask": mask.to(dtype), "pixel_values": torch.randn(1, 3, 32, 32)}


@pytest.mark.parametrize(
    ("row", "masked"),
    [
        (ROW, range(11, 15)),
        ([1, *[IMAGE] * 16, 20], range(1, 5)),
        ([1, *[IMAGE] * 16, 20], range(1, 17)),
        (ROW, range(0)),
    ],
    ids=["behind text", "image first", "the whole image", "none"],
)
def test_no_text_is_lost(row, masked):
    given = inputs(row, masked)
    found = gripvlm.prune_inputs(build("llava"), given, "grid", 4)
    left = found["input_ids"][found["attention_mask"].bool()].tolist()
    assert [one for one in left if one != IMAGE] == [one for one in row if one != IMAGE]
    assert left.count(IMAGE) <= 4
    assert int((found["input_ids"] == IMAGE).sum()) == 4
    with torch.no_grad():
        assert build("llava")(**found).logits.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.long, torch.bool, torch.float32, torch.bfloat16])
def test_masks_of_any_type(dtype):
    given = inputs(ROW, range(1), dtype)
    found = gripvlm.prune_inputs(build("llava"), given, "grid", 4)
    assert found["input_ids"].shape[1] == len(ROW) - 12 - 1


def test_rows_that_lie_across_memory_are_read_as_they_are():
    big = torch.arange(400.0).view(10, 40)
    rows = [big.T[0:1], big.T[6:7]]
    assert torch.equal(rows_of(rows, [torch.tensor([0]), torch.tensor([0])]), torch.cat(rows))


def test_a_multiple_may_be_any_whole_number():
    found = gripvlm.prune_inputs(build("llava"), inputs(ROW, range(0)), "grid", 4, pad_to_multiple_of=np.int64(8))
    assert found["input_ids"].shape[1] == 16


@pytest.mark.parametrize(
    ("merge", "says"),
    [
        (
            Merge(torch.zeros(2, 1, dtype=torch.long), torch.zeros(2, dtype=torch.long), torch.full((2,), 0.5)),
            "merge.source",
        ),
        (
            Merge(torch.zeros(2), torch.zeros(2, dtype=torch.long), torch.full((2,), 0.5)),
            "merge.source must be a LongTensor",
        ),
        (Merge(torch.zeros(2, dtype=torch.long), [0, 0], torch.full((2,), 0.5)), "merge.destination .* got list"),
        (
            Merge(torch.zeros(2, dtype=torch.long), torch.zeros(2, dtype=torch.long), [0.5, 0.5]),
            "merge.weight .* got list",
        ),
    ],
)
def test_merges_of_the_wrong_kind_are_named(merge, says):
    class Odd(gripvlm.Pruner):
        name = "odd"
        needs = frozenset({"features"})

        def select(self, tokens):
            return Selection(torch.arange(tokens.keep), tokens.n, merge=merge)

    with pytest.raises(PrunerError, match=says):
        gripvlm.prune_inputs(build("llava"), inputs(ROW, range(0)), Odd(), 4)
