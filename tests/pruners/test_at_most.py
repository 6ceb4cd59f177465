"""At most so many: a small image is kept whole, a large one exactly, by every pruner and through every file."""

from __future__ import annotations

import json
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

import gripvlm
from eval_cases import Letters
from gripvlm import Budget
from gripvlm.bench.runner import settings_of
from gripvlm.cli import main
from gripvlm.errors import BudgetError
from gripvlm.eval import evaluate
from gripvlm.eval.results import ResultsError, check_result, read_results
from gripvlm.eval.scores import scores_of
from gripvlm.eval.variants import make_variants
from gripvlm.pruners import LLMPruner, get_pruner
from gripvlm.report import report, table
from matrix import SPECS, case, pairs, pruner_of
from tiny_families import TINY, build, make
from tiny_lab import tiny_lab

FAMILY = "qwen2_vl"  # its images differ: 12 tokens; 9 and 12


@pytest.mark.parametrize(
    ("keep", "n", "count"),
    [
        ("<=64", 9, 9),
        ("<=64", 64, 64),
        ("<=64", 576, 64),
        ("<= 64", 65, 64),
        ("≤64", 9, 9),
        ("<=10%", 576, 57),  # 57.6, which 10% rounds to 58
        ("<=0.1", 576, 57),
        ("≤ 10 %", 30, 3),
        ("<=0.29", 100, 29),  # exactly 29, which binary floats put below
        ("<=10%", 9, 1),  # never nothing
        ("<=1.0", 9, 9),
        ("<=1", 9, 1),
        (Budget(64, at_most=True), 9, 9),
        (Budget(0.1, at_most=True), 576, 57),
        (Budget(np.int64(7), at_most=True), 9, 7),
        ("64", 576, 64),
        ("10%", 576, 58),
    ],
)
def test_count(keep, n, count):
    assert Budget.of(keep).count(n) == count


