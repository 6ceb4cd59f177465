"""What training is given wrongly: the rows of `bad_input.py` about it, as (what, typed, call, what must come back)."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch

from gripvlm.errors import TrainError
from gripvlm.grip.train import TrainConfig, read_toml, train, write_toml
from gripvlm.grip.train.run import check_settings
from gripvlm.tasks import TaskError
from tiny_train import tiny_config, tiny_vlm, write_jsonl

vlm = cache(tiny_vlm)


def no_number(rollout: Any) -> torch.Tensor:
    return torch.full_like(rollout.log_probs[:, 0], torch.nan)


def raises(rollout: Any) -> torch.Tensor:
    raise ZeroDivisionError("division by zero")


def trained(wrong: str = "", **settings: Any) -> str:
    """Trains on eight tiny pictures, of which one row may be changed."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = write_jsonl(folder, 8)
        if wrong == "picture":
            (folder / "2.png").write_bytes(b"no picture")
        if wrong == "answer":
            file.write_text(file.read_text().replace('"answer": "yes"', '"answer": "  "'))
        if wrong == "row":
            file.write_text(file.read_text() + '{"image": "0.png"}\n')
        try:
            train(tiny_config(data=str(file), out=str(folder / "grip"), **settings), *vlm())
        except TrainError as error:
            raise TrainError(str(error).replace(name, "DIR")) from error
        except TaskError as error:
            raise TaskError(str(error).replace(name, "DIR")) from error
        skipped = (folder / "grip" / "metrics.jsonl").read_text().count('"skipped"')
        return f"trains; {skipped} questions left out, with the reason in metrics.jsonl"


def another_run() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = write_jsonl(folder, 4)
        (folder / "grip").mkdir()
        write_toml(tiny_config(data=str(file), out="grip"), folder / "grip" / "config.toml")
        (folder / "grip" / "warmup.ckpt").touch()
        try:
            check_settings(tiny_config(data=str(file), out=str(folder / "grip"), seed=3))
        except TrainError as error:
            raise TrainError(str(error).replace(name, "DIR")) from error


def toml(text: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "c.toml"
        file.write_text(text)
        try:
            read_toml(file)
        except TrainError as error:
            raise TrainError(str(error).replace(str(file), "c.toml")) from error


CASES: list[tuple[str, str, Any, str]] = [
    ("training without data", "gripvlm train", lambda: check_settings(TrainConfig()), "TrainError: .*--data"),
    ("training on the test split", "train --data lab", lambda: check_settings(TrainConfig(data="lab")),
     r"TrainError: .*lab_vlm\.dataset"),
    ("a training picture that is none", "2.png of 10 bytes", lambda: trained("picture"),
     r"TrainError: sample '.*': .*2\.png.*--on-bad skip"),
    ("the same, to be skipped", "--on-bad skip", lambda: trained("picture", on_bad="skip", steps=2, warmup_steps=2),
     r"works: trains; [1-9]"),
    ("an answer of nothing", '"answer": "  "', lambda: trained("answer"),
     "TrainError: the answer of sample '.*' tokenises to nothing.*--on-bad skip"),
    ("a training row without a question", '{"image": "0.png"}', lambda: trained("row"), "question"),
    ("a reward that is NaN", "--reward bad_training:no_number",
     lambda: trained(reward="bad_training:no_number", warmup_steps=0),
     "TrainError: reward 'no_number' is nan for sample"),
    ("a reward that raises", "--reward bad_training:raises",
     lambda: trained(reward="bad_training:raises", warmup_steps=0),
     "TrainError: reward 'raises' raised ZeroDivisionError"),
    ("an unknown reward", "--reward corect", lambda: check_settings(TrainConfig(data="x", reward="corect")),
     "TrainError: unknown reward 'corect'"),
    ("an unknown setting", "learning_rat = 1", lambda: toml("learning_rat = 1"),
     "TrainError: c.toml has no setting .learning_rat.: did you mean learning_rate"),
    ("a setting of the wrong kind", 'steps = "many"', lambda: TrainConfig(steps="many"), "TrainError: steps = 'many'"),
    ("settings that exclude each other", "--credit value", lambda: TrainConfig(credit="value"),
     "type --policy conditional_bernoulli"),
    ("the folder of another run", "--out grip --seed 3", another_run, "holds another run .*seed was 0, now 3"),
]  # fmt: skip
