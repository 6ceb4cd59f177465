"""One run over several processes: each asks a shard, and the same call without one puts them together."""

from __future__ import annotations

import json
import shutil

import pytest

from eval_cases import Letters, run, untimed_file
from gripvlm.cli import main
from gripvlm.errors import GripError
from gripvlm.eval import ResumeError, read_results, runner, samples_path
from gripvlm.eval.plan import parse_shard

TASKS = [Letters(), Letters("others", 6)]
PLAN = {"tasks": TASKS, "pruners": ["random", "grid"], "keeps": [0.1], "seeds": [0, 1]}
SHARDS = ("1/2", "2/2")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run in one process, and a folder with the answers of its two shards."""
    folder = tmp_path_factory.mktemp("shards")
    run(folder / "whole" / "r.json", **PLAN)
    for shard in SHARDS:
        result = run(folder / "parts" / "r.json", **PLAN, shard=shard)
        assert 0 < result["rows"][0]["n"] < 10
    return folder


@pytest.fixture
def parts(made, tmp_path):
    """A copy of the folder of shards."""
    return shutil.copytree(made / "parts", tmp_path / "parts")


def test_shards_write_answers_only(parts):
    assert {file.name for file in parts.iterdir()} == {f"r.{part}.samples.jsonl" for part in ("1of2", "2of2")}


def test_shards_put_together_equal_one_run(made, parts, monkeypatch):
    monkeypatch.setattr(runner, "answer", lambda *args, **kwargs: pytest.fail("measured again"))
    out, whole = parts / "r.json", made / "whole" / "r.json"
    run(out, **PLAN)
    assert untimed_file(out) == untimed_file(whole)
    assert len(json.loads(out.read_text())["header"]["sessions"]) == 3
    found, expected = read_results(out).records, read_results(whole).records
    assert {key: record["prediction"] for key, record in found.items()} == {
        key: record["prediction"] for key, record in expected.items()
    }
    before = out.read_bytes()
    run(out, **PLAN)  # a finished run, which measures nothing
    assert out.read_bytes() == before


def test_what_a_shard_lacks_is_asked(made, parts):
    """One shard is missing, and the other was killed while it wrote a line."""
    samples_path(parts / "r.json", (2, 2)).unlink()
    first = samples_path(parts / "r.json", (1, 2))
    first.write_bytes(first.read_bytes()[:-20])
    run(parts / "r.json", **PLAN)
    assert untimed_file(parts / "r.json") == untimed_file(made / "whole" / "r.json")


def test_a_shard_of_another_run_or_a_damaged_one_is_named_and_nothing_is_written(parts):
    with pytest.raises(ResumeError, match=r"r.1of2.samples.jsonl holds \d+ answers of another run \(seed: 0 then, 1 n"):
        run(parts / "r.json", **PLAN, seed=1)
    second = samples_path(parts / "r.json", (2, 2))
    lines = second.read_text().splitlines(keepends=True)
    second.write_text("".join([*lines[:5], "{}\n", *lines[5:]]))
    with pytest.raises(ResumeError, match=r"line 6 of .*r.2of2.samples.jsonl is cut off or damaged"):
        run(parts / "r.json", **PLAN)
    assert len([*parts.iterdir()]) == 2


def test_a_shard_that_runs_again_leaves_the_results_alone(parts, monkeypatch):
    out = parts / "r.json"
    run(out, **PLAN)
    before = {file.name: file.read_bytes() for file in parts.iterdir()}
    monkeypatch.setattr(runner, "answer", lambda *args, **kwargs: pytest.fail("measured again"))
    run(out, **PLAN, shard="1/2")
    after = {file.name: file.read_bytes() for file in parts.iterdir()}
    del before["r.1of2.samples.jsonl"], after["r.1of2.samples.jsonl"]  # one more session
    assert after == before


def test_overwrite_takes_no_answers_of_shards(parts, monkeypatch):
    calls, answer = [], runner.answer
    monkeypatch.setattr(runner, "answer", lambda *args, **kwargs: calls.append(1) or answer(*args, **kwargs))
    run(parts / "r.json", **PLAN, overwrite=True)
    assert len(calls) == 1 + 5 * 5  # the rehearsal, and five batches with five variants


@pytest.mark.parametrize("text", ["0/2", "3/2", "2", "a/b", "1/0", "-1/2"])
def test_a_shard_is_i_of_n(text):
    with pytest.raises(GripError, match="i/n"):
        parse_shard(text)


def test_a_shard_without_work_is_refused(tmp_path):
    with pytest.raises(GripError, match=r"there are 5 batches of 4: use at most 5 shards, or a smaller batch size"):
        run(tmp_path / "r.json", shard="6/6")
    assert list(tmp_path.iterdir()) == []


def test_a_shard_without_a_file_would_be_lost(capsys):
    assert main(["eval", "--shard", "1/2", "--limit", "1"]) == 2
    assert "without --out keeps no answers" in capsys.readouterr().err
