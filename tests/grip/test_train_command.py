"""`gripvlm train`: its flags, its refusals, what it says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import gripvlm
from gripvlm import lab
from gripvlm.cli import main
from gripvlm.grip.scorer import Scorer
from gripvlm.grip.train import TrainConfig, read_toml
from tiny_train import stopping, tiny_scorer, tiny_vlm, write_jsonl


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
        (["--reward", "..:x"], "no reward '..:x': TypeError"),
        (["--budgets", "fixed", "--keep-low", "2"], "keep_low = 2.0: type a share in (0, 1]"),
        (["--teacher", "nobody"], "unknown teacher 'nobody'"),
        (["--teacher", "attention", "--teacher-layers", "9"], "teacher_layers = '9': type numbers from 0 to 1"),
        (["--config", "nothing.toml"], "no config file 'nothing.toml'"),
        (["--val-keeps", "50%"], "val_keeps = '50%'"),
        (["--keep-low", "0.6"], "type shares in (0, 1], the low one at most the high one"),
        (["--width", "18"], "width = 18, heads = 4, blocks = 1: type a width that is a multiple of the heads"),
        (["--budgets", "choices"], "type --keep-choices 0.25"),
        (
            ["warmup", "--num-iterations", "2"],
            "--num-iterations has no effect in warmup (only grpo would read it): leave it out",
        ),
        (["grpo", "--tau-end", "0.1"], "--tau-end has no effect in grpo"),
        (["relaxed", "--band", "3"], "--band has no effect in relaxed"),
        (["--teacher-layers", "1"], "--teacher-layers has no effect with teacher gradient (it would with attention)"),
        (["--epsilon", "0.1"], "--epsilon has no effect with num_iterations 1 (it would with 2 or more): leave it out"),
        (["--budgets", "fixed", "--keep-high", "0.2"], "--keep-high has no effect with budgets fixed"),
        (["--budgets", "choices", "--keep-choices", "0.1", "--keep-low", "0.2"], "--keep-low has no effect with"),
        (["relaxed", "--samples", "3"], "--samples has no effect with relaxation soft_topk (it would with perturbed)"),
        (["relaxed", "--relaxation", "dynamicvit", "--tau-end", "1"], "--tau-end has no effect with"),
        (["warmup", "--num-generations", "8"], "--num-generations has no effect in warmup with teacher gradient"),
        (["grpo", "--start", "nowhere"], "nowhere"),
        (["--samples", "3"], "--samples has no effect in warm-up and GRPO (only relaxed would read it): leave it"),
        (["--val-data", "q.jsonl"], "--val-share has no effect with val_data q.jsonl (it would with none)"),
    ],
)
def test_mistakes_are_one_paragraph(tiny_lab_here, capsys, flags, said):
    assert main([*tiny_lab_here, *flags]) == 2
    told = capsys.readouterr().err.strip()
    assert said in " ".join(told.split())
    assert told.startswith("Error: ")
    assert "\n\n" not in told
    assert not Path("grip/config.toml").exists()


def test_validation_questions_are_not_training_questions(tiny_lab_here, capsys):
    assert main([*tiny_lab_here[:-2], "--val-data", str(Path("q.jsonl").absolute())]) == 2
    assert "16 of 16 validation questions are training questions too" in " ".join(capsys.readouterr().err.split())


def test_what_a_newcomer_could_not_see_is_said(tiny_lab_here, capsys):
    """Questions without answers, a scorer that begins at random, questions that are left out, a name that is taken."""
    rows = [json.loads(row) for row in Path("q.jsonl").read_text().splitlines()]
    rows[4]["anwser"] = rows[4].pop("answer")
    rows[5]["answer"] = " "
    Path("q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = [*tiny_lab_here, "grpo", "--steps", "2", "--out", "lab", "--val-keeps", "0.5", "--on-bad", "skip"]
    assert main(given) == 0
    told = capsys.readouterr()
    assert "1 of 16 questions have no answer: the model's own are taken" in told.err
    assert "no --start, and no warm-up in lab: grpo begins with a new scorer" in told.err
    assert "left out: 1 questions that could not be used; why: lab/metrics.jsonl" in told.err
    assert "grip:scorer=./lab,random" in told.out


def test_a_size_that_is_typed_is_asked_for_even_if_it_is_the_default(tiny_lab_here, capsys, vlm):
    tiny_scorer(vlm[0]).save_pretrained("before")
    given = [
        *tiny_lab_here[:5],
        "--val-share",
        "0.3",
        "grpo",
        "--start",
        "before",
        "--steps",
        "0",
        "--val-keeps",
        "0.5",
    ]
    assert main([*given, "--width", "128"]) == 2
    assert "width = 128, but the scorer in before has 16" in " ".join(capsys.readouterr().err.split())
    assert main(given) == 0


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
