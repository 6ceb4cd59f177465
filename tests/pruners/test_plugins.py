"""Pruners that other packages bring: one that fails is one line of the list, and nothing else fails with it."""

from __future__ import annotations

from importlib.metadata import EntryPoint

import pytest

from gripvlm.cli import main
from gripvlm.errors import PrunerError, TrainError
from gripvlm.grip.train.rewards import get_reward
from gripvlm.pruners import get_pruner, list_pruners, pruner_names

BROKEN = {
    "raises": "raise RuntimeError('no\\nlicence')",
    "exits": "raise SystemExit(3)",
    "quits": "import sys; sys.exit('bye')",
    "asserts": "assert False",
    "lacks": "import a_module_that_is_not_there",
    "unreadable": "def (",
    "empty": "",
    "odd": "class Mine:\n    name = 'odd'\n    needs = property(lambda self: 1 / 0)",
}


@pytest.fixture
def broken(tmp_path, monkeypatch):
    """One package for each way to fail, as if they were installed."""
    for name, code in BROKEN.items():
        (tmp_path / f"grip_plugin_{name}.py").write_text(code)
    points = [EntryPoint(name, f"grip_plugin_{name}:Mine", "gripvlm.pruners") for name in BROKEN]
    points.append(EntryPoint("no_colon", "grip_plugin_empty", "gripvlm.pruners"))
    points.append(EntryPoint("fine", "gripvlm.pruners.baselines.norm:Norm", "gripvlm.pruners"))
    monkeypatch.syspath_prepend(tmp_path)
    for reader in ("gripvlm.pruners.registry", "gripvlm.cli.listing"):
        monkeypatch.setattr(f"{reader}.entry_points", lambda group: points)


def test_the_list_is_whole_with_a_line_for_each_that_fails(broken, capsys):
    before = [name for name in pruner_names() if name not in {*BROKEN, "no_colon", "fine"}]
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    heads = {line.split()[0].rstrip(":") for line in out.splitlines() if line.strip()}
    assert heads >= {*before, "fine"}
    text = " ".join(out.split())
    for name, said in {
        "raises": "RuntimeError: no licence",
        "exits": "SystemExit: 3",
        "quits": "SystemExit: bye",
        "lacks": "ModuleNotFoundError",
        "unreadable": "SyntaxError",
        "empty": "AttributeError",
        "odd": "ZeroDivisionError",
    }.items():
        assert f"pruner '{name}' cannot be loaded, as grip_plugin_{name}:Mine fails ({said}" in text
    rows = {row.name: row for row in list_pruners()}
    assert {name for name, row in rows.items() if row.fault} == {*BROKEN, "no_colon"}
    assert rows["fine"].stage == rows["norm"].stage


@pytest.mark.parametrize("name", [*(name for name in BROKEN if name != "odd"), "no_colon"])
def test_asked_for_by_name_it_says_so(broken, name):
    with pytest.raises(PrunerError, match=f"pruner '{name}' cannot be loaded.*fix or uninstall the package"):
        get_pruner(name)


def test_others_are_not_touched(broken):
    assert get_pruner("fine") == get_pruner("norm")


@pytest.mark.parametrize("name", ["raises", "exits", "quits", "unreadable", "empty"])
def test_a_reward_that_fails_at_import_says_so(broken, name):
    with pytest.raises(TrainError, match=f"no reward 'grip_plugin_{name}:reward'"):
        get_reward(f"grip_plugin_{name}:reward")
