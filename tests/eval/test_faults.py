"""A process that dies, or a disk that fills up, between any two operations on files: the same command goes on.

Here at 28 places over eval, train, report and merge; at every one of them (some 250) with
`pytest -m slow tests/eval/test_faults.py`.
"""

from __future__ import annotations

import json
import tempfile
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from test_evaluate import Letters, run

from faulty_disk import Died, installed
from gripvlm.cli import main
from gripvlm.eval import ResultsError, merge
from gripvlm.grip.scorer import Scorer
from gripvlm.grip.train import train
from gripvlm.report import report
from gripvlm.utils import disk
from tiny_results import made_up
from tiny_train import asked, tiny_config, tiny_vlm

CLOCKS = ("minutes", "subsets_per_second")


@lru_cache(maxsize=1)
def vlm():
    return tiny_vlm()


def evaluated(folder: Path) -> object:
    """The result without times and sessions."""
    run(folder / "r.json", tasks=[Letters(count=4)], pruners=["grid"], keeps=[0.1], batch_size=2)
    result = json.loads((folder / "r.json").read_text())
    for row in [*result["rows"], *result["means"]]:
        for name in [name for name in row if name.startswith("seconds")]:
            del row[name]
    for name in ("seconds", "finished", "sessions", "git"):
        del result["header"][name]
    return result


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


@lru_cache(maxsize=1)
def shards() -> list[Path]:
    paths = [Path(tempfile.mkdtemp()) / "r.json" for _ in range(2)]
    for number, path in enumerate(paths, 1):
        run(path, tasks=[Letters(count=4)], pruners=["grid"], keeps=[0.1], batch_size=2, shard=f"{number}/2")
    return paths


def merged(folder: Path) -> object:
    """Both files; the day aside. One that has finished refuses to write again, as it says."""
    there = (folder / "m.json").exists()
    with pytest.raises(ResultsError, match="exists") if there else nullcontext():
        merge(shards(), folder / "m.json", tasks=[Letters(count=4)], command="merge")
    result = json.loads((folder / "m.json").read_text())
    del result["header"]["finished"]
    return result, (folder / "m.samples.jsonl").read_bytes()


RUNS = {"eval": evaluated, "train": trained, "report": reported, "merge": merged}


@lru_cache(maxsize=4)
def undisturbed(name: str) -> tuple[object, tuple[tuple[str, str], ...]]:
    """(what a run ends in, its operations)."""
    results(), vlm(), shards()
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
@pytest.mark.parametrize("name", ["eval", "report", "merge"])
def test_a_process_that_dies_is_gone_on_with(name, share, tmp_path):
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
def test_training_that_dies_in_the_middle_of_a_file_is_gone_on_with(file, tmp_path):
    done = undisturbed("train")[1]
    writes = [i for i, (name, into) in enumerate(done) if name == "write" and into.removesuffix(".part") == file]
    dies("train", writes[len(writes) // 2], tmp_path)


@pytest.mark.parametrize("share", [0.3, 1])
@pytest.mark.parametrize("name", RUNS)
def test_a_full_disk_is_gone_on_with(name, share, tmp_path):
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
