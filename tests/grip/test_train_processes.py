"""Several processes of one run: what one meets ends all, and only the first one's disk counts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gripvlm
from places import TESTS

PREAMBLE = """
import os, signal, sys, time
from pathlib import Path
import torch
from gripvlm.errors import GripError
from gripvlm.grip.train import train
from gripvlm.grip.train.trainer import Trainer
from tiny_train import asked, tiny_config, tiny_vlm
torch.set_num_threads(1)
rank, out = int(os.environ["RANK"]), Path(sys.argv[1])
settings = dict(gradient_accumulation_steps=2, stage="grpo", max_steps=4)
def run(folder=out, model=None, **more):
    try:
        return train(tiny_config(output_dir=str(folder), **settings | more), *(model or tiny_vlm()), asked(8))
    except GripError as error:
        (out.parent / f"said{rank}").write_text(f"{type(error).__name__}: {error}")
        sys.exit(3)
"""
IN_STEP = """
def at(step, what):
    before = Trainer._explore
    def explore(self, progress, losses):
        if rank == 1 and self.state.step == step:
            what()
        return before(self, progress, losses)
    Trainer._explore = explore
"""


def launched(folder: Path, code: str, source: Path | None = None) -> tuple[int, list[str]]:
    """The exit code of two processes that run `code`, and what each said last."""
    (folder / "run.py").write_text(PREAMBLE + IN_STEP + code)
    paths = os.pathsep.join([str(TESTS), str(TESTS / "grip"), str(Path(gripvlm.__file__).parents[1])])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(folder / "run.py"), str(folder / "run")],
        capture_output=True,
        text=True,
        env=environment,
        timeout=240,  # a hang ends here
        check=False,
    )
    files = [folder / f"said{rank}" for rank in (0, 1)]
    said = [file.read_text() if file.exists() else done.stderr[-4000:] for file in files]
    return done.returncode, said


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("def what(): raise GripError('a bad picture')\nat(1, what)", "process 1 of 2: a bad picture"),
        (
            "def what(): raise torch.OutOfMemoryError('full')\nat(1, what)",
            "process 1 of 2: grpo ran out of memory: use",
        ),
        (
            "from gripvlm.grip.train.grpo import Grpo\nbefore = Grpo.surrogate\n"
            "def surrogate(*a):\n    loss, more = before(*a)\n    return loss * (torch.nan if rank else 1), more\n"
            "Grpo.surrogate = surrogate",
            "process 1 of 2: the loss of grpo is nan at step 0: lower --learning-rate",
        ),
        (
            "from gripvlm.grip.train.grpo import Grpo\nbefore = Grpo.pool\n"
            "def pool(self, explored):\n    if rank:\n        raise GripError('no room')\n    before(self, explored)\n"
            "Grpo.pool = pool",
            "process 1 of 2: no room",
        ),
    ],
    ids=["error", "memory", "nan", "pool"],
)
def test_an_error_in_one_process_ends_both_with_the_same_words(tmp_path, code, text):
    code, said = launched(tmp_path, code + "\nrun()")
    assert code
    assert said[0] == said[1]
    assert said[0].startswith(f"EndedTogether: {text}")


def test_a_process_that_is_killed_does_not_leave_the_other_waiting(tmp_path):
    # The launcher would end the first as well; it ignores that here.
    kill = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nat(1, lambda: os.kill(os.getpid(), signal.SIGKILL))\nrun()"
    code, said = launched(tmp_path, kill)
    assert code
    assert said[0].startswith("TrainError: another process of this run has ended without an error of its own")


def test_other_settings_or_questions_in_one_process_are_refused(tmp_path):
    code, said = launched(tmp_path, "run(seed=rank)")
    assert code
    assert (
        said[0]
        == said[1]
        == (
            "EndedTogether: process 1 of 2 has other settings than process 0: start all with the same command and "
            "the same files"
        )
    )


EACH_ITS_DISK = """
folder = out.parent / f"disk{rank}"
# Weights that part a little at each step, as sums on unlike machines do.
before = Trainer._apply_gradients
def parted(self):
    norm = before(self)
    with torch.no_grad():
        for weight in self.weights:
            weight += 1e-3 * rank
    return norm
Trainer._apply_gradients = parted
"""


def test_only_the_first_process_has_a_disk_and_all_go_on_with_its_weights(tmp_path):
    """Stopped at its second step, the run goes on at the third in both, from the checkpoint that one of them has."""
    stop = "at(1, lambda: os.kill(os.getpid(), signal.SIGINT))\n"
    scorers = "grip = run(folder)\ntorch.save(grip.module.state_dict(), out.parent / f'end{rank}')"
    code, said = launched(
        tmp_path, EACH_ITS_DISK + stop + "try:\n    run(folder)\nexcept KeyboardInterrupt:\n    pass\n"
    )
    assert code == 0, said
    assert (tmp_path / "disk0" / "grpo.ckpt").exists()
    assert not (tmp_path / "disk1").exists()
    code, said = launched(tmp_path, EACH_ITS_DISK + scorers)
    assert code == 0, said
    ends = [torch.load(tmp_path / f"end{rank}", weights_only=True) for rank in (0, 1)]
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
    lines = [json.loads(line) for line in (tmp_path / "disk0" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    assert not (tmp_path / "disk1" / "grpo").exists()
