"""The language of names with options: what belongs together, and what a value's text means."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from gripvlm.utils.spec import did_you_mean, join_options, options_of, parse_spec, split_specs


@pytest.mark.parametrize(
    ("text", "name", "inner", "argument", "options"),
    [
        ("norm", "norm", None, "", []),
        (" random : seed = 3 ", "random", None, "", [("seed", "3")]),
        ("mmr(norm):balance=0.5", "mmr", "norm", "", [("balance", "0.5")]),
        ("mmr(random:seed=1,k=2)", "mmr", "random:seed=1,k=2", "", []),
        ("ensemble(a,b):weights=(1,2),x=3", "ensemble", "a,b", "", [("weights", "(1,2)"), ("x", "3")]),
        ("mmr(norm", "mmr", "", "", []),
        ("random:3", "random", None, "3", []),
        ("x:a=1,2,b=3", "x", None, "", [("a", "1,2"), ("b", "3")]),  # a comma without `word=` belongs to the value
        ("x:path=C:/data", "x", None, "", [("path", "C:/data")]),
        ("x:a=(1,b=2", "x", None, "", [("a", "(1"), ("b", "2")]),  # brackets that do not pair are plain signs
    ],
)
def test_pieces(text, name, inner, argument, options):
    assert parse_spec(text) == (name, inner, argument, options)


def test_an_argument_may_look_like_an_option():
    spec = parse_spec("jsonl:run=3/a, b.jsonl,metric=vqa", takes_argument=True)
    assert (spec.argument, spec.options) == ("run=3/a, b.jsonl", [("metric", "vqa")])


def test_lists():
    assert split_specs("grid, random:seed=3,x=1,mmr(norm,grid),") == ["grid", "random:seed=3,x=1", "mmr(norm,grid)"]
    other = object()
    assert join_options(["a:x=1", " y=2", "b", "z=3", other, "c"]) == ["a:x=1,y=2", "b", "z=3", other, "c"]


@dataclass
class Made:
    """Something with options."""

    share: float
    name: str | None = None
    at: tuple[int, ...] = (1,)
    path: Path = Path()


def test_values_are_read_as_the_annotations_say():
    share, name, at, path = options_of(Made)
    assert (str(share), str(name)) == ("share (float)", "name=None")
    assert [option.required for option in (share, name, at, path)] == [True, False, False, False]
    assert (share.read("1"), name.read("7"), name.read("None"), at.read("(1,2)")) == (1, "7", None, (1, 2))
    assert (path.read("7"), share.read("much")) == ("7", "much")
    assert options_of(len) == ()


def test_names_that_are_near():
    assert did_you_mean("nrm", ["norm", "grid"]) == "did you mean 'norm'? "
    assert did_you_mean("zzz", ["norm", "grid"]) == ""
