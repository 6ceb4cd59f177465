"""`--pruners all` stands for what can run on this model at these budgets, and says why the rest cannot."""

from __future__ import annotations

from gripvlm.budget import Budget
from gripvlm.eval.everything import LEFT, serving
from gripvlm.pruners import list_pruners
from tiny_families import build
from tiny_models import tiny_llava


def test_every_pruner_is_in_or_left_out_with_a_reason():
    names, left = serving(tiny_llava(), [Budget(0.8)])
    assert {*names, *left} == {row.name for row in list_pruners()}
    assert not {*names} & {*left}
    assert {"norm", "divprune", "random", "fastv"} <= {*names}
    assert "was trained for gripvlm's lab model" in left["grip"]
    assert {*LEFT} <= {*left}
    assert all(left.values())


def test_budgets_below_what_the_first_layers_cost_leave_layer_pruners_out():
    names, left = serving(tiny_llava(), [Budget(0.9), Budget(0.02)])
    assert {"norm", "fastv"} <= {*names}  # the runner leaves out what is too few, and measures the rest
    names, left = serving(tiny_llava(), [Budget(0.01), Budget(0.02)])
    assert "norm" in names
    assert "pass keep=" in left["fastv"]


def test_what_a_family_cannot_supply_is_left_out():
    names, left = serving(build("llava_next"), [Budget(0.5)])
    assert "norm" in names
    assert "needs a grid" in left["grid"]
