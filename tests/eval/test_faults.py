"""A process that dies, or a disk that fills up, between any two operations on files: the same command resumes.

Here at 28 places over eval, its shards, train and report; at every one of them (some 250) with
`pytest -m slow tests/eval/test_faults.py`.
"""

from __future__ import annotations

import json
import tempfile
from functools import lru_cache
from pathlib import Path

import pytest
import torch

from eval_cases import Letters, run, untimed_file
from faulty_disk import Died, installed
from gripvlm.cli import main
from gripvlm.grip.scorer import Scorer
from gripvlm.grip.train import train
from gripvlm.report import report
from gripvlm.utils import disk
from tiny_results import made_up
from tiny_train import asked, tiny_config, tiny_vlm

CLOCKS = ("minutes", "step_time")


@lru_cache(maxsize=1)
def vlm():
    return tiny_vlm()


SMALL = {"tasks": [Letters(count=4)], "pruners": ["grid"], "keeps": [0.1], "batch_size": 2}


def evaluated(folder: Path) -> object:
    """The result without times and sessions."""
    run(folder / "r.json", **SMALL)
    return untimed_file(folder / "r.json")


def trained(folder: Path) -> object:
    """Both stages, with a checkpoint after every step: metrics without clocks, and weights."""
    settings = {"distill_steps": 1, "max_steps": 2, "eval_questions": 2, "save_steps": 1}
    train(tiny_config(output_dir=str(folder / "grip"), **settings), *vlm(), asked(4))
    lines = [json.loads(line) for line in (folder / "grip" / "metrics.jsonl").read_text().splitlines()]
    weights = Scorer.from_pretrained(folder / "grip").state_dict()
    assert {"config.toml", "environment.json"} <= {file.name for file in (folder / "grip").iterdir()}
    told = [{key: value for key, value in line.items() if key not in CLOCKS} for line in lines]
    return told, {name: weight.tolist() for name, weight in weights.items()}


def reported(folder: Path) -> object:
    """Every byte of the page."""
    report([results()], folder / "page", pictures=False)
    return {file.name: file.read_bytes() for file in (folder / "page").rglob("*") if file.is_file()}


@lru_cache(maxsize=1)
def results() -> Path:
    return made_up(Path(tempfile.mkdtemp()) / "r.json", pictures=3)


def sharded(folder: Path) -> object:
    """Two shards, and what puts them together."""
    for shard in ("1/2", "2/2", None):
        run(folder / "r.json", **SMALL, shard=shard)
    return untimed_file(folder / "r.json")


RUNS = {"eval": evaluated, "train": trained, "report": reported, "shards": sharded}


@lru_cache(maxsize=4)
def undisturbed(name: str) -> tuple[object, tuple[tuple[str, str], ...]]:
    """(what a run ends in, its operations)."""
    results(), vlm()
    with pytest.MonkeyPatch.context() as patch:
        watched = installed(patch)
        return RUNS[name](Path(tempfile.mkdtemp())), tuple(watched.done)


def left_over(folder: Path) -> list[str]:
    return [file.name for file in folder.rglob("*") if file.name.endswith((".part", "lock"))]


def dies(name: str, at: int, folder: Path) -> None:
    whole, _ = undisturbed(name)
    with pytest.MonkeyPatch.context() as patch:
        installed(patch, at)
        with pytest.raises(Died):
            RUNS[name](folder)
    assert RUNS[name](folder) == whole
    assert not left_over(folder)


def fills_up(name: str, at: int, folder: Path) -> None:
    whole, _ = undisturbed(name)
    with pytest.MonkeyPatch.context() as patch:
        installed(patch, at, full=True)
        with pytest.raises(OSError, match=r"No space left .*make room, and type the same command again: '"):
            RUNS[name](folder)
    assert RUNS[name](folder) == whole
    assert not left_over(folder)


@pytest.mark.parametrize("share", [0, 0.15, 0.3, 0.45, 0.6, 0.8, 1])
@pytest.mark.parametrize("name", ["eval", "report", "shards"])
def test_a_process_that_dies_resumes(name, share, tmp_path):
    dies(name, round((len(undisturbed(name)[1]) - 1) * share), tmp_path)


@pytest.mark.parametrize(
    "file",
    [
        "config.toml",
        "environment.json",
        "metrics.jsonl",
        "distill.ckpt",
        "model.safetensors",
        "config.json",
    ],
)
def test_training_that_dies_in_the_middle_of_a_file_resumes(file, tmp_path):
    done = undisturbed("train")[1]
    writes = [i for i, (name, into) in enumerate(done) if name == "write" and into.removesuffix(".part") == file]
    dies("train", writes[len(writes) // 2], tmp_path)


@pytest.mark.parametrize("share", [0.3, 1])
@pytest.mark.parametrize("name", RUNS)
def test_a_full_disk_resumes(name, share, tmp_path):
    writes = [i for i, done in enumerate(undisturbed(name)[1]) if done[0] == "write"]
    fills_up(name, writes[round((len(writes) - 1) * share)], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("how", [dies, fills_up])
@pytest.mark.parametrize("name", RUNS)
def test_the_same_at_every_operation(name, how, tmp_path):
    done = undisturbed(name)[1]
    for at in [i for i, one in enumerate(done) if how is dies or one[0] == "write"]:
        how(name, at, tmp_path / str(at))


def test_a_full_disk_leaves_the_checkpoint_before_it(tmp_path, monkeypatch):
    settings = tiny_config(
        output_dir=str(tmp_path), distill_steps=0, stage="grpo", max_steps=2, save_steps=1, eval_questions=2
    )
    seen, write = [], disk.write

    def counted(path, content):
        if Path(path).name == "grpo.ckpt" and seen:
            installed(monkeypatch, 0, full=True)
        write(path, content)
        seen.extend([content] if Path(path).name == "grpo.ckpt" else [])

    monkeypatch.setattr("gripvlm.utils.disk.write", counted)
    with pytest.raises(OSError, match=r"what was there before stands.*grpo\.ckpt"):
        train(settings, *vlm(), asked(4))
    assert (tmp_path / "grpo.ckpt").read_bytes() == seen[0]
    assert torch.load(tmp_path / "grpo.ckpt", weights_only=True)["state"]["step"] == 1


def test_on_the_command_line_it_is_one_line(tmp_path, monkeypatch, capsys):
    file = results()
    installed(monkeypatch, 6, full=True)
    assert main(["report", str(file), "--out", str(tmp_path / "page"), "--no-pictures"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert said.startswith("Error: ")
    assert said.endswith("make room, and type the same command again")
