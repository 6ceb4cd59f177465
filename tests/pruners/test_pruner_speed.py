"""The timing of pruners alone, on a model and images of a few tokens, and the tables that are made of it."""

from __future__ import annotations

import importlib.util
import json
from types import ModuleType

import pytest

from gripvlm.pruners.registry import _BUILT_IN
from places import ROOT

RUNS = ROOT / "runs"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, RUNS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A run on 18 and 24 tokens; prefills that would take more than no time at all are left out."""
    speed, out = script("pruner_speed"), tmp_path_factory.mktemp("speed") / "speed.json"
    tiny = ["--hidden", "32", "--layers", "24", "--device", "cpu", "--repeats", "2", "--threads", "1"]
    found = {}
    for name, longest in (("all", "inf"), ("first", "0")):
        speed.main([*tiny, "--sizes", "18,24", "--batches", "1,2", "--longest", longest, "--out", str(out)])
        found[name] = json.loads(out.read_text())
    return speed, found


def test_every_pruner_is_timed_at_every_size(measured):
    speed, found = measured
    result = found["all"]
    assert [(cell["n"], cell["batch"]) for cell in result["cells"]] == [(18, 1), (18, 2), (24, 1), (24, 2)]
    for cell in result["cells"]:
        assert {spec.partition("(")[0] for spec in cell["pruners"]} == {*_BUILT_IN} - {*speed.LEFT_OUT}
        prefill = cell["prefill"]["seconds"]
        assert 0 < prefill[1] <= prefill[0] <= prefill[2]
        for row in cell["pruners"].values():
            assert row["keep"] == round(cell["n"] * (1 / 9 if row["stage"] == "input" else 1 / 3))
            assert row["seconds"][1] <= row["seconds"][0] <= row["seconds"][2]
            assert row["ratio"] == pytest.approx([seconds / prefill[0] for seconds in row["seconds"]], rel=2e-3)
    assert {"command", "environment", "model", "repeats", "seed"} <= result.keys()
    assert result["model"]["hidden"] == 32


def test_a_prefill_that_would_take_too_long_is_left_out_with_the_reason(measured):
    _, found = measured
    for cell in found["first"]["cells"]:
        if cell["batch"] == 1:
            assert cell["prefill"]["seconds"]
            continue
        assert cell["prefill"]["seconds"] is None
        assert cell["prefill"]["why"].startswith("batch 1 took ")
        assert {row["ratio"] for row in cell["pruners"].values()} == {None}
        assert all(row["seconds"][0] > 0 for row in cell["pruners"].values())


def test_a_built_in_name_is_found_without_looking_through_all_that_is_installed(monkeypatch):
    """That takes milliseconds, which every `prune_inputs` with a name would pay."""
    from gripvlm.errors import PrunerError
    from gripvlm.pruners import get_pruner, registry

    looked = []
    monkeypatch.setattr(registry, "entry_points", lambda group: looked.append(group) or [])
    assert get_pruner("mmr(norm):balance=0.3").balance == 0.3
    assert not looked
    with pytest.raises(PrunerError, match="unknown pruner 'nrm': did you mean 'norm'"):
        get_pruner("nrm")
    assert looked
