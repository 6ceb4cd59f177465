"""`Budget`: counts and fractions, exact or an error that says what to type."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gripvlm import Budget, GripError
from gripvlm.errors import BudgetError


@pytest.mark.parametrize(
    ("keep", "n", "count"),
    [
        (1, 1, 1),
        (64, 576, 64),
        (576, 576, 576),
        (1.0, 576, 576),
        (0.1, 576, 58),  # 57.6
        (0.5, 3, 2),  # 1.5 rounds up
        (0.5, 5, 3),  # 2.5 rounds up: banker's rounding would give 2
        (0.29, 50, 15),  # 14.5 exactly, which binary floats put below
        (0.001, 10, 1),  # never nothing
        (np.int64(7), 9, 7),
        (np.float64(0.25), 8, 2),
        (np.float32(0.1), 5, 1),  # 0.5 as printed; its exact value is above
        (np.float32(0.3), 5, 2),  # 1.5 as printed
        (Fraction(1, 4), 8, 2),
    ],
)
def test_count(keep, n, count):
    assert Budget.of(keep).count(n) == count
    assert type(Budget.of(keep).count(n)) is int


@pytest.mark.parametrize(
    ("keep", "says"),
    [
        (0, "keeps nothing"),
        (-3, "keeps nothing"),
        (0.0, "keeps nothing"),
        (-0.1, "keeps nothing"),
        (float("nan"), "no number"),
        (float("inf"), "no number"),
        (float("-inf"), "no number"),
        (True, "bool"),
        (False, "bool"),
        (np.True_, "bool"),
        ("many", r"use a count \(64\), a fraction \(0.1\)"),
        (b"64", "bytes"),
        (64.0, "did you mean the int 64"),
        (np.float32(64), "did you mean the int 64"),
        (1.5, "above 1"),
        (None, "NoneType"),
        ([64], "list"),
        (torch.tensor(64), "Tensor"),
        (1j, "complex"),
    ],
)
def test_what_is_no_budget(keep, says):
    with pytest.raises(BudgetError, match=says):
        Budget.of(keep)
    with pytest.raises(BudgetError, match=says):
        Budget(keep)


def test_more_than_there_is_names_the_number_and_the_image():
    with pytest.raises(BudgetError, match=r"keep=65, but image 1 of sample 2 has only 64 visual tokens"):
        Budget(65).count(64, "image 1 of sample 2")
    with pytest.raises(BudgetError, match="no visual tokens"):
        Budget(0.5).count(0)


@pytest.mark.parametrize(
    ("text", "value"),
    [("64", 64), ("1", 1), ("1.0", 1.0), ("0.1", 0.1), ("10%", 0.1), (" 11.1 % ", 0.111), ("100%", 1.0)],
)
def test_text(text, value):
    budget = Budget(text)
    assert budget.value == value
    assert type(budget.value) is type(value)


@pytest.mark.parametrize("text", ["", "%", "0", "-4", "0%", "150%", "1.5", "64 tokens", "nan", "inf", "ten", "²"])
def test_text_that_is_refused(text):
    with pytest.raises(BudgetError, match="is no budget"):
        Budget(text)


def test_budgets_are_values():
    assert Budget.of(Budget(64)) == Budget(64)
    assert hash(Budget(0.5)) == hash(Budget.of(np.float64(0.5)))
    assert (str(Budget(64)), str(Budget(0.1))) == ("64", "0.1")
    assert (Budget(1).is_fraction, Budget(1.0).is_fraction) == (False, True)
    assert issubclass(BudgetError, GripError)
    assert issubclass(GripError, ValueError)


@given(st.integers(1, 10_000), st.integers(1, 10_000))
def test_a_count_is_met_or_refused(k, n):
    if k <= n:
        assert Budget(k).count(n) == k
    else:
        with pytest.raises(BudgetError, match=str(n)):
            Budget(k).count(n)


@given(st.integers(1, 1000), st.integers(1, 10_000))
def test_a_fraction_is_the_nearest_count_halves_up(thousandths, n):
    """Against whole-number arithmetic, where nothing can round by accident."""
    expected = max(1, (2 * thousandths * n + 1000) // 2000)
    assert Budget(thousandths / 1000).count(n) == expected


@given(st.floats(min_value=1e-6, max_value=1), st.integers(1, 5000))
def test_a_fraction_never_leaves_the_image_and_grows_with_it(share, n):
    budget = Budget(share)
    assert 1 <= budget.count(n) <= n
    assert budget.count(n) <= budget.count(n + 1)
    assert Budget(str(budget)) == budget
