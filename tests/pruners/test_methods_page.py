"""docs/methods.md: its table is up to date, and its examples run."""

from __future__ import annotations

import importlib.util
import re

import pytest

import gripvlm
from gripvlm.cli.listing import measured
from gripvlm.pruners import list_pruners
from places import ROOT
from tiny_families import TINY, build, make

PAGE = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def test_the_table_is_up_to_date():
    spec = importlib.util.spec_from_file_location("methods", ROOT / "experiments" / "methods" / "analyze.py")
    analyze = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(analyze)
    assert analyze.filled(PAGE) == PAGE, "run python experiments/methods/analyze.py"
    assert {f"| `{row.name}` |" for row in list_pruners()} <= {
        line[: line.find("|", 2) + 1] for line in PAGE.split("\n")
    }


def test_the_list_of_the_command_line_shows_options_that_there_are():
    for row in list_pruners():
        shown = {re.match(r"\w+", option)[0] for option in measured()["pruners"][row.name]["options"]}
        assert {option.name for option in row.options} - {"inner"} == shown, row.name


@pytest.fixture(scope="module")
def written():
    """The names that the page's examples leave behind, run one after the other."""
    made = {"gripvlm": gripvlm, "model": build("llava"), "inputs": make(TINY["llava"], [1], [7]).inputs}
    made["inputs"] = dict(made["inputs"])
    for code in EXAMPLES:
        exec(code, made)
    return made


def test_the_examples_run(written):
    assert len(EXAMPLES) == 3
    for name, keep, paid in (("Contrast", 8, 8), ("Steady", 12, 12), ("Halves", 8, 8)):
        with gripvlm.prune(written["model"], written[name](), keep=keep) as record:
            written["model"].generate(**written["inputs"], max_new_tokens=1)
        assert record.selections[0][0].paid == paid


def test_the_examples_options_can_be_typed(written, monkeypatch):
    monkeypatch.setattr("gripvlm.pruners.registry._registered", {})
    gripvlm.register_pruner("steady", written["Steady"])
    assert gripvlm.get_pruner("steady:layer=3").layer == 3
