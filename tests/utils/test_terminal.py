"""How wide text is printed."""

from __future__ import annotations

import subprocess
import sys

import pytest

from gripvlm.utils.terminal import columns, filled


@pytest.mark.parametrize(("said", "wanted"), [("60", 60), ("132", 132), ("", 80), ("0", 80), ("wide", 80)])
def test_piped_output_obeys_columns(monkeypatch, capsys, said, wanted):
    monkeypatch.setenv("COLUMNS", said)
    assert columns() == wanted


def test_a_paragraph_is_as_wide_and_long_words_stay_whole(monkeypatch):
    monkeypatch.setenv("COLUMNS", "50")
    path = "/".join(["folder"] * 12)
    lines = filled(f"some words before {path} and some words that come after it", indent="  ").splitlines()
    assert f"  {path}" in lines
    assert max(len(line) for line in lines if path not in line) <= 50
    assert filled(f"{path} is missing", start="Error: ").startswith(f"Error: {path}\n")


@pytest.mark.parametrize("wanted", [60, 100])
def test_a_command_that_is_piped_obeys_columns(monkeypatch, wanted):
    monkeypatch.setenv("COLUMNS", str(wanted))
    code = "from gripvlm.cli import main; raise SystemExit(main(['ask', '-i', 'x.png', '-q', ' ']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert wanted - 30 < max(map(len, done.stderr.splitlines())) <= wanted
