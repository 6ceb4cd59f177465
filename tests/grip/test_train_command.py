"""`gripvlm train`: its flags, its refusals, what it says."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import gripvlm
from gripvlm import lab
from gripvlm.cli import main
from gripvlm.grip.scorer import Scorer
from gripvlm.grip.train import TrainConfig, read_toml
from gripvlm.grip.train.config import RENAMED
from gripvlm.grip.train.processes import EndedTogether
from gripvlm.models import loading
from gripvlm.models.loading import training_dtype
from tiny_train import stopping, tiny_vlm, write_jsonl


@pytest.fixture(scope="module")
def vlm():
    return tiny_vlm()


@pytest.fixture
def tiny_lab_here(tmp_path, monkeypatch, vlm):
    """`lab` is the tiny model; questions.jsonl is here."""
    monkeypatch.setattr(lab, "load", lambda name: vlm)
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path, 8)
    return ["train", "--device", "cpu", "--data", "q.jsonl", "--width", "16", "--blocks", "1", "--eval-share", "0.3"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--stepz", "3"], "No such option"),
        (["--max-steps", "many"], "Invalid value for '--max-steps'"),
        (["sideways"], "use one of 'all', 'distill', 'grpo'"),
        (["--data", ""], "no training data: type --data"),
        (["--data", "nothing.jsonl"], "no file 'nothing.jsonl'"),
        (["--reward-funcs", "nonsense"], "unknown reward 'nonsense'"),
        (["--reward-funcs", "..:x"], "no reward '..:x': TypeError"),
        (["--keep-low", "0"], "keep_low = 0.0: use a number above 0"),
        (["--teacher", "nobody"], "unknown teacher 'nobody'"),
        (["--config", "nothing.toml"], "no config file 'nothing.toml'"),
        (["--eval-keeps", "50%"], "eval_keeps = '50%'"),
        (["--keep-low", "0.6"], "use shares in (0, 1], the low one at most the high one"),
        (["--width", "18"], "width = 18, heads = 4: use a width that is a multiple of the heads"),
        (["--budgets", "choices"], "set keep_choices, such as 0.25"),
        (
            ["distill", "--num-iterations", "2"],
            "--num-iterations has no effect in distill (only grpo would read it): leave it out",
        ),
        (["grpo", "--teacher", "attention"], "--teacher has no effect in grpo"),
        (["--epsilon", "0.1"], "--epsilon has no effect with num_iterations 1 (it would with 2 or more): leave it out"),
        (["--budgets", "choices", "--keep-choices", "0.1", "--keep-low", "0.2"], "--keep-low has no effect with"),
        (["distill", "--num-generations", "8"], "--num-generations has no effect in distill"),
        (["grpo", "--init-from", "nowhere"], "nowhere"),
        (
            ["grpo", "--init-from", "lab", "--width", "128", "--blocks", "3", "--rounds", "16"],  # its default, typed
            "rounds = 16, but the scorer in lab has 1: leave that setting out",
        ),
        (["--dtype", "int8"], "dtype = 'int8': use one of 'auto', 'float32', 'bfloat16', 'float16'"),
        (["--dtype", "float16"], "float16 is too small for the gradients of the teacher gradient"),
        (["--bf16", "--dtype", "bfloat16"], "bf16 is for models in float32, and this one is bfloat16: leave bf16 out"),
        (["--attn-implementation", "nonsense"], "attn_implementation 'nonsense'"),
        (["--reward-weights", "1,2"], "use one number for each of 1 reward_funcs"),
        (["--tflops", "250"], "--tflops 250: type the speed of an accelerator beside --dry-run, such as 250"),
        (["--dry-run", "--tflops", "0"], "--tflops 0: type the speed of an accelerator beside --dry-run"),
        (["--eval-data", "q.jsonl"], "--eval-share has no effect with eval_data q.jsonl (it would with none)"),
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
    assert main([*tiny_lab_here[:-2], "--eval-data", str(Path("q.jsonl").absolute())]) == 2
    assert "16 of 16 validation questions are training questions too" in " ".join(capsys.readouterr().err.split())


def test_what_a_newcomer_could_not_see_is_said(tiny_lab_here, capsys):
    """Questions without answers, a scorer that begins at random, questions that are left out, a name that is taken."""
    rows = [json.loads(row) for row in Path("q.jsonl").read_text().splitlines()]
    rows[4]["anwser"] = rows[4].pop("answer")
    rows[5]["answer"] = " "
    Path("q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = [
        *tiny_lab_here,
        "grpo",
        "--max-steps",
        "2",
        "--output-dir",
        "lab",
        "--eval-keeps",
        "0.5",
        "--on-bad-sample",
        "skip",
    ]
    assert main(given) == 0
    told = capsys.readouterr()
    assert "1 of 16 questions have no answer: the model's own are taken" in told.err
    assert "no --init-from, and no distilled scorer in lab: grpo begins with a new scorer" in told.err
    assert "left out: 1 questions that could not be used; why: lab/metrics.jsonl" in told.err
    assert "grip:scorer=./lab,random" in told.out


def test_flags_win_over_the_file_and_ctrl_c_says_what_is_kept(tiny_lab_here, capsys, monkeypatch):
    Path("c.toml").write_text(
        'max_steps = 3\ndistill_steps = 2\noutput_dir = "elsewhere"\n'
        "per_device_train_batch_size = 2\nnum_generations = 4\n"
    )
    flags = [*tiny_lab_here, "--config", "c.toml", "--max-steps", "2", "--eval-keeps", "0.5", "--no-question"]
    with monkeypatch.context() as patch:
        stopping(patch, 1)
        assert main(flags) == 130
    assert "Stopped at step 1 of 2 (grpo). The same command resumes from" in " ".join(capsys.readouterr().err.split())
    assert main(flags) == 0
    told = "".join(capsys.readouterr().out.split("\n"))
    assert "gripvlm eval --model lab --tasks jsonl:q.jsonl --pruners grip:scorer=elsewhere,random --keep 10%" in told
    written = read_toml("elsewhere/config.toml")
    assert (written["max_steps"], written["distill_steps"], written["question"]) == (2, 2, False)
    assert not Scorer.from_pretrained("elsewhere").config.question


def test_the_model_is_loaded_as_it_is_told(tiny_lab_here, monkeypatch, vlm):
    loaded = []
    monkeypatch.setattr(
        "gripvlm.models.loading.load_model", lambda name, *how: loaded.append(how) or (copy.deepcopy(vlm[0]), vlm[1])
    )
    short = [*tiny_lab_here, "grpo", "--max-steps", "1", "--eval-keeps", "0.5"]
    assert main(short) == 0
    assert (
        main([*short, "--dtype", "bfloat16", "--attn-implementation", "sdpa", "--output-dir", "b"]) == 2
    )  # is float32
    assert loaded == [("cpu", "float32", None, 0.0), ("cpu", "bfloat16", "sdpa", 0.0)]


def test_a_model_that_does_not_fit_is_trained_for(tmp_path, monkeypatch, capsys, vlm):
    """Some of its weights are in memory, or all; the scorers are the same."""
    (folder := tmp_path / "m").mkdir()
    vlm[0].save_pretrained(folder)
    vlm[1].save_pretrained(folder)
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path, 8)
    flags = ["train", "--model", "m", "--device", "cpu", "--data", "q.jsonl", "--eval-share", "0.3"]
    flags += ["--distill-steps", "1", "--max-steps", "1", "--width", "16", "--blocks", "1", "--eval-keeps", "0.5"]
    ends = []
    for name, more in (("whole", []), ("part", ["--max-memory", "1e-4"])):
        with on_meta(monkeypatch) as waiting:
            assert main([*flags, "--output-dir", name, *more]) == 0
        assert (waiting[0] > 0) == bool(more)
        ends.append(Scorer.from_pretrained(name).state_dict())
    assert all(torch.equal(ends[1][name], value) for name, value in ends[0].items())
    assert main([*flags, "--model", "lab", "--max-memory", "1"]) == 2
    assert "max_memory = 1: lab is small, leave that setting out" in " ".join(capsys.readouterr().err.split())


@contextmanager
def on_meta(monkeypatch):
    """A list that gets how many weights of the model that is loaded wait elsewhere."""
    found, load = [], loading.load_model

    def counted(*how):
        model, processor = load(*how)
        found.append(sum(weight.is_meta for weight in model.parameters()))
        return model, processor

    with monkeypatch.context() as patch:
        patch.setattr(loading, "load_model", counted)
        yield found


def test_the_dtype_of_an_accelerator_is_bfloat16_if_it_has_it(monkeypatch):
    assert training_dtype("cpu") == "float32"
    monkeypatch.setattr(loading, "chosen_device", torch.device)
    for has, dtype in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda has=has, **how: has)
        assert training_dtype("cuda") == dtype


def test_one_process_says_what_ended_all(tiny_lab_here, monkeypatch, capsys):
    def ended(*args, **kwargs):
        raise EndedTogether("process 1 of 2: no luck")

    monkeypatch.setattr("gripvlm.grip.train.run.train_on", ended)
    for rank, said in (("0", "Error: process 1 of 2: no luck"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        assert main(tiny_lab_here) == 2
        assert capsys.readouterr().err.strip() == said


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


def test_a_former_name_is_answered_with_the_present_one(tmp_path, capsys):
    (tmp_path / "old.toml").write_text("warmup_steps = 3\n")
    assert main(["train", "--config", str(tmp_path / "old.toml")]) == 2
    assert "no setting 'warmup_steps': it is now distill_steps" in " ".join(capsys.readouterr().err.split())
    assert main(["train", "--data", "q.jsonl", "--warmup-steps", "3"]) == 2
    assert "No such option: --warmup-steps. It is now --distill-steps." in " ".join(capsys.readouterr().err.split())
    for former, now in RENAMED.items():
        assert former not in TrainConfig.__dataclass_fields__
        assert now.split()[0] in TrainConfig.__dataclass_fields__
