"""`Budget`: how many visual tokens to keep, as a count or a fraction, known from sizes alone."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from typing import TypeAlias

from gripvlm.errors import BudgetError

__all__ = ["Budget", "Keep"]

_TYPE_THIS = "type a count such as keep=64 or a fraction such as keep=0.1"


@dataclass(frozen=True)
class Budget:
    """The visual tokens of one image that the language model pays for, averaged over its layers.

    An `int` is a count per image; a `float` in (0, 1] is a fraction of each image's tokens. So
    `Budget(1)` keeps one token and `Budget(1.0)` keeps them all. NumPy scalars count as the Python
    number they print as. The count is exact: where an image has fewer tokens than asked for,
    `count` raises instead of giving less.

    Raises:
        BudgetError: zero, negative, NaN, infinite, a fraction above 1, a bool, a string, or
            anything that is not a number.
    """

    value: int | float

    def __post_init__(self) -> None:
        object.__setattr__(self, "value", _validated(self.value))

    @classmethod
    def of(cls, keep: Keep) -> Budget:
        """`keep` as a `Budget`: an int, a float in (0, 1], a NumPy number, or a `Budget` itself."""
        return keep if isinstance(keep, Budget) else cls(keep)

    @classmethod
    def parse(cls, text: str) -> Budget:
        """A budget from a command line: `"64"` a count, `"0.1"` a fraction, `"10%"` a percentage.

        As in Python, `"1"` is one token and `"1.0"` all of them.
        """
        cleaned = text.strip()
        try:
            if cleaned.endswith("%"):
                return cls(float(Decimal(cleaned[:-1].strip()) / 100))
            if cleaned.lstrip("+-").isdigit():
                return cls(int(cleaned))
            return cls(float(cleaned))
        except BudgetError as error:
            raise BudgetError(f"{text!r} is no budget: {error}") from None
        except (ValueError, ArithmeticError):
            raise BudgetError(
                f"{text!r} is no budget: type a count (64), a fraction (0.1) or a percentage (10%)"
            ) from None

    @property
    def is_fraction(self) -> bool:
        """True for a share of the tokens, False for a count."""
        return isinstance(self.value, float)

    def count(self, n: int, where: str = "the image") -> int:
        """The tokens kept of `n`: the count itself, or max(1, fraction x n rounded half up).

        The fraction is read as the decimal it prints as, so 0.29 of 50 is 14.5 and gives 15. The
        result depends on nothing but `n`: a serving engine can plan with it before it has pixels.

        Args:
            n: visual tokens of the image, at least 1.
            where: how the error names the image.

        Raises:
            BudgetError: a count above `n`.
        """
        if n < 1:
            raise BudgetError(f"{where} has no visual tokens, so nothing can be kept of it")
        if isinstance(self.value, float):
            exact = Decimal(repr(self.value)) * n
            return max(1, int(exact.to_integral_value(rounding=ROUND_HALF_UP)))
        if self.value > n:
            raise BudgetError(
                f"keep={self.value}, but {where} has only {n} visual tokens: "
                f"type keep={n} or less, or a fraction such as keep=0.5"
            )
        return self.value

    def __str__(self) -> str:
        return str(self.value)


Keep: TypeAlias = int | float | Budget
"""What `keep=` takes wherever gripvlm asks for a budget."""


def _validated(keep: object) -> int | float:
    """`keep` as a positive int or a float in (0, 1], or a `BudgetError` that says what to type."""
    if isinstance(keep, bool) or type(keep).__name__ in ("bool_", "bool"):
        raise BudgetError(f"keep={keep} is a bool, not a budget: {_TYPE_THIS}")
    if isinstance(keep, str):
        raise BudgetError(f"keep={keep!r} is a string: {_from_string(keep)}")
    if isinstance(keep, numbers.Integral):
        number = int(keep)
        if number < 1:
            raise BudgetError(f"keep={number} keeps nothing: {_TYPE_THIS}")
        return number
    if isinstance(keep, numbers.Real):
        # A NumPy float32 prints as the decimal that was meant; its exact value does not.
        share = float(str(keep)) if hasattr(keep, "dtype") else float(keep)
        if not math.isfinite(share):
            raise BudgetError(f"keep={share} is no number to keep: {_TYPE_THIS}")
        if share <= 0:
            raise BudgetError(f"keep={share} keeps nothing: {_TYPE_THIS}")
        if share > 1:
            hint = f"did you mean the int {int(share)}?" if share.is_integer() else _TYPE_THIS
            raise BudgetError(f"keep={share} is a fraction above 1: {hint}")
        return share
    raise BudgetError(f"keep={keep!r} is a {type(keep).__name__}: {_TYPE_THIS}")


def _from_string(text: str) -> str:
    """The number that a string such as "10%" or "64" was meant to be, as advice."""
    try:
        return f"type keep={Budget.parse(text)}"
    except BudgetError:
        return _TYPE_THIS
