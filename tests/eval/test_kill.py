"""Runs killed outright at random moments end in what an uninterrupted run ends in.

Ten times in `eval` here; forty times over eval and train with `pytest -m slow tests/eval/test_kill.py` (some minutes).
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import sys
import time

import pytest

from eval_cases import untimed_file
from gripvlm.eval import read_results, samples_path
from gripvlm.grip.scorer import Scorer
from killable import TASKS, evaluation, training
from places import TESTS

KILLS = 10


def start(out, work=evaluation):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["killable"])
    process = context.Process(target=work, args=(str(out),))
    process.start()
    return process


def finished(out, work=evaluation):
    process = start(out, work)
    process.join(300)
    assert process.exitcode == 0


def held(out):
    """The whole lines of the samples file that are answers, as they are written."""
    file = samples_path(out)
    content = file.read_bytes() if file.exists() else b""
    return [line for line in content[: content.rfind(b"\n") + 1].splitlines() if b'"prediction"' in line]


@pytest.fixture
def server(monkeypatch):
    """What the fork server needs to find the tests."""
    here = TESTS
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(here), str(here.parent / "src")]))


UNIX = pytest.mark.skipif(not sys.platform.startswith(("linux", "darwin")), reason="kills processes as Unix does")


@UNIX
def test_killed_at_ten_random_moments_the_run_ends_in_the_same_json(tmp_path, server):
    whole, out = tmp_path / "whole" / "r.json", tmp_path / "killed" / "r.json"
    finished(whole)
    size, chance = samples_path(whole).stat().st_size, random.Random(0)
    killed, before, counts = 0, [], []
    for moment in sorted(chance.uniform(0.02, 0.95) for _ in range(KILLS)):
        process, began = start(out), time.monotonic()
        while process.is_alive() and time.monotonic() - began < 120:
            if samples_path(out).exists() and samples_path(out).stat().st_size >= moment * size:
                time.sleep(chance.uniform(0, 0.02))
                break
            time.sleep(0.001)
        process.kill()
        process.join()
        killed += process.exitcode == -9
        after = held(out)
        assert after[: len(before)] == before, "answers of a killed run were lost or measured again"
        before = after
        counts.append(len(after))
        assert not out.exists()
    assert killed == KILLS, "a run ended before it could be killed"
    assert 0 < counts[0] < counts[-1], "nothing of a killed run was resumed"
    finished(out)
    assert held(out)[: len(before)] == before
    assert untimed_file(out) == untimed_file(whole)
    records = read_results(out).records
    assert len(records) == sum(count for _, count in TASKS) * 4
    assert len(json.loads(out.read_text())["header"]["sessions"]) > 3


def trained(folder):
    """Metrics without clocks, and the weights that were left."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    told = [{k: v for k, v in line.items() if k != "minutes"} for line in lines]
    return told, {name: weight.tolist() for name, weight in Scorer.from_pretrained(folder).state_dict().items()}


@UNIX
@pytest.mark.slow
@pytest.mark.parametrize(
    ("work", "name", "ends_in"),
    [(evaluation, "r.json", untimed_file), (training, "grip", trained)],
    ids=["eval", "train"],
)
def test_killed_twenty_times_nothing_differs(tmp_path, server, work, name, ends_in):
    """At any time from its start on, also before it has written anything, while it resumes and when it is done."""
    whole, out, chance = tmp_path / "whole" / name, tmp_path / "killed" / name, random.Random(1)
    finished(whole, work)
    began = time.monotonic()
    finished(tmp_path / "timed" / name, work)
    takes = time.monotonic() - began
    killed = 0
    while killed < 20:
        process = start(out, work)
        process.join(chance.uniform(0, 0.5 * takes))
        process.kill()
        process.join()
        assert process.exitcode in (-9, 0)
        killed += process.exitcode == -9
        if process.exitcode == 0:
            assert ends_in(out) == ends_in(whole)
            shutil.rmtree(out.parent)  # and from the start again
    finished(out, work)
    assert ends_in(out) == ends_in(whole)
    assert not [file for file in out.parent.rglob("*") if file.name.endswith((".part", "lock"))]
