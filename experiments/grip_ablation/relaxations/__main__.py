"""Trains one relaxation: `python -m experiments.grip_ablation.relaxations --help`."""

from __future__ import annotations

from experiments.training import main
from gripvlm.grip.scorer import Scorer
from gripvlm.grip.train import Engine, Stage

from .conditional_grpo import ConditionalGrpo
from .config import RelaxedConfig
from .diffprune import DiffPrune
from .dynamicvit import DynamicViT
from .masks import Relaxed

__all__ = ["stage_of"]

STAGES: dict[str, type[Stage]] = {
    "dynamicvit": DynamicViT,
    "diffprune": DiffPrune,
    "conditional_bernoulli": ConditionalGrpo,
}
"""Relaxations with a loss of their own; the others are masks of `Relaxed`."""


def stage_of(config: RelaxedConfig, scorer: Scorer, engine: Engine) -> Stage:
    """The stage of `config.relaxation`."""
    stage: Stage = STAGES.get(config.relaxation, Relaxed)(config, scorer, engine)  # type: ignore[call-arg, arg-type]
    return stage


if __name__ == "__main__":
    main(RelaxedConfig, stage_of, __doc__)
