"""Pruners by name: specs and their options, what is refused and how, and pruners that other packages bring."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from typing import ClassVar, Literal

import pytest
import torch
from torch import Tensor

import gripvlm
from gripvlm.cli import main
from gripvlm.errors import PrunerError, TrainError
from gripvlm.grip.train.rewards import get_reward
from gripvlm.pruners import ScorePruner, get_pruner, list_pruners, pruner_names, register_pruner
from gripvlm.pruners.baselines.norm import Norm
from gripvlm.pruners.baselines.random import Random
from gripvlm.pruners.input.divprune import DivPrune
from gripvlm.pruners.registry import _sources
from gripvlm.pruners.wrappers.mmr import MMR
from gripvlm.pruners.wrappers.spread import Spread
from gripvlm.types import VisualTokens
from pruner_inputs import image


def test_names_and_specs():
    assert get_pruner("divprune") == DivPrune()
    assert get_pruner("random", seed=3) == get_pruner("random:seed=3") == Random(3)
    assert get_pruner(" random : seed = 4 ") == Random(4)
    assert get_pruner("random:seed=3", seed=9) == Random(9)
    made = Random(1)
    assert get_pruner(made) is made


def test_wrappers_on_the_command_line():
    assert get_pruner("mmr(norm)") == MMR(Norm()) == get_pruner("mmr:inner=norm")
    assert get_pruner("mmr( random:seed=3 ):balance=0.7") == MMR(Random(3), 0.7)
    assert get_pruner("spread(mmr(norm):balance=1.0):floor=0.5") == Spread(MMR(Norm(), 1.0), 0.5)
    assert get_pruner("ensemble(random:seed=1,norm,divprune):weights=(1,2,3)").weights == (1, 2, 3)
    assert get_pruner("mmr(cdpruner)").needs == {"features", "question"}
    assert get_pruner("ensemble(grid,random)").needs == {"grid", "key"}


def test_the_list_says_what_each_needs():
    rows = {row.name: row for row in list_pruners()}
    assert sorted(rows) == pruner_names()
    assert rows["grid"].needs == ("grid",)
    assert rows["divprune"].needs == ("features",)
    assert rows["divprune"].stage == "input"
    assert "2503.02175" in rows["divprune"].source


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: get_pruner("divprun"), r"unknown pruner 'divprun': did you mean 'divprune' or "),
        (lambda: get_pruner("zzz"), "unknown pruner 'zzz': known are "),
        (lambda: get_pruner("downsample"), "'downsample' is no pruner: .* Type `gripvlm eval --pruners downsample`"),
        (lambda: get_pruner("mmr(oracle)"), "'oracle' is no pruner: .* Type `gripvlm eval --pruners oracle`"),
        (
            lambda: get_pruner("random:sead=3"),
            r"'random' has no option 'sead': did you mean 'seed'\? its options are seed=0",
        ),
        (lambda: get_pruner("grid:seed=3"), "'grid' has no option 'seed': it has none: use 'grid' alone"),
        (lambda: get_pruner("random:seed=abc"), "takes seed as int, got 'abc': use random:seed=0"),
        (lambda: get_pruner("random:seed=1.5"), "takes seed as int, got 1.5"),
        (lambda: get_pruner("random", seed="3"), "takes seed as int, got '3'"),
        (lambda: get_pruner("random:seed=True"), "takes seed as int, got True"),
        (lambda: get_pruner("random:3"), "use name:option=value"),
        (
            lambda: get_pruner("given"),
            r"'given' needs scores .*Tensor.*: use .*, or get_pruner\('given', scores=\.\.\.\) from Python",
        ),
        (lambda: get_pruner("given:scores=3"), "'given' takes scores as .*, got 3: .* from Python"),
        (lambda: get_pruner("given", scores=[[3.0]]).select(image(1, 1, 1)), "needs a tensor .* got a float"),
        (lambda: get_pruner(DivPrune), r"the class DivPrune: pass an object, DivPrune\(\)"),
        (lambda: get_pruner(64), "got a int, which has no select"),
        (lambda: get_pruner(Random(), seed=1), "set them on the object"),
        (lambda: register_pruner("divprune", Norm), "'divprune' is taken"),
        (lambda: register_pruner("my-pruner", Norm), "must be snake_case"),
    ],
)
def test_what_the_registry_refuses(call, says):
    with pytest.raises(PrunerError, match=says):
        call()


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("mmr(norm", "cannot read"),
        ("mmr()", r"use wrapper\(pruner\)"),
        ("mmr", r"as in mmr\(norm\)"),
        ("mmr(norm)x", "cannot read"),
        ("mmr(nrom)", "unknown pruner 'nrom': did you mean 'norm'"),
        ("mmr(norm,grid)", "takes one pruner, got 2"),
        ("mmr(norm):balance=2", "balance=0.5, in"),
        ("norm(grid)", "'norm' has no option 'inner'"),
        ("ensemble(norm,grid):weights=(1,)", "one above 0 for each of the 2 pruners"),
        ("mmr(fastv)", "'fastv' drops them at llm"),
        ("svd_prune:energy=0", "energy=0.9"),
        ("visionzip:contextual=2", "contextual=0.15625, in"),
        ("vispruner:step=0", "step=8, at least 1"),
        ("prumerge:uniform=2", "uniform=0.75"),
        ("hired:layout=(0,2)", "rows and columns"),
        ("hired:thumbnail=middle", "thumbnail=first or thumbnail=last"),
        ("hiprune:alpha=2", "alpha=0.1"),
        ("mustdrop:keys=3", "keys=0.08"),
        ("vscan_vision:window=0", "window=6"),
        ("dart_input:pivots=0", "pivots=4"),
        ("mustdrop_llm:ratio=0", "ratio=1.1"),
        ("sparsevlm:recycle=2", "recycle=0.3"),
        ("pumer:prune=0,merge=0", "not both 0"),
        ("dart:pivots=0", "pivots=4"),
        ("vscan:first=0.5", "first=1.5"),
        ("ptp:alpha=2", "alpha=0.5"),
    ],
)
def test_options_that_a_method_refuses(spec, says):
    with pytest.raises(PrunerError, match=says):
        get_pruner(spec)


@dataclass(frozen=True)
class Last(ScorePruner):
    """A third party's pruner: prefers the last tokens."""

    name: ClassVar[str] = "last"

    def score(self, tokens: VisualTokens) -> Tensor:
        return torch.arange(tokens.n).float()


