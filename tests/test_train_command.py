"""`gripvlm train`: its flags, its refusals, what it says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import gripvlm
from gripvlm import lab
from gripvlm.cli import main
from gripvlm.scorer import Scorer
from gripvlm.train import TrainConfig, read_toml
from tiny_train import stopping, tiny_vlm, write_jsonl


@pytest.fixture(scope="module")
def vlm():
    return tiny_vlm()


@pytest.fixture
def tiny_lab_here(tmp_path, monkeypatch, vlm):
    """`lab` is the tiny model; questions.jsonl is here."""
    monkeypatch.setattr(lab, "load", lambda: vlm)
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path, 8)
    return ["train", "--device", "cpu", "--data", "q.jsonl", "--width", "16", "--blocks", "1", "--val-share", "0.3"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--stepz", "3"], "No such option"),
        (["--steps", "many"], "Invalid value for '--steps'"),
        (["sideways"], "type one of 'all', 'warmup', 'grpo', 'relaxed'"),
        (["--data", ""], "no training data: type --data"),
        (["--data", "nothing.jsonl"], "no file 'nothing.jsonl'"),
        (["--reward", "nonsense"], "unknown reward 'nonsense'"),
        (["--teacher", "nobody"], "unknown teacher 'nobody'"),
        (["--teacher-layers", "9"], "teacher_layers = '9': type numbers from 0 to 1"),
        (["--config", "nothing.toml"], "no config file 'nothing.toml'"),
        (["--val-keeps", "50%"], "val_keeps = '50%'"),
        (["--keep-low", "0.6"], "type shares in (0, 1], the low one at most the high one"),
        (["--width", "18"], "width = 18, heads = 4, blocks = 1: type a width that is a multiple of the heads"),
        (["--budgets", "choices"], "type --keep-choices 0.25"),
        (
            ["warmup", "--num-iterations", "2"],
            "--num-iterations has no effect in warmup: leave it out (only grpo would",
        ),
        (["grpo", "--tau-end", "0.1"], "--tau-end has no effect in grpo"),
        (["relaxed", "--band", "3"], "--band has no effect in relaxed"),
        (["--samples", "3"], "--samples has no effect in warm-up and GRPO: leave it out (only relaxed would read it"),
        (["--val-data", "q.jsonl"], "16 of 16 validation questions are training questions too"),
    ],
)
def test_mistakes_are_one_paragraph(tiny_lab_here, capsys, flags, said):
    assert main([*tiny_lab_here, *flags]) == 2
    told = capsys.readouterr().err.strip()
    assert said in " ".join(told.split())
    assert told.startswith("Error: ")
    assert "\n\n" not in told
    assert not Path("grip/config.toml").exists()


def test_flags_win_over_the_file_and_ctrl_c_says_what_is_kept(tiny_lab_here, capsys, monkeypatch):
    Path("c.toml").write_text('steps = 3\nwarmup_steps = 2\nout = "elsewhere"\nimages = 2\nnum_generations = 4\n')
    flags = [*tiny_lab_here, "--config", "c.toml", "--steps", "2", "--val-keeps", "0.5", "--no-question"]
    with monkeypatch.context() as patch:
        stopping(patch, 1)
        assert main(flags) == 130
    assert "Stopped at step 1 of 2 (grpo). The same command goes on from" in " ".join(capsys.readouterr().err.split())
    assert main(flags) == 0
    told = "".join(capsys.readouterr().out.split("\n"))
    assert "gripvlm eval --model lab --tasks jsonl:q.jsonl --pruners grip:scorer=elsewhere,random --keep 10%" in told
    written = read_toml("elsewhere/config.toml")
    assert (written["steps"], written["warmup_steps"], written["question"]) == (2, 2, False)
    assert not Scorer.from_pretrained("elsewhere").config.question


def test_help_lists_every_setting_without_loading_torch():
    code = (
        "import sys; from gripvlm.cli import main; main(['train', '--help']);"
        "print('LOADED', [m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(gripvlm.__file__).parents[1]), "COLUMNS": "200"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert "LOADED []" in done.stdout
    for name in TrainConfig.__dataclass_fields__:
        assert name == "stage" or f"--{name.replace('_', '-')}" in done.stdout, name
