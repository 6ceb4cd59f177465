"""Settings of the ideas: those of `gripvlm train grpo`, and six more."""

from __future__ import annotations

from dataclasses import dataclass

from gripvlm.errors import TrainError
from gripvlm.grip.train.config import TrainConfig, setting

__all__ = ["ExploringConfig"]


@dataclass(frozen=True)
class ExploringConfig(TrainConfig):
    """All ideas are off by default, and training is GRPO's.

    Raises:
        TrainError: as `TrainConfig`, or probes that leave no draws.
    """

    stage: str = setting("exploring", "always exploring", ("exploring",))
    greedy: bool = setting(False, "one draw of a group is the greedy set, which has a part in the mean alone")
    probes: int = setting(0, "draws a question before the rest goes to those that differ more; 0: none", at_least=0)
    budget_moves: int = setting(0, "how often a budget is halved or doubled until rewards differ", at_least=0)
    flat: float = setting(0.02, "rewards with a smaller standard deviation do not differ, for budget_moves", at_least=0)
    virtual_draws: int = setting(0, "draws a question that a learned guess judges in the model's place", at_least=0)
    bands: bool = setting(False, "a subset comes from one band of about 2k tokens with like scores")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.probes and not 2 <= self.probes < self.num_generations:
            raise TrainError(
                f"probes = {self.probes}: use 2 or more, and fewer than num_generations = {self.num_generations}"
            )
        if self.virtual_draws == 1:
            raise TrainError("virtual_draws = 1: use 2 or more, or 0 for none")
        if self.greedy and (self.probes or self.num_generations) < 3:
            raise TrainError("greedy takes one draw of each group: use 3 probes or num_generations or more")
