"""`runs/gpu_checks.py` at tiny size on the CPU: what runs once on a lent GPU is tried on every change."""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from places import ROOT


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "runs"))
    import gpu_checks

    return gpu_checks


def settings(out: Path, **changes) -> Namespace:
    given = {"out": out, "device": "cpu", "dtype": "bfloat16", "tests": "", "models": "", "train": "", "batches": "1"}
    given |= {
        "repeats": 1,
        "new": 2,
        "fit": 0,
        "memory": 0,
        "parts": "tests,bench,fit,train",
        "seconds": 100.0,
        "commit": "c0ffee",
        "part": "",
        "pack": "",
    }
    return Namespace(**{**given, **changes})


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def test_the_parts_that_have_a_process_of_their_own(tmp_path):
    options = [
        "--device=cpu",
        "--fit=0",
        "--tests=tests/gpu/test_gpu_threads.py",
        "--models=tiny-qwen",
        "--train=",
        "--batches=1",
    ]
    command = [
        sys.executable,
        "runs/gpu_checks.py",
        "--repeats=1",
        "--new=2",
        "--commit=c0ffee",
        "--out",
        str(tmp_path),
    ]
    done = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert {path.name for path in tmp_path.iterdir()} == {"bench-tiny-qwen.json", "log.txt", "run.json", "tests.json"}
    assert [part["code"] for part in read(tmp_path / "run.json")["parts"]] == [0, 0]
    tests, bench = read(tmp_path / "tests.json"), read(tmp_path / "bench-tiny-qwen.json")
    assert len(tests["tests"]) == tests["passed"] + tests["failed"] + tests["skipped"] > 0
    assert bench["finished"] is True
    assert bench["model"]["dtype"] == "bfloat16"
    for result in (tests, bench):
        assert result["environment"]["git"]["commit"] == "c0ffee"
        assert result["environment"]["versions"]["transformers"] in done.stdout
    assert "[bench:tiny-qwen] tiny-qwen: built in" in (tmp_path / "log.txt").read_text()


def test_every_training_stage_takes_a_step(script, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        script.one_part(settings(tmp_path, part="train", train="tiny"))
    result = read(tmp_path / "train.json")
    assert ended.value.code == 0, [step["failed"] for step in result["steps"]]
    assert result["finished"] is True
    assert [(step["stage"], step["failed"]) for step in result["steps"]] == [
        *[(stage, None) for stage in ("warmup", "grpo", "warmup")],
        *[("relaxed", None)] * 5,
    ]


def test_a_part_that_takes_too_long_is_stopped_and_the_rest_goes_on(script, tmp_path, monkeypatch, capsys):
    """The log and run.json say so; what was written stays."""
    stubborn = tmp_path / "part.py"
    stubborn.write_text("import time\nprint('began', flush=True)\ntime.sleep(60)\n")
    monkeypatch.setattr(script, "__file__", str(stubborn))
    monkeypatch.setattr(script, "SECONDS", {"bench": 6, "train": 6})
    assert script.all_parts(settings(tmp_path, models="tiny", train="tiny", parts="bench,train")) == 1
    parts = read(tmp_path / "run.json")["parts"]
    assert [part["part"] for part in parts] == ["bench:tiny", "train"]
    assert all(part["code"] not in (0, None) and 5 < part["seconds"] < 20 for part in parts)
    assert (tmp_path / "log.txt").read_text().count("began") == 2


def test_time_that_is_over_leaves_what_was_measured(script, tmp_path, capsys):
    with pytest.raises(SystemExit, match="nothing was measured"):
        script.one_part(settings(tmp_path, part="bench:tiny", seconds=5.2))
    assert script.within(60, lambda: 3) == 3


def test_the_largest_batch_is_looked_for(script, tmp_path, monkeypatch, capsys):
    """A CPU holds all that is tried here."""
    with pytest.raises(SystemExit) as ended:
        script.one_part(settings(tmp_path, part="fit:tiny", fit=4))
    assert ended.value.code == 0
    result = read(tmp_path / "fit-tiny.json")
    assert [(row["setting"], row["fits"], row["fails"]) for row in result["fits"]] == [
        ("full", 4, None),
        ("norm 0.11", 4, None),
    ]
    assert result["tried"] == ["fit full: 1", "fit full: 2", "fit full: 4", "fit norm 0.11: 4"]
    assert result["finished"] is True
    monkeypatch.setattr(script, "within", lambda seconds, work: None)
    with pytest.raises(SystemExit, match="time was over"):
        script.one_part(settings(tmp_path, part="fit:tiny", fit=4))
    assert read(tmp_path / "fit-tiny.json")["finished"] is False


def test_only_the_parts_that_are_asked_for(script, tmp_path):
    every = settings(tmp_path, tests="tests/test_gpu_[ew]*.py", models="a,b", train="a", fit=4)
    tests = ["tests:tests/gpu/test_gpu_exact.py", "tests:tests/gpu/test_gpu_waiting.py"]
    others = [["bench:a"], ["bench:b"], ["fit:a"], ["fit:b"], ["train"]]
    assert script.groups_of(every) == [tests, *others]
    every.parts = "train,tests,fit"
    assert script.groups_of(every) == [["train"], tests, ["fit:a"], ["fit:b"]]
    every.fit, every.train, every.tests = 0, "", ""
    assert script.groups_of(every) == []
    every.parts = "fits"
    with pytest.raises(SystemExit, match="--parts knows tests, bench, fit, train, not fits"):
        script.groups_of(every)
