"""Whole runs: killed and resumed, bad data, several processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import gripvlm
from gripvlm.errors import Interrupted, TrainError
from gripvlm.eval import evaluate
from gripvlm.grip.scorer import Scorer
from gripvlm.grip.train import TrainConfig, read_toml, train
from gripvlm.grip.train.checkpoint import Checkpoint
from gripvlm.grip.train.data import QuestionStream
from gripvlm.grip.train.trainer import Trainer
from gripvlm.tasks import Sample, TaskError, get_tasks
from places import TESTS
from tiny_train import Asked, asked, stopping, tiny_config, tiny_vlm, write_several


@pytest.fixture(scope="module")
def vlm():
    return tiny_vlm()


@pytest.fixture(scope="module")
def whole(vlm, tmp_path_factory):
    """The folder of one uninterrupted run of both stages."""
    folder = tmp_path_factory.mktemp("whole")
    train(tiny_config(output_dir=str(folder)), *vlm, asked(8))
    return folder


def lines(folder: Path) -> list[dict]:
    """The metrics without clock times."""
    clock = ("minutes", "step_time")
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in clock} for line in found]


def same_weights(one: Path, other: Path) -> bool:
    a, b = (Scorer.from_pretrained(folder).state_dict() for folder in (one, other))
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("joint", [True, False])
def test_a_scorer_is_trained_on_questions_about_several_pictures(vlm, tmp_path, joint):
    file, steps = write_several(tmp_path / "data"), {"distill_steps": 2, "max_steps": 2, "teacher": "gradient_at_k"}
    config = tiny_config(data=str(file), output_dir=str(tmp_path / "r"), eval_share=0.5, joint=joint, **steps)
    scorer = train(config, *vlm)
    assert (scorer.joint, scorer.module.config.rounds) == (joint, 16)
    (task,) = get_tasks(f"jsonl:{file}")
    result = evaluate(*vlm, [task], [scorer], [0.25])
    assert [row["tokens"] for row in result["rows"]] == [32, 8]


def test_a_run_leaves_everything_in_its_folder(whole):
    names = {file.name for file in whole.iterdir()}
    assert names >= {
        "config.json",
        "model.safetensors",
        "config.toml",
        "environment.json",
        "metrics.jsonl",
    }
    assert [(line["stage"], line["step"]) for line in lines(whole) if "loss" in line] == [
        *(("distill", step) for step in (1, 2, 3)),
        *(("grpo", step) for step in (1, 2, 3, 4, 5, 6)),
    ]
    judged = [(line["stage"], line["step"]) for line in lines(whole) if "eval" in line]
    assert judged == [*(("distill", step) for step in (0, 2, 3)), *(("grpo", step) for step in (0, 2, 4, 6))]
    judged = {
        name: [one["eval"]["objective"] for one in lines(whole) if one["stage"] == name and "eval" in one]
        for name in ("distill", "grpo")
    }
    assert judged["distill"][-1] == judged["grpo"][0]  # what distilling ended with
    grpo = [line for line in lines(whole) if line["stage"] == "grpo" and "loss" in line]
    assert set(grpo[0]) >= {"learning_rate", "grad_norm", "reward", "reward_std", "exact", "entropy", "num_tokens"}
    assert set(grpo[0]) >= {"frac_reward_zero_std", "rewards/probability/mean", "rewards/probability/std"}
    assert TrainConfig(**read_toml(whole / "config.toml")) == tiny_config(output_dir=str(whole))
    assert not same_weights(whole, whole / "distill")


def test_another_judge_may_choose_the_step(vlm, whole, tmp_path):
    train(tiny_config(output_dir=str(tmp_path), eval_reward="log_prob"), *vlm, asked(8))
    theirs, mine = ([line for line in lines(one) if "eval" in line] for one in (whole, tmp_path))
    assert all(line["eval"]["objective"] > 0 for line in theirs)
    assert all(line["eval"]["objective"] < 0 for line in mine)  # a log-probability
    assert [line["eval"]["exact@0.5"] for line in mine[:2]] == [line["eval"]["exact@0.5"] for line in theirs[:2]]


@pytest.mark.parametrize(("stage", "at"), [("grpo", 3), ("distill", 2)])
def test_stopped_by_ctrl_c_and_resumed_it_is_the_same_run(vlm, whole, tmp_path, monkeypatch, stage, at):
    stopping(monkeypatch, at, stage=stage)
    with pytest.raises(Interrupted, match=rf"Stopped at step {at} of \d \({stage}\).*resumes from"):
        train(tiny_config(output_dir=str(tmp_path)), *vlm, asked(8))
    monkeypatch.undo()
    assert (tmp_path / "distill" / "config.json").exists() is (stage == "grpo")
    train(tiny_config(output_dir=str(tmp_path)), *vlm, asked(8))
    assert lines(tmp_path) == lines(whole)
    assert same_weights(tmp_path, whole)


def test_killed_between_checkpoints_it_is_the_same_run_too(vlm, whole, tmp_path, monkeypatch):
    """First before any checkpoint, then behind one, each time with half a line at the end."""

    def die():
        raise SystemExit

    for at in (3, 5):
        stopping(monkeypatch, at, die)
        with pytest.raises(SystemExit):
            train(tiny_config(output_dir=str(tmp_path), save_steps=1000 if at == 3 else 1), *vlm, asked(8))
        monkeypatch.undo()
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write('{"stage": "grpo", "st')
    train(tiny_config(output_dir=str(tmp_path)), *vlm, asked(8))
    assert lines(tmp_path) == lines(whole)
    assert same_weights(tmp_path, whole)


def test_a_run_that_is_over_trains_no_more(vlm, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "_step", None)
    before = (whole / "metrics.jsonl").read_text()
    grip = train(tiny_config(output_dir=str(whole)), *vlm, asked(8))
    assert (whole / "metrics.jsonl").read_text() == before
    assert all(
        torch.equal(v, grip.module.state_dict()[k]) for k, v in Scorer.from_pretrained(whole).state_dict().items()
    )


def test_a_second_stage_follows_in_the_folder_of_the_first(vlm, whole, tmp_path):
    train(tiny_config(output_dir=str(tmp_path), stage="distill"), *vlm, asked(8))
    assert {line["stage"] for line in lines(tmp_path)} == {"distill"}
    train(tiny_config(output_dir=str(tmp_path), stage="grpo"), *vlm, asked(8))
    assert lines(tmp_path) == lines(whole)
    assert same_weights(tmp_path, whole)


def test_a_warm_up_is_gone_on_with_as_it_was_begun(vlm, whole, tmp_path, monkeypatch):
    out = str(tmp_path)
    with monkeypatch.context() as patch:
        stopping(patch, 2, stage="distill")
        with pytest.raises(Interrupted):
            train(tiny_config(output_dir=out, stage="distill"), *vlm, asked(8))
    for changed in ({"teacher": "attention"}, {"ema_decay": 0.9}, {"seed": 7}):
        with pytest.raises(TrainError, match=f"holds another run .{next(iter(changed))} was"):
            train(tiny_config(output_dir=out, **changed), *vlm, asked(8))
    assert read_toml(tmp_path / "config.toml")["stage"] == "distill"
    train(tiny_config(output_dir=out), *vlm, asked(8))  # both stages: the rest of this one, and the next
    assert lines(tmp_path) == lines(whole)
    assert same_weights(tmp_path, whole)


def test_another_run_is_kept_out_of_the_folder(vlm, whole, tmp_path):
    with pytest.raises(TrainError, match=r"holds another run \(seed was 0, now 1\): use another --output-dir"):
        train(tiny_config(output_dir=str(whole), seed=1), *vlm, asked(8))
    train(tiny_config(output_dir=str(tmp_path), stage="distill"), *vlm, asked(8))
    mistakes = {
        "unknown reward": {"reward_funcs": "nonsense"},
        "eval_keeps": {"eval_keeps": "2"},
        "no scorer": {"init_from": "/no/x"},
    }
    for said, wrong in mistakes.items():
        with pytest.raises(ValueError, match=said):
            train(tiny_config(output_dir=str(tmp_path), stage="grpo", **wrong), *vlm, asked(8))
    assert read_toml(tmp_path / "config.toml")["stage"] == "distill"  # what failed at once left no trace


def test_a_running_average_of_the_weights_is_kept_and_resumed(vlm, tmp_path, monkeypatch):
    steps, before = [], Trainer._step

    def noted(self):
        steps.append({name: value.clone() for name, value in self.stage.scorer.state_dict().items()})
        return before(self)

    monkeypatch.setattr(Trainer, "_step", noted)
    settings = {"distill_steps": 0, "max_steps": 4, "ema_decay": 0.7, "stage": "grpo", "learning_rate": 0.01}
    kept = train(tiny_config(output_dir=str(tmp_path / "a"), **settings), *vlm, asked(8)).module.state_dict()
    state = torch.load(tmp_path / "a" / "grpo.ckpt", weights_only=True)["modules"]
    expected = steps[0]
    for step, after in enumerate([*steps[1:], state["scorer"]]):
        decay = min(0.7, (1 + step) / (10 + step))
        expected = {name: decay * expected[name] + (1 - decay) * after[name] for name in expected}
    moved = [(expected[name] - steps[0][name]).abs().max() > 1e-3 for name in expected]
    assert sum(moved) > len(moved) / 2
    assert all(torch.allclose(kept[name], expected[name], atol=1e-5) for name in expected)
    stopping(monkeypatch, 3)
    with pytest.raises(Interrupted):
        train(tiny_config(output_dir=str(tmp_path / "b"), **settings), *vlm, asked(8))
    monkeypatch.setattr(Trainer, "_step", before)
    train(tiny_config(output_dir=str(tmp_path / "b"), **settings), *vlm, asked(8))
    assert same_weights(tmp_path / "a", tmp_path / "b")


def test_several_steps_a_batch_of_rollouts_are_resumed(vlm, tmp_path, monkeypatch):
    several = {"stage": "grpo", "num_iterations": 3, "scale_rewards": "budget", "beta": 0.1}
    train(tiny_config(output_dir=str(tmp_path / "a"), **several), *vlm, asked(8))
    with monkeypatch.context() as patch:
        stopping(patch, 3)
        with pytest.raises(Interrupted):
            train(tiny_config(output_dir=str(tmp_path / "b"), **several), *vlm, asked(8))
    train(tiny_config(output_dir=str(tmp_path / "b"), **several), *vlm, asked(8))
    assert lines(tmp_path / "a") == lines(tmp_path / "b")
    assert same_weights(tmp_path / "a", tmp_path / "b")
    optimizer = torch.load(tmp_path / "a" / "grpo.ckpt", weights_only=True)["optimizer"]
    assert {int(state["step"]) for state in optimizer["state"].values()} == {18}  # 6 batches
    train(tiny_config(output_dir=str(tmp_path / "c"), **several | {"num_iterations": 1}), *vlm, asked(8))
    assert not same_weights(tmp_path / "a", tmp_path / "c")
    once, often = (next(line for line in lines(tmp_path / run) if "reward" in line) for run in "ca")
    assert once["reward"] == often["reward"]  # the same subsets, drawn once


def nan_at_the_third(rollout):
    nan_at_the_third.calls += 1
    values = rollout.log_probs.sum(-1)
    return values * torch.nan if nan_at_the_third.calls > 12 else values


def test_a_reward_or_a_loss_that_is_no_number_stops(vlm, tmp_path, monkeypatch):
    nan_at_the_third.calls = 0
    with pytest.raises(TrainError, match=r"'nan_at_the_third' is nan for sample '\d-\d'"):
        train(tiny_config(output_dir=str(tmp_path / "a"), reward_funcs=f"{__name__}:nan_at_the_third"), *vlm, asked(8))
    monkeypatch.setattr(
        "gripvlm.grip.train.grpo.Grpo.surrogate",
        lambda self, policy, draws, advantage: (advantage * torch.nan, {"kl_old": 0.0, "clipped": 0.0}),
    )
    with pytest.raises(TrainError, match="the loss of grpo is nan at step 0: lower --learning-rate"):
        train(tiny_config(output_dir=str(tmp_path / "b"), stage="grpo"), *vlm, asked(8))


def test_a_folder_is_free_until_its_first_checkpoint(vlm, tmp_path, monkeypatch):
    """What failed at once can be mended where it is; the settings of a stage that has not begun, too."""
    out = str(tmp_path)
    with pytest.raises(TrainError, match=r"lower --learning-rate"):
        train(tiny_config(output_dir=out, stage="grpo", learning_rate=1e30), *vlm, asked(8))
    train(tiny_config(output_dir=out, stage="grpo", max_steps=1), *vlm, asked(8))
    both = str(tmp_path / "both")
    with pytest.raises(TrainError, match="lower --learning-rate"):
        train(tiny_config(output_dir=both, learning_rate=1e30), *vlm, asked(8))
    with pytest.raises(TrainError, match=r"holds another run .distill_learning_rate was"):
        train(tiny_config(output_dir=both, distill_learning_rate=1e-4), *vlm, asked(8))
    train(tiny_config(output_dir=both, max_steps=1), *vlm, asked(8))
    assert len({line["step"] for line in lines(tmp_path / "both") if line["stage"] == "grpo" and "loss" in line}) == 1


def test_a_checkpoint_is_of_its_questions_and_whole(vlm, tmp_path, monkeypatch):
    out = str(tmp_path)
    with monkeypatch.context() as patch:
        stopping(patch, 2, how=lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Interrupted):
            train(tiny_config(output_dir=out, stage="grpo"), *vlm, asked(8))
    with pytest.raises(TrainError, match="made with other questions"):
        train(tiny_config(output_dir=out, stage="grpo"), *vlm, asked(6))
    for left in ([], {"modules": {}}):
        torch.save(left, tmp_path / "grpo.ckpt")
        with pytest.raises(TrainError, match=r"is damaged .*remove it to begin this stage again"):
            train(tiny_config(output_dir=out, stage="grpo"), *vlm, asked(8))
    (tmp_path / "grpo.ckpt").unlink()
    (tmp_path / "metrics.jsonl").write_text("{}{\n")
    with pytest.raises(TrainError, match=r"metrics\.jsonl is damaged"):
        train(tiny_config(output_dir=out, stage="grpo"), *vlm, asked(8))


def test_a_device_that_is_full_is_no_damaged_checkpoint(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(torch, "load", full)
    module = torch.nn.Linear(1, 1)
    stream = QuestionStream([], 1, 1, 0)
    checkpoint = Checkpoint(tmp_path / "x.ckpt", tiny_config(), {}, torch.optim.SGD(module.parameters()), stream)
    with pytest.raises(torch.OutOfMemoryError):
        checkpoint.restore(b"", torch.device("cpu"))


def with_bad_ones(folder: Path) -> tuple[Asked, Asked]:
    """(training, validation) questions, each with a picture that is none and an answer of nothing."""
    (folder / "bad.png").write_bytes(b"no picture")
    good = asked(5)
    bad = [Sample("corrupt", (folder / "bad.png",), "is there a cat?", "yes")]
    bad.append(Sample("empty", good.samples[0].pictures, "is there a cat?", " ", image_id="0.png"))
    again = replace(bad[0], question="is the dog red?")
    return Asked([*good.samples, *bad], "train"), Asked([again, *asked(7).samples[-4:], bad[1]], "held")


def test_bad_questions_stop_or_are_left_out(vlm, tmp_path):
    data, held = with_bad_ones(tmp_path)
    with pytest.raises((TaskError, TrainError), match=r"sample '(corrupt|empty)'"):
        train(tiny_config(output_dir=str(tmp_path / "r"), stage="grpo"), *vlm, data, asked(2))
    train(tiny_config(output_dir=str(tmp_path / "r"), stage="grpo", on_bad_sample="skip"), *vlm, data, held)
    left_out = [line for line in lines(tmp_path / "r") if "skipped" in line]
    assert {line["skipped"] for line in left_out} == {"corrupt", "empty"}
    assert {"corrupt", "empty"} <= {line["skipped"] for line in left_out if not line.get("validation")}
    assert "not a picture" in next(line["why"] for line in left_out if line["skipped"] == "corrupt")
    one = Asked(list(data.samples[-1:]), "one")
    with pytest.raises(TrainError, match="not one of 1 questions can be used"):
        train(tiny_config(output_dir=str(tmp_path / "s"), stage="grpo", on_bad_sample="skip"), *vlm, one, asked(2))


# --- several processes --------------------------------------------------------------------------------------------

# With this seed the second process is the first to meet the corrupt picture.
FOUR_STEPS = {
    "gradient_accumulation_steps": 2,
    "max_steps": 4,
    "stage": "grpo",
    "on_bad_sample": "skip",
    "seed": 2,
    "reward_funcs": "log_prob",
}
SCRIPT = f"""
import sys, torch
from pathlib import Path
from gripvlm.grip.train import train
from test_train_runs import with_bad_ones
from tiny_train import tiny_config, tiny_vlm
torch.set_num_threads(1)
data, held = with_bad_ones(Path(sys.argv[1]).parent)
train(tiny_config(output_dir=sys.argv[1], report_to="tensorboard", **{FOUR_STEPS}), *tiny_vlm(), data, held)
"""


def test_two_processes_are_one_with_twice_the_accumulation(vlm, tmp_path):
    pytest.importorskip("accelerate")
    pytest.importorskip("tensorboard")
    (tmp_path / "run.py").write_text(SCRIPT)
    paths = os.pathsep.join([str(TESTS), str(TESTS / "grip"), str(Path(gripvlm.__file__).parents[1])])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(tmp_path / "run.py"), str(tmp_path / "two")],
        capture_output=True,
        text=True,
        env=environment,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    train(tiny_config(output_dir=str(tmp_path / "one"), **FOUR_STEPS), *vlm, *with_bad_ones(tmp_path))
    one, two = (Scorer.from_pretrained(tmp_path / name).state_dict() for name in ("one", "two"))
    assert all(torch.allclose(one[name], two[name], atol=2e-5) for name in one)  # a step moves by 3e-4
    for mine, theirs in zip(lines(tmp_path / "one"), lines(tmp_path / "two"), strict=True):
        assert mine.keys() == theirs.keys()
        assert mine.get("skipped") == theirs.get("skipped")
        numbers = [k for k, value in mine.items() if isinstance(value, float) and k != "loss"]
        assert all(mine[k] == pytest.approx(theirs[k], abs=1e-4) for k in numbers)
    skipped = {line["skipped"] for line in lines(tmp_path / "two") if "skipped" in line and not line.get("validation")}
    assert skipped == {"corrupt", "empty"}
    assert list((tmp_path / "two").rglob("events.out.tfevents*"))
