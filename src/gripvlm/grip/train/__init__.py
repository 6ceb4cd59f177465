"""Training: a supervised warm-up, GRPO over subsets of visual tokens, and relaxed baselines of the same scorer.

    from gripvlm.grip.train import TrainConfig, train
    grip = train(TrainConfig(data="my/questions.jsonl", out="grip"), model, processor)

Names are imported when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOME = {
    "Batch": "gripvlm.grip.train.rollout",
    "Engine": "gripvlm.grip.train.rollout",
    "Interrupted": "gripvlm.grip.train.loop",
    "REWARDS": "gripvlm.grip.train.rewards",
    "Reward": "gripvlm.grip.train.rewards",
    "Rollout": "gripvlm.grip.train.rollout",
    "TrainConfig": "gripvlm.grip.train.config",
    "TrainError": "gripvlm.errors",
    "Validator": "gripvlm.grip.train.validation",
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


if TYPE_CHECKING:
    from gripvlm.errors import TrainError as TrainError
    from gripvlm.grip.train.config import TrainConfig as TrainConfig
    from gripvlm.grip.train.config import read_toml as read_toml
    from gripvlm.grip.train.config import write_toml as write_toml
    from gripvlm.grip.train.loop import Interrupted as Interrupted
    from gripvlm.grip.train.rewards import REWARDS as REWARDS
    from gripvlm.grip.train.rewards import Reward as Reward
    from gripvlm.grip.train.rollout import Batch as Batch
    from gripvlm.grip.train.rollout import Engine as Engine
    from gripvlm.grip.train.rollout import Rollout as Rollout
    from gripvlm.grip.train.run import train as train
    from gripvlm.grip.train.validation import Validator as Validator
