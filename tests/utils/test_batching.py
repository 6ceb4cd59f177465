"""Rows of several images as one operation, the clock's laps, the k highest of each row."""

from __future__ import annotations

import time
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gripvlm.pruners.base import top_k, top_k_of_each
from gripvlm.utils.batching import onto, padded, per_entry, rows_of, shifted
from gripvlm.utils.timing import Stopwatch

WHOLE = torch.arange(60.0).view(20, 3)


def test_gradients_flow_into_rows():
    whole = WHOLE.clone().requires_grad_()
    rows_of([whole[:5], whole[5:]], [torch.tensor([1]), torch.tensor([0, 2])]).sum().backward()
    assert whole.grad.sum(1).nonzero().flatten().tolist() == [1, 5, 7]


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_rows_of_several_images_are_each_ones_rows(data):
    sizes = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=5))
    rows = [torch.randn(n, 4) for n in sizes]
    order = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=6))
    rows = [rows[i] for i in order]
    picks = [torch.tensor(data.draw(st.lists(st.integers(0, len(one) - 1), min_size=1, max_size=4))) for one in rows]
    expected = torch.cat([one[pick] for one, pick in zip(rows, picks, strict=True)])
    assert torch.equal(rows_of(rows, picks), expected)


def test_padding_fills_up_and_copies_no_single_one():
    assert padded([WHOLE]).data_ptr() == WHOLE.data_ptr()
    filled = padded([WHOLE[:2], WHOLE[2:5]], -1.0)
    assert filled.shape == (2, 3, 3)
    assert torch.equal(filled[0, :2], WHOLE[:2])
    assert torch.equal(filled[1], WHOLE[2:5])
    assert (filled[0, 2] == -1).all()


def test_shifted_and_onto():
    assert shifted([torch.tensor([0, 2]), torch.tensor([1])], [10, 20]).tolist() == [10, 12, 21]
    assert shifted([torch.tensor([0, 2])], [5]).tolist() == [5, 7]
    assert onto([1, 2], torch.device("cpu")).tolist() == [1, 2]
    assert per_entry([7, 8], [torch.zeros(2, 5), torch.zeros(1, 5)]).tolist() == [7, 7, 8]


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
