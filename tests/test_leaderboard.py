"""experiments/leaderboard: what may be added, and what the table then says. Answers are made up; no model runs."""

from __future__ import annotations

import json

import pytest

from experiments.leaderboard.add import add
from experiments.leaderboard.analyze import of_file
from gripvlm.errors import GripError
from gripvlm.eval import read_results
from tiny_results import ARMS, made_up

REAL = {"model": "owner/a-model", "tasks": ["pope (80, 1)", "ai2d (80, 2)"], "versions": {"gripvlm": "0.1.0"}}


@pytest.fixture(autouse=True)
def _of_benchmarks(monkeypatch):
    monkeypatch.setattr("tiny_results.TASKS", ("pope", "ai2d"))


def test_a_result_is_copied_with_its_answers_and_has_its_rows(tmp_path):
    folder = tmp_path / "board"
    target = add(made_up(tmp_path / "r.json", **REAL), folder)
    assert target.name == "owner--a-model.abc.2026-01-01.r.json"
    copy = read_results(target)
    assert copy.missing is None
    assert len(copy.records) == 2 * 80 * (1 + len(ARMS) * 3)
    shown = of_file(copy)
    assert len(shown) == 2 * 2 * 3  # tasks, grid and mine, budgets
    row = next(row for row in copy.rows if (row["task"], row["pruner"], row["keep"]) == ("pope", "mine", 0.1))
    luck = [r["score"] for r in copy.rows if r["task"] == "pope" and "random" in r["pruner"] and r["keep"] == 0.1]
    cells = next(cells for cells in shown if cells[1:4] == ["pope", "`mine`", "10%"])
    assert cells[4].startswith(f"{100 * row['score']:.1f} [")
    assert cells[6] == f"{100 * sum(luck) / 2:.1f}"
    with pytest.raises(GripError, match="is there already"):
        add(tmp_path / "r.json", folder)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": "lab"}, "the model is 'lab': use a hub id"),
        ({"limit": 100}, "without --limit"),
        ({"git": {"commit": "0" * 40, "dirty": True}}, "run it from a clean commit or a release"),
        ({"git": None, "versions": {}}, "run it from a clean commit or a release"),
        ({"tasks": ["lab/text (80, 1)", "ai2d (80, 2)"]}, "tasks lab: allowed are pope, "),
        ({"command": "gripvlm eval --out /home/me/r.json"}, "names a folder of your machine, /home/me/r.json"),
        ({"arms": (("mine", 0.7),)}, "random, grid not measured: use --pruners random,grid"),
        ({"arms": (("random", 0.5), ("grid", 0.6))}, "no method beside the baselines"),
        ({"answers": False}, "the answers are missing: put r.samples.jsonl beside it"),
    ],
)
def test_what_cannot_be_compared_is_refused_with_the_reason(tmp_path, monkeypatch, changes, says):
    if "lab" in str(changes.get("tasks")):
        monkeypatch.setattr("tiny_results.TASKS", ("lab/text", "ai2d"))
    file = made_up(tmp_path / "r.json", **{**REAL, **changes})
    with pytest.raises(GripError, match=r"r\.json is not added: .*") as told:
        add(file, tmp_path / "board")
    assert says in str(told.value)
    assert not (tmp_path / "board").exists()


def test_scores_that_do_not_follow_from_the_answers_are_refused(tmp_path):
    file = made_up(tmp_path / "r.json", **REAL)
    content = json.loads(file.read_text())
    content["rows"][3]["score"] = 1.0
    file.write_text(json.dumps(content))
    with pytest.raises(GripError, match="are not of one run"):
        add(file, tmp_path / "board")
