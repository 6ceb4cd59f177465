"""Intervals, paired differences, Holm's correction and relative accuracy, some by hand."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from gripvlm.eval import ResultsError, interval, read_results
from gripvlm.eval.scores import Scores, Setting, absolute, differences_from, relative, scores_of
from gripvlm.eval.stats import holm, sign_flip
from tiny_results import KEEPS, made_up


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return read_results(made_up(tmp_path_factory.mktemp("made") / "r.json"))


@pytest.fixture(scope="module")
def scores(results):
    return scores_of([results])


def by_hand(values, counts=None):
    """Scores of settings {(method, keep): [G, I] sums}, one question a picture and task."""
    arrays = np.stack([np.atleast_2d(np.asarray(v, dtype=float)) for v in values.values()])
    _, tasks, pictures = arrays.shape
    settings = [Setting(method, keep, (method,)) for method, keep in values]
    counts = np.ones((tasks, pictures)) if counts is None else counts
    names = [f"t{g}" for g in range(tasks)], [f"p{i}" for i in range(pictures)]
    return Scores(tuple(settings), *map(tuple, names), arrays, counts)


def test_means_and_intervals_are_those_of_the_rows(results, scores):
    """The same pictures are drawn as for the rows' own intervals."""
    cells = absolute(scores)
    for row in results.means:
        if row["pruner"].startswith("random"):
            continue
        mean = cells[scores.index(row["pruner"], row["keep"])][-1]
        assert (mean.value, mean.low, mean.high) == pytest.approx((row["score"], row["ci_low"], row["ci_high"]))


def test_seeds_of_a_method_are_averaged_question_by_question(results, scores):
    setting = scores.settings[scores.index("random", 0.1)]
    rows = [row["score"] for row in results.means if row["pruner"].startswith("random") and row["keep"] == 0.1]
    assert setting.labels == ("random:seed=0", "random:seed=1")
    assert scores.means[scores.index("random", 0.1)].mean() == pytest.approx(np.mean(rows))
    seeds = [[row["score"] for row in results.means if row["pruner"] == label] for label in setting.labels]
    assert seeds[0] != seeds[1]


def test_a_difference_is_of_the_same_questions():
    """Pictures differ much, methods by a constant: unpaired the interval would be wide, paired it is a point."""
    base = np.tile([0.0, 1.0], 20)
    values = {("full", 1.0): [base + 1], ("a", 0.1): [base + 0.25], ("b", 0.1): [base]}
    (found,) = differences_from(by_hand(values), "b")
    assert (found.mean.value, found.mean.low, found.mean.high) == pytest.approx((0.25, 0.25, 0.25))
    assert found.p_holm == pytest.approx(1 / 10001)
    (full,) = [d for d in differences_from(by_hand(values), "full") if d.setting == 1]
    assert full.mean.value == pytest.approx(-0.75)
    with pytest.raises(ResultsError, match="no method 'c' to compare with: use one of full, a, b"):
        differences_from(by_hand(values), "c")


def test_sign_flips_are_those_of_all_flips():
    shares = np.array([0.5, -0.2, 0.3, 0.4, 0.1, -0.1, 0.6])
    all_flips = [abs(np.dot(signs, shares)) for signs in product((-1, 1), repeat=7)]
    exact = np.mean([one >= abs(shares.sum()) - 1e-12 for one in all_flips])
    assert sign_flip(shares[None], 0, 40000)[0] == pytest.approx(exact, abs=0.01)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_holm_keeps_the_chance_of_any_false_star_at_five_percent():
    """Twelve comparisons without any difference, 400 times: uncorrected, almost half would have a star."""
    rng, wrong, uncorrected = np.random.default_rng(0), 0, 0
    for seed in range(400):
        p = sign_flip(rng.normal(size=(12, 30)), seed, 500)
        wrong += min(holm(p.tolist())) < 0.05
        uncorrected += p.min() < 0.05
    assert wrong / 400 < 0.08
    assert uncorrected / 400 > 0.3


