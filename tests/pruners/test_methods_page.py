"""The examples of docs/methods.md run; that its table is up to date, tests/test_experiments.py says."""

from __future__ import annotations

import re

import pytest

import gripvlm
from places import ROOT
from tiny_families import TINY, build, make

PAGE = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


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
