"""A way of training: what `Trainer` asks of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn

from gripvlm.grip.scorer import Scorer
from gripvlm.grip.train.batch import Batch
from gripvlm.grip.train.config import TrainConfig
from gripvlm.grip.train.rollout import Engine

__all__ = ["Stage", "Stats", "mean", "means"]

Stats: TypeAlias = dict[str, float]
"""What is logged of a step, by name."""


class Stage(ABC):
    """One way of training: a loss, and modules in addition to the scorer.

    Attributes:
        name: of its checkpoint, its folder and its lines in metrics.jsonl.
        random_stream: names its random numbers; by default `name`.
        rate_setting: the setting that holds its learning rate, for messages.
        num_iterations: how often `losses` yields, an optimiser step each.
    """

    name: ClassVar[str]
    random_stream: ClassVar[str] = ""
    rate_setting: ClassVar[str] = "learning_rate"
    num_iterations: int = 1

    def __init__(self, config: TrainConfig, scorer: Scorer, engine: Engine, steps: int, learning_rate: float) -> None:
        self.config, self.scorer, self.engine = config, scorer, engine
        self.max_steps, self.learning_rate = steps, learning_rate

    @abstractmethod
    def losses(self, batch: Batch, progress: float, random: torch.Generator) -> Iterator[tuple[Tensor, Stats]]:
        """`num_iterations` pairs (loss, what to log) for a batch; an optimiser step is taken after each.

        Args:
            progress: share of the training that is over, in [0, 1].
            random: of this step and micro-batch.
        """

    def explore(self, batch: Batch, random: torch.Generator) -> Any:
        """What all micro-batches of a step need of this one before the first loss, on the CPU; None for nothing."""
        return None

    def pool(self, explored: list[Any]) -> None:  # noqa: B027
        """Receives what `explore` returned for each micro-batch of the step, those of all processes, in order."""

    def modules(self) -> dict[str, nn.Module]:
        """Further modules that a checkpoint must hold; those that require gradients are trained."""
        return {}


def mean(values: list[float]) -> float:
    """0 for none."""
    return sum(values) / len(values) if values else 0.0


def means(collected: list[Stats]) -> Stats:
    """The mean of each number over those that have it."""
    keys = dict.fromkeys(key for stats in collected for key in stats)
    return {key: mean([stats[key] for stats in collected if key in stats]) for key in keys}