@dataclass(frozen=True)
class Tuned(Last):
    """Options of every kind that a spec can hold, and one that it cannot."""

    name: ClassVar[str] = "tuned"

    share: float
    mode: Literal["soft", "hard"] = "soft"
    path: str | None = None
    flag: bool = False
    rows: Sequence[int] = ()


def plain(share: "Missing", **anything):  # noqa: F821, UP037
    """A factory whose annotation cannot be read."""
    return share, anything


@pytest.fixture
def others(monkeypatch):
    monkeypatch.setattr("gripvlm.pruners.registry._registered", {"tuned": Tuned, "plain": plain})


def test_options_are_read_as_their_annotations_say(others):
    assert get_pruner("tuned:share=1") == Tuned(1)
    made = get_pruner("tuned:share=0.5,mode=hard,path=7,flag=True")
    assert made == Tuned(0.5, "hard", "7", True)
    assert get_pruner("tuned", share=1, rows=[1, 2]).rows == [1, 2]
    assert get_pruner("plain:share=x,more=2") == ("x", {"more": 2})
    row = next(row for row in list_pruners() if row.name == "tuned")
    assert [str(option) for option in row.options][:2] == ["share (float)", "mode=soft"]


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("tuned", r"'tuned' needs share \(float\): use tuned:share=\.\.\."),
        ("tuned:share=much", "takes share as float, got 'much': use tuned:share=..., or "),
        ("tuned:share=1,mode=odd", r"takes mode as Literal\['soft', 'hard'\], got 'odd': use tuned:mode=soft"),
        ("tuned:share=1,flag=1", "takes flag as bool, got 1"),
        ("tuned:share=1,rows=3", "takes rows as .*Sequence.*, got 3: use tuned:rows="),
    ],
)
def test_values_that_do_not_fit_are_refused(others, spec, says):
    with pytest.raises(PrunerError, match=says):
        get_pruner(spec)


def test_a_registered_pruner_is_like_any_other(monkeypatch):
    monkeypatch.setattr("gripvlm.pruners.registry._registered", {})
    gripvlm.register_pruner("last", Last)
    gripvlm.register_pruner("last_by_path", f"{__name__}:Last")
    assert "last" in pruner_names()
    assert get_pruner("last").select(image(3, 3, 2)).indices.tolist() == [7, 8]
    assert type(get_pruner("last_by_path")).__name__ == "Last"


def test_entry_points_are_found_but_cannot_shadow_built_ins(monkeypatch):
    from importlib.metadata import EntryPoint

    points = [EntryPoint(name, f"{__name__}:Last", "gripvlm.pruners") for name in ("last", "divprune")]
    monkeypatch.setattr("gripvlm.pruners.registry.entry_points", lambda group: points)
    assert type(get_pruner("last")).__name__ == "Last"
    assert get_pruner("divprune") == DivPrune()
    assert _sources()["last"] == f"{__name__}:Last"


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


def test_the_list_is_whole_with_a_line_for_each_that_fails(broken, monkeypatch, capsys):
    monkeypatch.setattr("gripvlm.pruners.registry._registered", {})  # what other tests registered
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
