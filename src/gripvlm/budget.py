"""`Budget`: how many visual tokens to keep, as a count or a fraction, exactly or at most, known from sizes alone."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass
from decimal import ROUND_FLOOR, ROUND_HALF_UP, Decimal
from typing import TypeAlias

from gripvlm.errors import BudgetError

__all__ = ["Budget", "Keep"]

_EXAMPLES = "pass a count such as keep=64 or a fraction such as keep=0.1"
_AT_MOST = ("<=", "≤")


@dataclass(frozen=True, init=False, eq=False, repr=False)
class Budget:
    """The visual tokens of one image that the language model pays for, averaged over its layers.

    An `int` is a count per image; a `float` in (0, 1] is a fraction of each image's tokens. So `Budget(1)` keeps one
    token and `Budget(1.0)` keeps them all. NumPy scalars count as the Python number they print as. A string is read as
    on the command line: `"64"`, `"0.1"`, `"10%"`, and with `<=` (or `≤`, which shells do not interpret) in front at
    most so many.

    A count is exact: where an image has fewer tokens, `count` raises. `Budget("<=64")` keeps all of an image that has
    64 or fewer, so that one thumbnail does not fail a batch. A fraction is rounded to the nearest count; at most a
    tenth is rounded down. Both keep one token at least.

    Attributes:
        value: the count or the fraction.
        at_most: whether fewer will do.

    Raises:
        BudgetError: zero, negative, NaN, infinite, a fraction above 1, a bool, a string that is none of these, or
            anything that is not a number.
    """

    value: int | float
    at_most: bool = False

    def __init__(self, value: int | float | str, at_most: bool = False) -> None:
        if isinstance(value, str):
            number, bounded = _read(value)
            at_most = at_most or bounded
        else:
            number = _validated(value)
        if not isinstance(at_most, bool):
            raise BudgetError(f"at_most={at_most!r} is no bool: pass Budget(64, at_most=True), or keep='<=64'")
        object.__setattr__(self, "value", number)
        object.__setattr__(self, "at_most", at_most)

    @classmethod
    def of(cls, keep: Keep) -> Budget:
        """`keep` as a `Budget`, itself if it is one."""
        return keep if isinstance(keep, Budget) else cls(keep)

    @property
    def is_fraction(self) -> bool:
        """True for a share of the tokens, False for a count."""
        return isinstance(self.value, float)

    @property
    def plain(self) -> int | float | str:
        """What JSON holds and `Budget.of` reads as this same budget: the number, or `"<=64"`."""
        return str(self) if self.at_most else self.value

    @property
    def short(self) -> str:
        """For people, `64`, `10%`, `<=64`; `str` has every digit of a fraction."""
        number = f"{100 * self.value:g}%" if self.is_fraction else str(self.value)
        return f"<={number}" if self.at_most else number

    @property
    def words(self) -> str:
        """For people, `64 tokens`, `10 %`, `at most 64 tokens`."""
        number = f"{100 * self.value:g} %" if self.is_fraction else f"{self.value} tokens"
        return f"at most {number}" if self.at_most else number

    @property
    def order(self) -> tuple[float, bool]:
        """Sorts budgets: by number, and what is exact after what is at most as many."""
        return float(self.value), not self.at_most

    def count(self, n: int, where: str = "the image") -> int:
        """The tokens kept of `n`: the count itself, or max(1, fraction x n rounded half up).

        At most a count is min(count, n); at most a fraction is max(1, fraction x n rounded down). The
        fraction is read as the decimal it prints as, so 0.29 of 50 is 14.5 and gives 15. The result
        depends on nothing but `n`: a serving engine can plan with it before it has pixels.

        Args:
            n: visual tokens of the image, at least 1.
            where: how the error names the image.

        Raises:
            BudgetError: an exact count above `n`.
        """
        if n < 1:
            raise BudgetError(f"{where} has no visual tokens, so nothing can be kept of it")
        if isinstance(self.value, float):
            exact = Decimal(repr(self.value)) * n
            return max(1, int(exact.to_integral_value(ROUND_FLOOR if self.at_most else ROUND_HALF_UP)))
        if self.value > n and not self.at_most:
            raise BudgetError(
                f"keep={self.value}, but {where} has only {n} visual tokens: pass keep='<={self.value}' to keep all of "
                f"images that have fewer, keep={n} or less, or a fraction such as keep=0.5"
            )
        return min(self.value, n)

    def __eq__(self, other: object) -> bool:
        """One token is not all of them, though 1 == 1.0."""
        return isinstance(other, Budget) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def __repr__(self) -> str:
        return f"Budget({self.plain!r})"

    def __str__(self) -> str:
        return f"<={self.value}" if self.at_most else str(self.value)


Keep: TypeAlias = int | float | str | Budget
"""What `keep=` takes wherever gripvlm asks for a budget."""


def _read(text: str) -> tuple[int | float, bool]:
    """(the number, whether at most so many) of a string."""
    cleaned = text.strip()
    bound = next((mark for mark in _AT_MOST if cleaned.startswith(mark)), "")
    cleaned = cleaned.removeprefix(bound).strip()
    try:
        number: int | float
        if cleaned.endswith("%"):
            number = float(Decimal(cleaned[:-1].strip()) / 100)
        else:
            number = int(cleaned) if cleaned.lstrip("+-").isdigit() else float(cleaned)
        return _validated(number), bool(bound)
    except BudgetError as error:
        raise BudgetError(f"{text!r} is no budget: {error}") from None
    except (ValueError, ArithmeticError):
        raise BudgetError(
            f"{text!r} is no budget: use a count (64), a fraction (0.1) or a percentage (10%), or at most so many "
            "('<=64', '<=10%')"
        ) from None


def _validated(keep: object) -> int | float:
    """`keep` as a positive int or a float in (0, 1], or a `BudgetError` that says what to pass."""
    if isinstance(keep, bool) or type(keep).__name__ in ("bool_", "bool"):
        raise BudgetError(f"keep={keep} is a bool, not a budget: {_EXAMPLES}")
    if isinstance(keep, numbers.Integral):
        number = int(keep)
        if number < 1:
            raise BudgetError(f"keep={number} keeps nothing: {_EXAMPLES}")
        return number
    if isinstance(keep, numbers.Real):
        # A NumPy float32 prints as the decimal that was meant; its exact value does not.
        share = float(str(keep)) if hasattr(keep, "dtype") else float(keep)
        if not math.isfinite(share):
            raise BudgetError(f"keep={share} is no number to keep: {_EXAMPLES}")
        if share <= 0:
            raise BudgetError(f"keep={share} keeps nothing: {_EXAMPLES}")
        if share > 1:
            hint = f"did you mean the int {int(share)}?" if share.is_integer() else _EXAMPLES
            raise BudgetError(f"keep={share} is a fraction above 1: {hint}")
        return share
    raise BudgetError(f"keep={keep!r} is a {type(keep).__name__}: {_EXAMPLES}")
