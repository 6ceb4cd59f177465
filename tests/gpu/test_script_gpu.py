"""experiments/gpu/checks.py at tiny size on the CPU: what runs once on a lent GPU is tried on every change."""

from __future__ import annotations

import json
import subprocess
import sys

from experiments.gpu import checks
from places import ROOT


def test_every_part_runs_and_leaves_its_file(tmp_path):
    options = ["--device=cpu", "--models=tiny", "--batches=1", "--repeats=1", "--commit=c0ffee"]
    command = [sys.executable, "experiments/gpu/checks.py", "--tests=tests/gpu/test_gpu_threads.py", *options]
    done = subprocess.run(
        [*command, "--out", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    log = (tmp_path / "log.txt").read_text()
    assert done.returncode == 0, done.stdout + log[-3000:]
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["commit"] == "c0ffee"
    assert {name: part["code"] for name, part in run["parts"].items()} == {
        "tests:test_gpu_threads": 0,
        "bench:tiny": 0,
    }
    bench = json.loads((tmp_path / "bench-tiny.json").read_text())
    assert bench["finished"] is True
    assert bench["model"]["dtype"] == "bfloat16"
    assert "<testsuite" in (tmp_path / "tests-test_gpu_threads.xml").read_text()


def test_a_part_that_takes_too_long_is_interrupted_then_killed(tmp_path, monkeypatch):
    stubborn = (
        "import signal, time; signal.signal(signal.SIGINT, lambda *_: print('no')); print('began'); time.sleep(60)"
    )
    (tmp_path / "stubborn.py").write_text(stubborn)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(checks, "GRACE", 2)
    part = checks.run(["stubborn"], 3, tmp_path / "log.txt")
    assert part["code"] == -9
    assert 4 < part["seconds"] < 20
    assert "began" in (tmp_path / "log.txt").read_text()
