"""Settings of the relaxations: those of `gripvlm train`, and six more."""

from __future__ import annotations

from dataclasses import dataclass

from gripvlm.errors import TrainError
from gripvlm.grip.train.config import TrainConfig, setting

__all__ = ["RELAXATIONS", "RelaxedConfig"]

RELAXATIONS = (
    *("soft_topk", "straight_through", "perturbed", "simple"),
    *("dynamicvit", "diffprune", "conditional_bernoulli"),
)


@dataclass(frozen=True)
class RelaxedConfig(TrainConfig):
    """`max_steps`, `learning_rate`, budgets and data mean what they mean for GRPO.

    Raises:
        TrainError: as `TrainConfig`, or a reward without a gradient.
    """

    stage: str = setting("relaxed", "always relaxed", ("relaxed",))
    rounds: int = setting(1, "as in `gripvlm train`, by default 1", at_least=1)
    relaxation: str = setting("soft_topk", "what takes GRPO's place", RELAXATIONS)
    tau_start: float = setting(1.0, "temperature of the relaxation at the first step", above=0)
    tau_end: float = setting(0.02, "temperature at the last step, where it is annealed", above=0)
    floor: float = setting(0.05, "share of its attention that a dropped token keeps in training", above=0, below=1)
    noise_samples: int = setting(512, "noise samples of the perturbed relaxation; they cost no forward", at_least=2)
    binarity_weight: float = setting(0.0, "weight, at the last step, of a loss on masks that are not hard", at_least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.relaxation != "conditional_bernoulli" and self.reward_funcs not in ("probability", "log_prob"):
            raise TrainError(f"reward_funcs = {self.reward_funcs!r} has no gradient: use probability or log_prob")
