"""Intervals of scores: seeded, clustered by picture, and right about as often as they say."""

from __future__ import annotations

import numpy as np
import pytest

from gripvlm.evaluate import interval


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
