"""Training: a supervised stage that distils a teacher, then GRPO over subsets of visual tokens.

    from gripvlm.grip.train import TrainConfig, train
    grip = train(TrainConfig(data="my/questions.jsonl", output_dir="grip"), model, processor)

Names are imported when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_NAMES = {
    "batch": ("Batch",),
    "config": ("TrainConfig", "read_toml", "write_toml"),
    "evaluator": ("Evaluator",),
    "journal": ("Callback",),
    "rewards": ("REWARDS", "Reward"),
    "rollout": ("Engine", "Rollout"),
    "run": ("train",),
    "stage": ("Stage",),
    "trainer": ("Trainer",),
}
_HOME = {name: f"{__name__}.{module}" for module, names in _NAMES.items() for name in names}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value
