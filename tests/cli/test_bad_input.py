"""Every row of docs/bad-input.md: what `runs/bad_input.py` tries comes back as it should."""

from __future__ import annotations

import importlib.util
import re
import sys

import pytest

from places import ROOT

pytestmark = pytest.mark.transformers

_spec = importlib.util.spec_from_file_location("bad_input", ROOT / "runs" / "bad_input.py")
bad_input = importlib.util.module_from_spec(_spec)
sys.modules["bad_input"] = bad_input  # dataclasses look there
_spec.loader.exec_module(bad_input)


PAGE = [row for row in bad_input.PAGE.read_text(encoding="utf-8").splitlines() if row.startswith("| ")][1:]


@pytest.mark.parametrize("case", bad_input.CASES, ids=lambda case: f"{case.wrong}: {case.typed}")
def test_what_came_back(case):
    got = bad_input.outcome(case)
    assert re.search(case.says, got, re.S)
    assert bad_input.line(case, got) in PAGE  # else: python runs/bad_input.py


def test_the_page_has_these_rows_and_no_others():
    assert len(PAGE) == len(bad_input.CASES)
    for row, case in zip(PAGE, bad_input.CASES, strict=True):
        assert row.startswith(f"| {case.wrong} | `{case.typed}` | ")
