"""Where one pruner cannot reach one budget, that row of `bench` says why and the rest is measured."""

from __future__ import annotations

import json

import pytest
import torch
from test_bench import MACHINE, NEW, PROMPT, prompts

from gripvlm import Budget
from gripvlm.bench import bench, random_model
from gripvlm.bench import runner as bench_runner
from gripvlm.cli import main
from gripvlm.errors import BudgetError
from gripvlm.pruners import get_pruner


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
    with pytest.raises(BudgetError, match=r"fastv:layer=1 at 10%: 2 of 16 .*pass keep=\d+ or more"):
        small(tiny, ["fastv:layer=1"], [Budget(0.1)])


def test_bench_on_the_command_line(tiny, monkeypatch, capsys):
    line = ["bench", "--model", "random:tiny", "--prompt", "32", "--new", "2", "--repeats", "1", "--picture", "112"]
    assert main([*line, "--pruners", "norm,fastv:layer=1", "--keep", "75%,10%"]) == 0
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 80
    assert "fastv:layer=1 0.1 was not measured: " in " ".join(said.split())
