"""Rows of several images as one operation, the clock's laps, the k highest of each row."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gripvlm.pruners.base import top_k, top_k_of_each
from gripvlm.utils.batching import in_one_storage, onto, padded, rows_of, shifted
from gripvlm.utils.timing import Stopwatch

WHOLE = torch.arange(60.0).view(20, 3)


def test_slices_of_one_storage_are_found_where_they_lie():
    rows = [WHOLE[4:6], WHOLE[10:15], WHOLE[5:9], WHOLE[4:6]]  # gaps, overlaps, repeats, any order
    whole, starts = in_one_storage(rows)
    assert whole.data_ptr() == WHOLE[4].data_ptr()
    assert starts == [0, 6, 1, 0]
    for one, start in zip(rows, starts, strict=True):
        assert torch.equal(whole[start : start + len(one)], one)


@pytest.mark.parametrize(
    "rows",
    [
        [WHOLE[:2], WHOLE[2:4].clone()],
        [WHOLE[:2], WHOLE[:6:2]],
        [WHOLE[:2], WHOLE.T[:3]],
        [WHOLE[:2, :2], WHOLE[2:4, :2]],
        [WHOLE[:2], WHOLE.view(-1)[1:7].view(2, 3)],
        [WHOLE[:2], WHOLE[2:4].double()],
    ],
    ids=["a copy", "every other row", "columns", "part of the columns", "not at a row's start", "another type"],
)
def test_what_is_not_slices_of_rows_is_not_taken_for_them(rows):
    assert in_one_storage(rows) is None


def test_gradients_flow_into_rows():
    whole = WHOLE.clone().requires_grad_()
    rows = [whole[:5], whole[5:]]
    assert in_one_storage(rows) is None
    rows_of(rows, [torch.tensor([1]), torch.tensor([0, 2])]).sum().backward()
    assert whole.grad.sum(1).nonzero().flatten().tolist() == [1, 5, 7]
    with torch.no_grad():
        assert in_one_storage(rows) is not None


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_rows_of_several_images_are_each_ones_rows(data):
    sizes = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=5))
    together = data.draw(st.booleans())
    rows = list(torch.randn(sum(sizes), 4).split(sizes)) if together else [torch.randn(n, 4) for n in sizes]
    order = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=6))
    rows = [rows[i] for i in order]
    picks = [torch.tensor(data.draw(st.lists(st.integers(0, len(one) - 1), min_size=1, max_size=4))) for one in rows]
    expected = torch.cat([one[pick] for one, pick in zip(rows, picks, strict=True)])
    assert torch.equal(rows_of(rows, picks), expected)


def test_padding_copies_only_where_it_must():
    even = padded(list(WHOLE.view(4, 5, 3)))
    assert even.shape == (4, 5, 3)
    assert even.data_ptr() == WHOLE.data_ptr()
    spaced = padded([WHOLE[1:3], WHOLE[6:8], WHOLE[11:13]])
    assert spaced.data_ptr() == WHOLE[1].data_ptr()
    assert torch.equal(spaced[2], WHOLE[11:13])
    for rows in (
        [WHOLE[:2], WHOLE[2:5]],
        [WHOLE[2:4], WHOLE[:2]],
        [WHOLE[:2], WHOLE[:2]],
        [WHOLE[:2], WHOLE[2:4].clone()],
    ):
        found = padded(rows, -1.0)
        assert found.data_ptr() not in (WHOLE.data_ptr(), WHOLE[2].data_ptr())
        for filled, one in zip(found, rows, strict=True):
            assert torch.equal(filled[: len(one)], one)
            assert (filled[len(one) :] == -1).all()


def test_shifted_and_onto():
    assert shifted([torch.tensor([0, 2]), torch.tensor([1])], [10, 20]).tolist() == [10, 12, 21]
    assert shifted([torch.tensor([0, 2])], [5]).tolist() == [5, 7]
    assert onto([1, 2], torch.device("cpu")).tolist() == [1, 2]


@given(st.data())
@settings(max_examples=80, deadline=None)
def test_the_highest_of_each_row_are_those_of_the_row_alone(data):
    rows, n = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 9))
    few = st.sampled_from([-torch.inf, -1.0, 0.0, 0.5, 2.0])  # many ties
    scores = torch.tensor(data.draw(st.lists(st.lists(few, min_size=n, max_size=n), min_size=rows, max_size=rows)))
    counts = data.draw(st.lists(st.integers(1, n), min_size=rows, max_size=rows))
    found = top_k_of_each(scores, counts)
    assert [one.tolist() for one in found] == [top_k(row, k).tolist() for row, k in zip(scores, counts, strict=True)]


def test_laps_add_up_by_name():
    watch = Stopwatch(torch.device("cpu"))
    for name in ("a", "b", "a"):
        time.sleep(0.01)
        watch.lap(name)
    seconds = watch.seconds()
    assert set(seconds) == {"a", "b"}
    assert 0.019 < seconds["a"] < 0.2
    assert 0.009 < seconds["b"] < 0.1


def test_on_an_accelerator_laps_are_events_and_reading_waits_for_them(monkeypatch):
    class Event:
        clock, waited = 0.0, 0

        def __init__(self, device: torch.device, enable_timing: bool) -> None:
            assert device.type == "cuda"
            assert enable_timing

        def record(self) -> None:
            Event.clock += 250.0
            self.at = Event.clock

        def synchronize(self) -> None:
            Event.waited += 1

        def elapsed_time(self, other: Any) -> float:
            return other.at - self.at

    monkeypatch.setattr(torch, "Event", Event)
    watch = Stopwatch(torch.device("cuda"))
    watch.lap("vision")
    watch.lap("pruner")
    watch.lap("vision")
    assert Event.waited == 0
    assert watch.seconds() == {"vision": 0.5, "pruner": 0.25}
    assert Event.waited == 3
