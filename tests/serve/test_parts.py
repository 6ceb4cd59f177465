"""The controller on simulated latencies, text that comes token by token, and the cache of encodings."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gripvlm.budget import Budget
from gripvlm.errors import BudgetError
from gripvlm.models.encoded import Encoded, Item
from gripvlm.serve.controller import CALM, LATE, WINDOW, Controller, Ladder
from gripvlm.serve.decoding import Detokenizer
from gripvlm.serve.encodings import EncodingCache

LADDER = Ladder((Budget("50%"), Budget("25%"), Budget("10%")), target=1.0)


def feed(controller: Controller, latency: float, count: int, start: float) -> float:
    """So many requests, one a second; when the last one ended."""
    for i in range(count):
        controller.observe(start + i, start + i + latency)
    return start + count + latency


def test_it_goes_down_as_soon_as_the_target_cannot_be_held_and_not_below_the_floor():
    controller = Controller(LADDER)
    feed(controller, 2.0, LATE, 0)
    assert controller.keep == Budget("50%")
    after = feed(controller, 2.0, 1, LATE)
    assert controller.keep == Budget("25%")
    feed(controller, 2.0, 1000, after)
    assert controller.keep == Budget("10%")
    assert controller.steps == {"down": 2, "up": 0}


def test_it_holds_while_five_percent_are_late():
    controller = Controller(LADDER)
    for start in range(0, 2000, WINDOW):
        feed(controller, 2.0, LATE, start)
        feed(controller, 0.9, WINDOW - LATE, start + LATE)
    assert controller.steps == {"down": 0, "up": 0}


def test_it_goes_up_again_once_all_are_fast():
    controller = Controller(LADDER)
    at = feed(controller, 2.0, LATE + 1, 0)
    at = feed(controller, CALM + 0.01, 5 * WINDOW, at)
    assert controller.keep == Budget("25%")
    at = feed(controller, CALM - 0.01, WINDOW + 1, at)
    assert controller.keep == Budget("50%")
    feed(controller, 0.0, 5 * WINDOW, at)
    assert controller.steps == {"down": 1, "up": 1}


def test_requests_from_before_a_step_do_not_count():
    controller = Controller(LADDER)
    feed(controller, 100.0, LATE + 1, 0)
    assert controller.keep == Budget("25%")
    feed(controller, 100.0, 50, 3)  # they arrived while the old budget was at work
    assert controller.keep == Budget("25%")


def test_clients_that_gave_up_count_as_late_once_they_have_waited_for_the_target():
    controller = Controller(LADDER)
    for i in range(100):
        assert controller.gave_up(i, i + 0.9) is None  # it says nothing about the time
    assert [controller.gave_up(200 + i, 201.1 + i) for i in range(LATE + 1)] == [None] * LATE + ["down"]
    assert controller.keep == Budget("25%")


@pytest.mark.parametrize("load", [0.2, 0.4, 0.9])
def test_one_server_under_a_load_that_triples_holds_the_target_more_often(load):
    """A queue with one server whose work falls with keep; `load` is that of the largest budget before it triples."""

    def late(ladder: Ladder) -> tuple[float, Controller]:
        controller, draw = Controller(ladder), random.Random(0)
        now = free = 0.0
        missed = 0
        for i in range(4000):
            now += draw.expovariate((3 if 1000 <= i < 3000 else 1) * load / 0.06)
            begins = max(now, free)
            free = begins + 0.02 + 0.08 * float(controller.keep.value)  # half is 0.06 s
            missed += free - now > ladder.target
            controller.observe(now, free)
        return missed / 4000, controller

    always, _ = late(Ladder((Budget("50%"), Budget(0.499999)), 0.5))  # has no real choice
    chosen, controller = late(Ladder(LADDER.budgets, 0.5))
    assert chosen <= always
    if load == 0.2:
        assert chosen == 0
        assert controller.keep == Budget("50%")
    if load == 0.4:
        assert always > 0.5
        assert chosen < 0.05


def test_a_budget_that_proved_too_slow_is_tried_less_and_less_often():
    controller, at = Controller(LADDER), 0.0
    for _ in range(100 * WINDOW):  # the largest is too slow, the next is fast
        at = feed(controller, 2.0 if controller.keep == Budget("50%") else 0.1, 1, at)
    assert controller.steps["up"] <= 10  # and not 50


@pytest.mark.parametrize(
    ("keeps", "target"), [(["50%"], 1), (["10%", "50%"], 1), ([64, 32], 1), (["50%", "10%"], 0), (["50%", "50%"], 1)]
)
def test_no_ladder(keeps, target):
    with pytest.raises(BudgetError, match="pass "):
        Ladder(tuple(Budget(keep) for keep in keeps), target)


# --- text -------------------------------------------------------------------------------------------------------------


class Bytes:
    """A tokenizer of which each token is one byte."""

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return bytes(ids).decode("utf-8", "replace")


def pushed(text: str, *stops: str) -> tuple[list[str], bool]:
    """The pieces that are sent of a text, byte by byte, and whether a stop text ended it."""
    made, pieces = Detokenizer(Bytes(), stops), []
    for token in text.encode():
        pieces.append(made.push(token))
        if made.stopped:
            break
    return [*pieces, made.end()], made.stopped


@given(st.text(max_size=30))
def test_pieces_are_the_text_and_no_letter_is_cut(text):
    pieces, stopped = pushed(text)
    assert "".join(pieces) == text
    assert not stopped
    assert "\ufffd" not in "".join(pieces) or "\ufffd" in text


@given(st.text("ab", max_size=20), st.lists(st.text("ab", min_size=1, max_size=3), max_size=2))
def test_the_text_ends_before_the_first_stop_text(text, stops):
    pieces, stopped = pushed(text, *stops)
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    # The stop text that is complete first; of those that end together, the longest.
    end = min(ends, default=len(text))
    begins = min((text[:end].find(stop) for stop in stops if stop in text[:end]), default=len(text))
    assert "".join(pieces) == text[:begins]
    assert stopped == bool(ends)


def test_half_a_letter_at_the_end_is_sent():
    made = Detokenizer(Bytes())
    assert made.push("é".encode()[0]) == ""
    assert made.end() == "\ufffd"


# --- the cache --------------------------------------------------------------------------------------------------------


def encoding(rows: int) -> Encoded:
    features = torch.zeros(rows, 1)
    return Encoded("llava", ((Item("image", features, (), None, 0),),), {})


def test_the_encodings_used_last_are_kept():
    cache = EncodingCache(40)  # ten floats
    made: list[Any] = []

    def get(name: bytes, rows: int) -> Encoded:
        return cache.get(name, lambda: made.append(name) or encoding(rows))

    first = get(b"a", 4)
    get(b"b", 4)
    assert get(b"a", 4) is first
    get(b"c", 4)  # for it the one used least recently goes
    assert get(b"a", 4) is first
    get(b"b", 4)
    assert made == [b"a", b"b", b"c", b"b"]
    assert cache.bytes == 32
    get(b"large", 11)  # larger than the cache: it is not kept, and nothing goes for it
    assert cache.bytes == 32
    assert SimpleNamespace(hits=cache.hits, misses=cache.misses) == SimpleNamespace(hits=2, misses=5)
    cache.clear()
    assert b"b" not in cache
    assert cache.bytes == 0
