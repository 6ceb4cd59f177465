"""Trains with GRPO and the ideas that are switched on: `python -m experiments.grip_claim.exploring --help`."""

from __future__ import annotations

from experiments.training import main

from .config import ExploringConfig
from .stage import Exploring

if __name__ == "__main__":
    main(ExploringConfig, Exploring, __doc__)
