"""Pruner x budget: labels, seeds, what is trained, and what `--pruners all` stands for."""

from __future__ import annotations

import dataclasses

import pytest

from eval_cases import Letters
from gripvlm.budget import Budget
from gripvlm.eval.scores import method_of
from gripvlm.eval.variants import NOT_IN_ALL, digest, make_variants, supported_pruners
from gripvlm.pruners import get_pruner, list_pruners
from tiny_families import build
from tiny_models import tiny_llava


def variants(pruners, keeps=(8,), seeds=()):
    return make_variants(pruners, keeps, blind=False, seeds=seeds)


def test_variants_say_every_option_of_a_pruner():
    found = variants([get_pruner("random", seed=4), "full", "grid", "grid"], [8, 8, 0.5])
    assert [(one.label, one.keep) for one in found] == [
        ("full", 1.0),
        ("random:seed=4", 8),
        ("random:seed=4", 0.5),
        ("grid", 8),
        ("grid", 0.5),
    ]
    assert [one.keep_text for one in variants(["grid"], [1, 1.0])] == ["1.0", "1", "1.0"]


def test_seeds_are_given_to_pruners_that_have_one_and_were_given_none():
    found = variants(["random", "random:seed=7", "grid", "oracle", "mmr(random:seed=5)"], seeds=[3, 4])
    assert [(one.label, one.config.get("seed")) for one in found] == [
        ("full", None),
        ("random:seed=3", 3),
        ("random:seed=4", 4),
        ("random:seed=7", 7),
        ("grid", None),
        ("oracle", None),
        ("mmr(random:seed=5)", None),
    ]
    objects = variants([get_pruner("random"), get_pruner("random", seed=7)], seeds=[3, 4])
    assert [one.config.get("seed") for one in objects] == [None, 3, 4, 7]


@pytest.mark.parametrize(
    ("label", "method"),
    [
        ("random:seed=3", "random"),
        ("random", "random"),
        ("x:a=1,seed=3", "x:a=1"),
        ("x:seed=-1,a=1", "x:a=1"),
        ("mmr(random:seed=1)", "mmr(random:seed=1)"),
        ("mmr(random:seed=1):balance=1", "mmr(random:seed=1):balance=1"),
        ("fastv:layer=1", "fastv:layer=1"),
    ],
)
def test_a_method_is_a_label_without_its_own_seed(label, method):
    assert method_of(label) == method


def test_variants_know_whether_they_were_trained():
    assert {one.label: one.trained for one in variants(["grip", "mmr(grip)", "mmr(norm)", "grid"])} == {
        "full": False,
        "grip": True,
        "mmr(grip)": True,
        "mmr(norm)": False,
        "grid": False,
    }


def test_other_accepted_answers_are_other_questions():
    plain = Letters(count=2).samples
    assert digest(plain) == "4ff23bb34f23f27a"
    others = [
        [dataclasses.replace(sample, answers=answers) for sample in plain] for answers in (("a", "b"), ("a", "c"))
    ]
    assert len({digest(plain), *map(digest, others)}) == 3


# --- `--pruners all` ------------------------------------------------------------------------------


def test_every_pruner_is_supported_or_left_out_with_a_reason():
    names, refused = supported_pruners(tiny_llava(), [Budget(0.8)])
    assert {*names, *refused} == {row.name for row in list_pruners()}
    assert not {*names} & {*refused}
    assert {"norm", "divprune", "random", "fastv"} <= {*names}
    assert "was trained for gripvlm's lab model" in refused["grip"]
    assert {*NOT_IN_ALL} <= {*refused}
    assert all(refused.values())


def test_budgets_below_what_the_first_layers_cost_leave_llm_pruners_out():
    names, _ = supported_pruners(tiny_llava(), [Budget(0.9), Budget(0.02)])
    assert {"norm", "fastv"} <= {*names}  # the runner leaves out what is too few, and measures the rest
    names, refused = supported_pruners(tiny_llava(), [Budget(0.01), Budget(0.02)])
    assert "norm" in names
    assert "pass keep=" in refused["fastv"]


def test_what_a_family_cannot_supply_is_left_out():
    names, refused = supported_pruners(build("deepseek_ocr2"), [Budget(0.5)])
    assert "norm" in names
    assert "needs a grid" in refused["grid"]
