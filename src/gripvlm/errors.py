"""Every error that gripvlm raises on purpose. All are `ValueError`s and all say what to type."""

from __future__ import annotations

__all__ = [
    "BudgetError",
    "GripError",
    "InputError",
    "Interrupted",
    "PrunerError",
    "TrainError",
    "UnsupportedModelError",
]


class GripError(ValueError):
    """The root: catch this to catch everything that gripvlm refuses."""


class BudgetError(GripError):
    """`keep` is not a budget, or an image has fewer visual tokens than it asks for."""


class InputError(GripError):
    """The model inputs cannot be pruned as they are."""


class PrunerError(GripError):
    """A pruner is unknown, needs what is not there, or returned no valid selection."""


class TrainError(GripError):
    """Training cannot go on: a setting, the data or a reward is wrong."""


class UnsupportedModelError(GripError):
    """No family row describes this model, or its transformers version is too old."""


class Interrupted(KeyboardInterrupt):
    """Stopped by the user; the same command resumes."""
