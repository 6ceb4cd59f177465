"""The help of every command fits into the columns that COLUMNS says, also where it is piped."""

from __future__ import annotations

import pytest
from typer.main import get_command

from gripvlm.cli import app, main

COMMANDS = get_command(app).commands
NAMES = [(), *((name,) for name in COMMANDS), *(("vllm", name) for name in COMMANDS["vllm"].commands)]


@pytest.mark.parametrize("command", NAMES, ids=" ".join)
def test_help_is_as_narrow_as_columns_says(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    assert main([*command, "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 5
    assert max(map(len, lines)) <= 60
