"""Help and tables fit into the columns that COLUMNS says, also where they are piped."""

from __future__ import annotations

import json

import pytest
from typer.main import get_command

from gripvlm.cli import app, main
from gripvlm.cli.bench import show
from gripvlm.cli.commands import console
from gripvlm.report import table
from places import ROOT

COMMANDS = get_command(app).commands
NAMES = [(), *((name,) for name in COMMANDS), *(("vllm", name) for name in COMMANDS["vllm"].commands)]


@pytest.mark.parametrize("command", NAMES, ids=" ".join)
def test_help_is_as_narrow_as_columns_says(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    assert main([*command, "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 5
    assert max(map(len, lines)) <= 60


@pytest.mark.parametrize("width", [60, 80, 120])
def test_tables_of_an_evaluation_lose_no_number(width, capsys, monkeypatch):
    """Where they are too wide, some columns go into a table below."""
    monkeypatch.setenv("COLUMNS", str(width))
    scores = {
        task: 0.801 + 0.01 * i for i, task in enumerate(("existence", "perception", "science", "diagram", "a", "b"))
    }
    rows = [
        {"task": task, "pruner": pruner, "keep": 0.1, "tokens": 26.0, "score": score, "ci_low": 0.79, "ci_high": 1.0}
        | dict.fromkeys(("seconds_vision", "seconds_total"), score)
        for pruner in ("random", "ensemble(norm,divprune)")
        for task, score in [*scores.items(), ("mean", 0.866)]
    ]
    console().print(table(rows))
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text or width < 90  # headings alone may be cut
    for score in (*scores.values(), 0.866):
        assert text.count(f" {100 * score:.1f}") == 2
    assert text.count("79-100") == 2 * 7
    assert text.count("Score, % right") == 1


@pytest.mark.parametrize("width", [60, 80])
def test_tables_of_a_benchmark_lose_no_column(width, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    result = json.loads((ROOT / "experiments/gpu/results/h200_bench-llava-1.5-7b.json").read_text(encoding="utf-8"))
    show(result)
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    for name in ("kept", "vision", "prefill", "a token", "whole", "quartiles", "added", "peak GB", "decode"):
        assert name in text, name
