"""Every row of docs/bad-input.md: what `runs/bad_input.py` tries comes back as it should."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.transformers

ROOT = Path(__file__).resolve().parents[1]
_spec = importlib.util.spec_from_file_location("bad_input", ROOT / "runs" / "bad_input.py")
bad_input = importlib.util.module_from_spec(_spec)
sys.modules["bad_input"] = bad_input  # dataclasses look there
_spec.loader.exec_module(bad_input)


@pytest.mark.parametrize("case", bad_input.CASES, ids=lambda case: f"{case.wrong}: {case.typed}")
def test_what_came_back(case):
    assert re.search(case.says, bad_input.outcome(case), re.S)


def test_the_page_has_every_row():
    page = (ROOT / "docs" / "bad-input.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| ")][1:]
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows] == [case.wrong for case in bad_input.CASES]
