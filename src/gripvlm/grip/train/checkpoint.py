"""A stage's checkpoint: one file, from which the same command goes on."""

from __future__ import annotations

import pickle
from dataclasses import asdict, dataclass, field
from io import BytesIO
from pathlib import Path

import torch
from torch import nn

from gripvlm.errors import TrainError
from gripvlm.grip.train.config import TrainConfig
from gripvlm.grip.train.data import QuestionStream
from gripvlm.utils import disk

__all__ = ["Checkpoint", "TrainerState"]

# What torch raises for a checkpoint with flipped bytes (15,000 tried).
_DAMAGED = (
    *(RuntimeError, EOFError, pickle.UnpicklingError, LookupError, TypeError, ValueError),
    *(AttributeError, AssertionError, ArithmeticError),
)


@dataclass
class TrainerState:
    """Where a stage is.

    Attributes:
        step: optimiser steps that are done (rounds of them, with `num_iterations`).
        seconds: spent on them, without validations and checkpoints.
        rollouts, tokens: that the model scored and ran on for them, in all processes.
        first: the objective of each validation question, by its number, before the first step.
    """

    step: int = 0
    seconds: float = 0.0
    rollouts: int = 0
    tokens: int = 0
    first: dict[int, float] = field(default_factory=dict)


class Checkpoint:
    """What is saved of a stage, and the file.

    Replaced at once: `Accelerator.save_state` writes several files, and a kill between two mixes steps.

    Args:
        modules: by their names in the file.
        data: whose digest must be the same when the run goes on; what it skips is saved.
    """

    def __init__(
        self,
        path: Path,
        config: TrainConfig,
        modules: dict[str, nn.Module],
        optimizer: torch.optim.Optimizer,
        data: QuestionStream,
    ) -> None:
        self.path, self.config, self.modules, self.optimizer, self.data = path, config, modules, optimizer, data

    def exists(self) -> bool:
        return self.path.exists()

    def read(self) -> bytes | None:
        """The file's bytes; None where there is none."""
        return disk.read_bytes(self.path) if self.exists() else None

    def write(self, state: TrainerState) -> None:
        content = {
            "config": self.config.to_dict(),
            "modules": {name: module.state_dict() for name, module in self.modules.items()},
            "optimizer": self.optimizer.state_dict(),
            "state": asdict(state),
            "questions": self.data.digest,
            "skipped": self.data.skipped,
        }
        packed = BytesIO()
        torch.save(content, packed)
        disk.write(self.path, packed.getvalue())

    def restore(self, packed: bytes, device: torch.device) -> TrainerState:
        """Sets modules, optimiser and skipped questions to what a file's bytes hold.

        Raises:
            TrainError: they are damaged, or of a run on other questions.
        """
        try:
            # weights_only: a file from elsewhere must not run code.
            content = torch.load(BytesIO(packed), weights_only=True, map_location=device)
            for name, module in self.modules.items():
                module.load_state_dict(content["modules"][name])
            self.optimizer.load_state_dict(content["optimizer"])
            state, questions = TrainerState(**content["state"]), str(content["questions"])
            self.data.skipped.update(content["skipped"])
        except torch.OutOfMemoryError:
            raise  # a RuntimeError too, but the file is whole
        except _DAMAGED as error:
            raise TrainError(
                f"{self.path} is damaged ({type(error).__name__}): remove it to begin this stage again"
            ) from error
        if questions != self.data.digest:
            raise TrainError(
                f"{self.path} was made with other questions than {self.config.data or 'these'} has now: "
                "bring those back, or use another --output-dir"
            )
        return state
