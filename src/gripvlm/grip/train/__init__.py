"""Training: a supervised stage that distils a teacher, then GRPO over subsets of visual tokens.

    from gripvlm.grip.train import TrainConfig, train
    grip = train(TrainConfig(data="my/questions.jsonl", output_dir="grip"), model, processor)

Names are imported when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "Batch": "gripvlm.grip.train.rollout",
    "Engine": "gripvlm.grip.train.rollout",
    "Evaluator": "gripvlm.grip.train.trainer",
    "REWARDS": "gripvlm.grip.train.rewards",
    "Reward": "gripvlm.grip.train.rewards",
    "Rollout": "gripvlm.grip.train.rollout",
    "Stage": "gripvlm.grip.train.trainer",
    "TrainConfig": "gripvlm.grip.train.config",
    "Trainer": "gripvlm.grip.train.trainer",
    "read_toml": "gripvlm.grip.train.config",
    "train": "gripvlm.grip.train.run",
    "write_toml": "gripvlm.grip.train.config",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value