def test_relative_accuracy_is_the_mean_of_ratios_not_the_ratio_of_means():
    ones = np.ones(10)
    values = {("full", 1.0): [ones, ones * 0.5], ("a", 0.1): [ones * 0.5, ones * 0.5]}
    found = relative(by_hand(values))
    assert found[1].value == pytest.approx((0.5 + 1.0) / 2)
    assert found[0].value == found[0].low == found[0].high == 1
    assert relative(by_hand({("full", 1.0): [ones * 0], ("a", 0.1): [ones]})) == [None, None]


def test_too_few_pictures_give_numbers_without_intervals():
    """Two tasks with a picture each of their own."""
    counts = np.eye(2)
    values = {("full", 1.0): np.eye(2), ("a", 0.1): np.eye(2) / 2, ("b", 0.1): np.eye(2) / 4}
    made = by_hand(values, counts=counts)
    assert [(cell.value, cell.low, cell.high) for cell in absolute(made)[1]] == [(0.5, None, None)] * 3
    assert (relative(made)[1].value, relative(made)[1].low) == (0.5, None)
    assert [(d.mean.value, d.mean.low) for d in differences_from(made, "b")] == [(0.25, None)]


def test_a_full_model_that_mostly_scores_nothing_gives_no_interval():
    """It gets another one of 8 pictures right in each of 8 tasks: few draws have a score in all of them."""
    full = np.eye(8)
    found = relative(by_hand({("full", 1.0): full, ("a", 0.1): full / 2}))
    assert (found[1].value, found[1].low, found[1].high) == (0.5, None, None)


def test_runs_that_do_not_belong_together_are_refused(results, tmp_path):
    other = read_results(made_up(tmp_path / "o.json", weights="other"))
    with pytest.raises(ResultsError, match="differ in model, weights"):
        scores_of([results, other])
    twice = read_results(made_up(tmp_path / "t.json"))
    with pytest.raises(ResultsError, match=r"both have random:seed=0 at 0.5"):
        scores_of([results, twice])
    bare = read_results(made_up(tmp_path / "b.json", answers=False))
    with pytest.raises(ResultsError, match=r"the answers of .* are not there"):
        scores_of([bare])
    more = read_results(made_up(tmp_path / "m.json", arms=(("extra", 0.7),)))
    together = scores_of([results, more])
    assert len(together.settings) == 1 + 4 * len(KEEPS)


# --- intervals ------------------------------------------------------------------------------------


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


def test_the_mean_of_two_tasks_weighs_them_equally():
    easy = ([1.0] * 100, [f"a{i}" for i in range(100)])
    hard = ([0.0, 1.0] * 5, [f"b{i}" for i in range(10)])
    low, high = interval([easy, hard], 0)
    assert low < 0.75 < high < 1


# --- coverage -------------------------------------------------------------------------------------


def covered(trials, pictures, draws, seed):
    """How often the 95 % interval of a mean over two tasks, and of a paired difference, holds the truth.

    Pictures differ in difficulty, so questions about one are alike; two tasks ask about the same pictures.
    """
    rng = np.random.default_rng(seed)
    names = [str(i) for i in range(pictures) for _ in range(2)]
    hits = np.zeros(2)
    for trial in range(trials):
        ease = np.repeat(rng.beta(3, 1.5, pictures), 2)  # mean 2/3
        first, second = rng.random((2, 2 * pictures)) < ease, rng.random((2, 2 * pictures)) < ease * 0.9
        for which, values, truth in ((0, first * 1.0, 2 / 3), (1, first * 1.0 - second, 0.1 * 2 / 3)):
            low, high = interval([(mine, names) for mine in values], trial, draws)
            hits[which] += low <= truth <= high
    return hits / trials


def test_intervals_cover_about_as_often_as_they_say():
    """200 trials; 95 % cover less than 90 % of 200 about once in 1,000 times."""
    assert all(0.90 <= share <= 0.99 for share in covered(200, 60, 200, 0))


@pytest.mark.slow
@pytest.mark.parametrize("pictures", [40, 160])
def test_intervals_cover_93_to_97_percent(pictures):
    """pytest -m slow tests/eval/test_stats.py: 3,000 trials, whose own error is 0.4 %."""
    for share in covered(3000, pictures, 1000, 1):
        assert 0.93 <= share <= 0.97, share
