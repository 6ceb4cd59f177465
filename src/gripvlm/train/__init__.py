"""Training: a supervised warm-up, GRPO over subsets of visual tokens, and relaxed baselines of the same scorer.

    from gripvlm.train import TrainConfig, train
    grip = train(TrainConfig(data="my/questions.jsonl", out="grip"), model, processor)

Names are imported when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOME = {
    "Batch": "gripvlm.train.rollout",
    "Engine": "gripvlm.train.rollout",
    "Interrupted": "gripvlm.train.loop",
    "REWARDS": "gripvlm.train.rewards",
    "Reward": "gripvlm.train.rewards",
    "Rollout": "gripvlm.train.rollout",
    "TrainConfig": "gripvlm.train.config",
    "TrainError": "gripvlm.errors",
    "Validator": "gripvlm.train.validation",
    "read_toml": "gripvlm.train.config",
    "train": "gripvlm.train.run",
    "write_toml": "gripvlm.train.config",
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
    from gripvlm.train.config import TrainConfig as TrainConfig
    from gripvlm.train.config import read_toml as read_toml
    from gripvlm.train.config import write_toml as write_toml
    from gripvlm.train.loop import Interrupted as Interrupted
    from gripvlm.train.rewards import REWARDS as REWARDS
    from gripvlm.train.rewards import Reward as Reward
    from gripvlm.train.rollout import Batch as Batch
    from gripvlm.train.rollout import Engine as Engine
    from gripvlm.train.rollout import Rollout as Rollout
    from gripvlm.train.run import train as train
    from gripvlm.train.validation import Validator as Validator
