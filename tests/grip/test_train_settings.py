"""Settings: their file, and those that cannot be."""

from __future__ import annotations

import pytest

from gripvlm.errors import TrainError
from gripvlm.grip.train import TrainConfig, read_toml, write_toml
from tiny_train import tiny_config


def test_settings_survive_their_file(tmp_path):
    odd = tiny_config(out='C:\\runs\\"a" \u00fc', learning_rate=1e-7, question=False, keep_low=0.015, reward="a:b")
    write_toml(odd, tmp_path / "c.toml")
    assert TrainConfig(**read_toml(tmp_path / "c.toml")) == odd
    for text, said in (("stepz = 3", "did you mean steps"), ("steps = ", "is not TOML")):
        (tmp_path / "c.toml").write_text(text)
        with pytest.raises(TrainError, match=said):
            read_toml(tmp_path / "c.toml")
    with pytest.raises(TrainError, match="no config file"):
        read_toml(tmp_path / "nothing.toml")


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": "many"},
        {"steps": 1.5},
        {"steps": -1},
        {"policy": "nonsense"},
        {"num_generations": 1},
        {"num_generations": 5, "antithetic": True},
        {"keep_low": 0.0},
        {"keep_low": 0.6, "keep_high": 0.5},
        {"temperature": 0.0},
        {"tau_end": 0.0},
        {"learning_rate": float("nan")},
        {"val_share": 1.0},
        {"samples": 1, "relaxation": "perturbed"},
        {"keep_low": 1.5, "budgets": "fixed"},
        {"importance_sampling_level": "token", "policy": "conditional_bernoulli"},
        {"credit": "value"},
        {"ema_decay": 1.0},
    ],
)
def test_settings_that_cannot_be(wrong):
    with pytest.raises(TrainError, match=next(iter(wrong)).split("_")[0]):
        tiny_config(**wrong)
