"""Settings: their file, and those that cannot be."""

from __future__ import annotations

import pytest

from gripvlm.errors import TrainError
from gripvlm.grip.train import TrainConfig, read_toml, write_toml
from tiny_train import tiny_config


def test_settings_survive_their_file(tmp_path):
    odd = tiny_config(
        output_dir='C:\\runs\\"a" \u00fc', learning_rate=1e-7, question=False, keep_low=0.015, reward_funcs="a:b"
    )
    write_toml(odd, tmp_path / "c.toml")
    assert TrainConfig(**read_toml(tmp_path / "c.toml")) == odd
    for text, said in (
        ("max_stepz = 3", "did you mean max_steps"),
        ("max_steps = ", "is not TOML"),
    ):
        (tmp_path / "c.toml").write_text(text)
        with pytest.raises(TrainError, match=said):
            read_toml(tmp_path / "c.toml")
    with pytest.raises(TrainError, match="no config file"):
        read_toml(tmp_path / "nothing.toml")


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_steps": "many"},
        {"max_steps": 1.5},
        {"max_steps": -1},
        {"seed": 2**63},
        {"scale_rewards": "nonsense"},
        {"num_generations": 1},
        {"keep_low": 0.0},
        {"keep_low": 0.6, "keep_high": 0.5},
        {"keep_high": 1.5},
        {"temperature": 0.0},
        {"learning_rate": float("nan")},
        {"weight_decay": float("inf")},
        {"eval_share": 1.0},
        {"eval_keeps": "50%"},
        {"keep_choices": "2", "budgets": "choices"},
        {"ema_decay": 1.0},
        {"stage": "warmup"},
    ],
)
def test_settings_that_cannot_be(wrong):
    with pytest.raises(TrainError, match=rf"^{next(iter(wrong))} = .*: use |^keep_low = .*, keep_high = .*: use"):
        tiny_config(**wrong)
