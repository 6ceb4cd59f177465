"""Where one pruner cannot reach one budget, that cell says why and the rest goes on."""

from __future__ import annotations

import json

import pytest
import torch
from test_bench import MACHINE, NEW, PROMPT, prompts
from test_evaluate import Letters

from gripvlm import Budget
from gripvlm.bench import bench, random_model
from gripvlm.bench import runner as bench_runner
from gripvlm.cli import main
from gripvlm.errors import BudgetError
from gripvlm.eval import evaluate, merge, runner
from gripvlm.eval.regression import compare
from gripvlm.eval.results import read_results
from gripvlm.pruners import get_pruner
from gripvlm.report import report
from tiny_lab import tiny_lab

ARMS, KEEPS = ["norm", "fastv:layer=1"], [0.75, 0.1]
WHY = "visual tokens on average over 2 layers is less than pruner 'fastv' can reach"


@pytest.fixture
def lab():
    return tiny_lab()


def arms_of(result):
    return {(row["pruner"], row["keep"]) for row in result["rows"]}


REST = {("full", 1.0), ("norm", 0.75), ("norm", 0.1), ("fastv:layer=1", 0.75)}


def test_eval_notes_the_cell_and_measures_the_rest(lab, tmp_path, capsys):
    out = tmp_path / "r.json"
    result = evaluate(*lab, [Letters()], ARMS, KEEPS, out=out, progress=True)
    assert arms_of(result) == REST
    (left,) = result["unreached"]
    assert (left["pruner"], left["keep"]) == ("fastv:layer=1", 0.1)
    assert WHY in left["why"]
    assert "keep=26" not in left["why"]  # nobody typed that
    assert f"not measured: fastv:layer=1 at 10%: 26 of 256 {WHY}" in capsys.readouterr().err
    assert read_results(out).unreached == result["unreached"]
    assert evaluate(*lab, [Letters()], ARMS, KEEPS, out=out)["unreached"] == result["unreached"]  # and goes on from it
    assert compare(read_results(out), read_results(out)).regressions == ()
    page = report([out], tmp_path / "page", pictures=False).with_name("report.md").read_text(encoding="utf-8")
    assert "fastv:layer=1 at 10%: 26 of 256" in page


def test_an_image_that_is_too_small_comes_late(lab, tmp_path, monkeypatch):
    """The first batches have rows; later the arm fails, and what it had said is no row of the results."""
    whole, calls = runner.answer, []

    def answer(*args, **options):
        if args[4:5] == (0.1,):
            calls.append(args)
            if len(calls) == 2:
                raise BudgetError("keep=26, but image 0 of sample 0 has only 9 visual tokens")
        return whole(*args, **options)

    monkeypatch.setattr(runner, "answer", answer)
    out = tmp_path / "r.json"
    result = evaluate(*lab, [Letters()], ["norm"], [0.5, 0.1], out=out, batch_size=2)
    assert arms_of(result) == {("full", 1.0), ("norm", 0.5)}
    assert len(calls) == 2  # not asked again
    assert "only 9 visual tokens" in read_results(out).unreached[0]["why"]


def test_shards_of_such_a_run_are_merged(lab, tmp_path):
    parts = [tmp_path / f"{n}.json" for n in (1, 2)]
    for number, part in enumerate(parts, 1):
        evaluate(*lab, [Letters()], ARMS, KEEPS, out=part, batch_size=2, shard=f"{number}/2")
    merged = merge(parts, tmp_path / "all.json", tasks=[Letters()])
    assert arms_of(merged) == REST
    assert len(merged["unreached"]) == 1
    assert read_results(tmp_path / "all.json").unreached == merged["unreached"]


def test_nothing_reached_is_an_error_before_anything_is_written(lab, tmp_path):
    with pytest.raises(BudgetError, match=r"fastv:layer=1 at 10%: 26 of 256 .*; fastv:layer=1 at 3: 3 of 256"):
        evaluate(*lab, [Letters()], ["fastv:layer=1"], [0.1, 3], out=tmp_path / "r.json")
    assert not [*tmp_path.iterdir()]


def test_eval_on_the_command_line(lab, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("gripvlm.models.loading.load_model", lambda *args, **options: lab)
    line = ["eval", "--tasks", "lab/existence", "--limit", "2", "--pruners", "norm,fastv:layer=1", "--keep", "300,75%"]
    assert main(line) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "not measured: norm at 300: keep=300, but image 0 of sample 0 has only 256 visual tokens" in said


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(bench_runner, "measured", lambda device, dtype: MACHINE)
    return random_model("random:tiny", torch.device("cpu"), torch.float32)


def small(model, pruners, keeps):
    chosen = [(spec, get_pruner(spec)) for spec in pruners]
    return bench(model, prompts(model), chosen, keeps, lengths=[PROMPT], new=NEW, repeats=2)


def test_bench_notes_the_row_and_measures_the_rest(tiny):
    result = small(tiny, ["norm", "fastv:layer=1"], [Budget(0.75), Budget(0.1), Budget(17)])
    rows = {row["setting"]: row for row in result["rows"]}
    assert {name for name, row in rows.items() if row["failed"]} == {
        "fastv:layer=1 0.1", "limit 17", "norm 17", "fastv:layer=1 17",
    }  # fmt: skip
    assert "less than pruner 'fastv' can reach" in rows["fastv:layer=1 0.1"]["failed"]
    assert "has only 16 visual tokens" in rows["limit 17"]["failed"]
    assert rows["norm 0.1"]["turns"] == rows["fastv:layer=1 0.75"]["turns"] == 2
    assert rows["fastv:layer=1 0.1"]["failed"].startswith("2 of 16")
    assert rows["fastv:layer=1 0.1"]["unreached"] is True
    json.dumps(result)


def test_bench_that_reaches_nothing_says_so(tiny):
    with pytest.raises(BudgetError, match=r"fastv:layer=1 at 10%: 2 of 16 .*type keep=\d+ or more"):
        small(tiny, ["fastv:layer=1"], [Budget(0.1)])


def test_bench_on_the_command_line(tiny, monkeypatch, capsys):
    line = ["bench", "--model", "random:tiny", "--prompt", "32", "--new", "2", "--repeats", "1", "--picture", "112"]
    assert main([*line, "--pruners", "norm,fastv:layer=1", "--keep", "75%,10%"]) == 0
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 80
    assert "fastv:layer=1 0.1 was not measured: " in " ".join(said.split())
