"""`Controller`: chooses `keep` from a ladder, so that 95 % of requests have their first token in time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from gripvlm.budget import Budget
from gripvlm.errors import BudgetError

__all__ = ["Controller", "Ladder", "Step"]

Step: TypeAlias = Literal["down", "up"]
"""Along the ladder."""

WINDOW = 40
"""Requests that one decision looks at."""

LATE = 2
"""How many of them may be late: 5 %."""

CALM = 0.5
"""A larger budget is tried once all of a window were faster than this share of the target."""

LONGEST = 16
"""At most so many windows in a row must be calm, however often a larger budget turned out too slow."""


@dataclass(frozen=True)
class Ladder:
    """The budgets to choose from, and the target.

    Attributes:
        budgets: from the largest, used while there is time, to the smallest, below which the server never goes.
        target: seconds from a request's arrival to its first token, for 95 % of requests.

    Raises:
        BudgetError: fewer than two budgets, one that is no fraction, an order that does not go down, or no target.
    """

    budgets: tuple[Budget, ...]
    target: float

    def __post_init__(self) -> None:
        # A count may be more than a picture has, and the request did not ask for it.
        shares = [budget.value for budget in self.budgets if budget.is_fraction]
        if len(shares) != len(self.budgets) or len(shares) < 2 or sorted(set(shares), reverse=True) != shares:
            given = ",".join(budget.short for budget in self.budgets)
            raise BudgetError(f"ladder {given}: pass two or more fractions that go down, such as 50%,25%,10%")
        if not 0 < self.target < float("inf"):
            raise BudgetError(f"target of {self.target} seconds: pass a number above 0, such as 0.5")


class Controller:
    """Goes down the ladder when requests are late, and up again when they are all fast.

    `observe` is called once for each request, `gave_up` instead where a client has left before its first token; callers
    in several threads take turns. One step down follows as soon as more than `LATE` requests of a window are late; one
    step up, when all of a window are faster than `CALM` of the target. A budget that proves too slow within its first
    window is tried again only after twice as many calm windows as before. Only requests that arrived after the latest
    step count, as others waited behind the work of the old budget.

    Attributes:
        steps: how many steps were taken, by direction: "down", "up".
    """

    def __init__(self, ladder: Ladder) -> None:
        self._ladder, self._rung = ladder, 0
        self._since = float("-inf")
        self._seen = self._late = self._slow = 0  # in this window
        self._calm = 0  # windows in a row
        self._needed = [1] * len(ladder.budgets)  # how many of them it takes to step up to each budget
        self._climbed = False  # whether the latest step went up, less than a window ago
        self.steps: dict[Step, int] = {"down": 0, "up": 0}

    @property
    def keep(self) -> Budget:
        """The budget for the next request that names none."""
        return self._ladder.budgets[self._rung]

    def gave_up(self, arrived: float, left: float) -> Step | None:
        """Counts a request whose client left before its first token: as late if it had waited for the target.

        Without it the latest requests would not count, where clients wait no longer than they must. One that leaves
        earlier says nothing about the time.
        """
        return self.observe(arrived, left) if left - arrived > self._ladder.target else None

    def observe(self, arrived: float, first_token: float) -> Step | None:
        """Counts a request.

        Args:
            arrived, first_token: when, in seconds on one clock.

        Returns:
            The step that it led to.
        """
        if arrived < self._since:
            return None
        waited = first_token - arrived
        self._seen += 1
        self._late += waited > self._ladder.target
        self._slow += waited > CALM * self._ladder.target
        if self._late > LATE:
            if self._climbed:
                self._needed[self._rung] = min(2 * self._needed[self._rung], LONGEST)
            return self._step("down", first_token)
        if self._seen == WINDOW:
            if self._climbed:
                self._climbed, self._needed[self._rung] = False, 1
            self._calm = 0 if self._slow else self._calm + 1
            self._seen = self._late = self._slow = 0
            if self._calm >= self._needed[max(self._rung - 1, 0)]:
                return self._step("up", first_token)
        return None

    def _step(self, way: Step, now: float) -> Step | None:
        """Takes a step, if the ladder goes on that way, and begins a window."""
        self._seen = self._late = self._slow = self._calm = 0
        rung = self._rung + (1 if way == "down" else -1)
        if not 0 <= rung < len(self._ladder.budgets):
            return None
        self._rung, self._since, self._climbed = rung, now, way == "up"
        self.steps[way] += 1
        return way
