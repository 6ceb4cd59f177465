"""Intervals of scores: seeded, clustered by picture, and right about as often as they say."""

from __future__ import annotations

import numpy as np
import pytest

from gripvlm.eval import interval


def test_an_interval_is_seeded_and_holds_the_mean():
    rng = np.random.default_rng(0)
    scores, images = rng.integers(0, 2, 100).tolist(), [str(i // 2) for i in range(100)]
    low, high = interval([(scores, images)], 0)
    assert (low, high) == interval([(scores, images)], 0) != interval([(scores, images)], 1)
    assert low < np.mean(scores) < high


def test_questions_about_one_picture_are_no_new_evidence():
    scores = np.random.default_rng(1).integers(0, 2, 40).tolist()
    images = [str(i) for i in range(40)]
    low, high = interval([(scores, images)], 0)
    again = interval([(scores * 9, images * 9)], 0)
    assert again == pytest.approx((low, high))
    as_if_new = interval([(scores * 9, [f"{i}" for i in range(360)])], 0)
    assert as_if_new[1] - as_if_new[0] < 0.5 * (high - low)


def test_one_picture_gives_no_interval():
    assert interval([([1.0, 0.0], ["a", "a"])], 0) == (None, None)


def test_tasks_with_one_picture_each_give_no_interval():
    """Draws that hit both would always score the same: a point, as if it were certain."""
    assert interval([([1.0, 0.0], ["a", "a"]), ([1.0], ["b"])], 0) == (None, None)
    many = [([1.0], [str(i)]) for i in range(14)]  # almost no draw hits all of them
    assert interval(many, 0) == (None, None)


def test_where_most_draws_miss_a_task_there_is_no_interval():
    def tasks(count):
        return [([0.0, 1.0], [f"{i}a", f"{i}b"]) for i in range(count)]

    assert interval(tasks(14), 0) == (None, None)
    low, high = interval(tasks(2), 0)
    assert low < 0.5 < high


def test_intervals_cover_about_as_often_as_they_say():
    rng, inside = np.random.default_rng(0), 0
    for seed in range(200):
        scores = (rng.random(80) < 0.7).astype(float)
        low, high = interval([(scores.tolist(), [str(i) for i in range(80)])], seed, draws=400)
        inside += low <= 0.7 <= high
    assert 0.90 <= inside / 200 <= 0.99


def test_the_mean_of_two_tasks_weighs_them_equally():
    easy = ([1.0] * 100, [f"a{i}" for i in range(100)])
    hard = ([0.0, 1.0] * 5, [f"b{i}" for i in range(10)])
    low, high = interval([easy, hard], 0)
    assert low < 0.75 < high < 1