@given(st.integers(1, 1000), st.integers(1, 5000))
def test_at_most_is_never_more(thousandths, n):
    share = Budget(thousandths / 1000, at_most=True)
    assert share.count(n) == max(1, thousandths * n // 1000)
    assert Fraction(share.count(n)) <= max(Fraction(1), Fraction(thousandths, 1000) * n)
    assert Budget(thousandths, at_most=True).count(n) == min(thousandths, n)


@pytest.mark.parametrize("text", ["<=", "<=0", "<=-3", "<=1.5", "<=150%", "<=nan", "<64", "=<64", "<=<=64", ">=64"])
def test_what_is_none(text):
    with pytest.raises(BudgetError, match="is no budget"):
        Budget.of(text)


def test_a_number_in_place_of_true_is_told_what_to_type():
    with pytest.raises(BudgetError, match=r"pass Budget\(64, at_most=True\), or keep='<=64'"):
        Budget(64, at_most=64)


def test_one_value_whatever_it_was_typed_as():
    assert Budget("<=64") == Budget(64, at_most=True) == Budget("≤64") != Budget(64)
    assert Budget("<=10%") == Budget(0.1, at_most=True) != Budget(0.1)
    assert len({Budget(1), Budget(1.0), Budget("<=1"), Budget("<=1.0")}) == 4  # 1 == 1.0, but they keep other counts
    for budget in (Budget(64), Budget(0.125), Budget("<=64"), Budget("<=12.5%"), Budget("<=1e-5")):
        assert Budget.of(json.loads(json.dumps(budget.plain))) == budget
        assert Budget(str(budget)) == budget == Budget(budget.short)
    assert (Budget("<=10%").short, Budget("<=64").words) == ("<=10%", "at most 64 tokens")
    assert (Budget(0.125).short, Budget(0.125).words) == ("12.5%", "12.5 %")


def test_a_count_that_one_image_lacks_says_how_to_keep_all_of_it():
    with pytest.raises(BudgetError, match=r"has only 9 visual tokens: pass keep='<=64' to keep all of images that"):
        Budget(64).count(9)


SERVED = [spec for spec, name in [*pairs("input"), *pairs("llm")] if name == FAMILY]


@pytest.mark.parametrize("spec", SERVED)
def test_every_pruner_keeps_what_the_counts_say(spec):
    here, pruner = case(FAMILY), pruner_of(spec, FAMILY)
    options = {"encoded": here.encoded}
    with torch.no_grad(), gripvlm.pruned_run(here.model, here.inputs, pruner, "<=10", **options) as (given_, record):
        logits = here.model(**given_).logits
    counts = [[10], [9, 10]]
    with torch.no_grad(), gripvlm.pruned_run(here.model, here.inputs, pruner, counts, **options) as (given_, same):
        assert torch.equal(logits, here.model(**given_).logits)
    for mine, theirs, sample in zip(record.selections, same.selections, counts, strict=True):
        assert [one.indices.tolist() for one in mine] == [one.indices.tolist() for one in theirs]
        assert sum(one.paid for one in mine) == pytest.approx(sum(sample), abs=0.5 * len(sample))
    with torch.no_grad(), gripvlm.pruned_run(here.model, here.inputs, pruner, "<=64", **options) as (given_, record):
        assert record.kept == record.total == 33
        assert torch.equal(here.model(**given_).logits[:, -5:], here.plain[:, -5:])


def test_the_family_has_every_kind_of_pruner():
    assert {get_pruner(s).stage for s in SERVED if s in ("norm", "fastv")} == {"input", "llm"}
    assert any(isinstance(pruner_of(s, FAMILY), LLMPruner) for s in SERVED)
    assert {"mmr(norm)", "split(norm)", "ensemble(norm,divprune)", "spread(norm)"} <= {*SERVED} <= {*SPECS}


def test_one_budget_a_sample_or_an_image():
    here = case(FAMILY)
    for keep, kept in (
        (["<=64", "<=5"], [[12], [5, 5]]),
        ([5, ["<=64", "<=50%"]], [[5], [9, 6]]),
        (["50%", "<=10"], [[6], [9, 10]]),
    ):
        gripvlm.prune_inputs(here.model, here.inputs, "norm", keep)
        with gripvlm.prune(here.model, "norm", keep=keep) as record:
            here.model.generate(**here.inputs, max_new_tokens=1, do_sample=False)
        assert [[one.k for one in mine] for mine in record.selections] == kept


def test_merging_inside_the_tower():
    model, batch = build("llava"), make(TINY["llava"], [1, 2], [7, 9])
    for keep, kept in (("<=64", 16), ("<=12", 12), ("<=80%", 12)):
        logits = []
        for asked in (keep, kept):
            with torch.no_grad(), gripvlm.pruned_run(model, batch.inputs, "tome", asked) as (given_, record):
                logits.append(model(**given_).logits)
            assert [one.k for mine in record.selections for one in mine] == [kept] * 3
        assert torch.equal(*logits)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A run at most and exactly so many, on 256 tokens an image."""
    out = tmp_path_factory.mktemp("at_most") / "run.json"
    model, processor = tiny_lab()
    keeps = ["<=1000", "<=10%", 0.1, 26]
    result = evaluate(model, processor, [Letters()], ["norm", "grid"], keeps, out=out, batch_size=4)
    return result, out


def test_results_hold_budgets_that_are_read_back(measured):
    result, out = measured
    kept = {row["keep"]: row["tokens"] for row in result["rows"] if row["pruner"] == "norm"}
    assert kept == {"<=1000": 256, "<=0.1": 25, 0.1: 26, 26: 26}
    again = read_results(out)
    assert [row["keep"] for row in again.rows] == [row["keep"] for row in result["rows"]]
    requested = {setting.keep for setting in scores_of([again]).settings if setting.method != "full"}
    assert {type(keep) for keep in requested} == {str, float, int}
    assert requested == {"<=1000", 26, 0.1, "<=0.1"}
    model, processor = tiny_lab()
    keeps = ["<=1000", "≤10%", "10%", 26]
    assert evaluate(model, processor, [Letters()], ["norm", "grid"], keeps, out=out, batch_size=4) == json.loads(
        out.read_text(encoding="utf-8")
    )


def test_tables_and_the_report_say_at_most(measured, tmp_path):
    result, out = measured
    screen = Console(width=200)
    with screen.capture() as shown:
        screen.print(table(result["rows"]))
    assert {"(<=1000)", "(<=10%)", "(10%)", "(26)"} <= {*shown.get().split()}
    text = report([out], tmp_path, pictures=False).with_name("report.md").read_text(encoding="utf-8")
    assert "at most 1000 tokens" in text
    assert "at most 10 %" in text


def test_a_results_file_with_another_text_is_refused(measured):
    result, out = measured
    for wrong in ("<=", "64", "many", ">=3"):
        rows = [row | {"keep": wrong if row["keep"] == 26 else row["keep"]} for row in result["rows"]]
        with pytest.raises(ResultsError, match=r"keep: .* does not match"):
            check_result(json.loads(json.dumps(result | {"rows": rows})), str(out))


def test_arms_and_bench_settings_have_each_budget_once():
    arms = make_variants(["norm"], [64, "64", "<=64", "≤64", 1, 1.0, "100%"], blind=False)
    assert [arm.keep for arm in arms if arm.label == "norm"] == [64, "<=64", 1, 1.0]
    names = [one.name for one in settings_of([("norm", get_pruner("norm"))], [Budget(1), Budget(1.0), Budget("<=1")])]
    assert len({*names}) == len(names)


def test_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("gripvlm.models.loading.load_model", lambda *args, **options: tiny_lab())
    picture = tmp_path / "a.png"
    replace(Letters().samples[0]).images[0].save(picture)
    ask = ["ask", "--image", str(picture), "--question", "what?", "--pruner", "norm", "--max-new-tokens", "2"]
    for keep, said in (("<=1000", "256 of 256"), ("≤10%", "25 of 256"), ("<= 64", "64 of 256")):
        assert main([*ask, "--keep", keep]) == 0
        assert f"{said} visual tokens kept" in capsys.readouterr().out
    assert main([*ask, "--keep", "1000"]) == 2
    assert "pass keep='<=1000' to keep all of images that have fewer" in " ".join(capsys.readouterr().err.split())
    assert main([*ask, "--keep", "<="]) == 2
    assert "'<=' is no budget" in capsys.readouterr().err
