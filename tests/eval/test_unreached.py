"""Where one pruner cannot reach one budget, that cell says why and the rest goes on."""

from __future__ import annotations

import pytest

from eval_cases import Letters
from gripvlm.cli import main
from gripvlm.errors import BudgetError
from gripvlm.eval import evaluate, read_results, runner
from gripvlm.report import report
from tiny_lab import tiny_lab

PRUNERS, KEEPS = ["norm", "fastv:layer=1"], [0.75, 0.1]
WHY = "visual tokens on average over 2 layers is less than pruner 'fastv' can reach"


@pytest.fixture
def lab():
    return tiny_lab()


def settings_of(result):
    return {(row["pruner"], row["keep"]) for row in result["rows"]}


REST = {("full", 1.0), ("norm", 0.75), ("norm", 0.1), ("fastv:layer=1", 0.75)}


def test_eval_notes_the_cell_and_measures_the_rest(lab, tmp_path, capsys):
    out = tmp_path / "r.json"
    result = evaluate(*lab, [Letters()], PRUNERS, KEEPS, out=out, progress=True)
    assert settings_of(result) == REST
    (left,) = result["unreached"]
    assert (left["pruner"], left["keep"]) == ("fastv:layer=1", 0.1)
    assert WHY in left["why"]
    assert "keep=26" not in left["why"]  # nobody typed that
    assert f"not measured: fastv:layer=1 at 10%: 26 of 256 {WHY}" in " ".join(capsys.readouterr().err.split())
    assert read_results(out).unreached == result["unreached"]
    assert evaluate(*lab, [Letters()], PRUNERS, KEEPS, out=out)["unreached"] == result["unreached"]
    page = report([out], tmp_path / "page", pictures=False).with_name("report.md").read_text(encoding="utf-8")
    assert "fastv:layer=1 at 10%: 26 of 256" in page


def test_an_image_that_is_too_small_comes_late(lab, tmp_path, monkeypatch):
    """The first batches have rows; later the variant fails, and what it had said is no row of the results."""
    whole, calls = runner.answer, []

    def answer(*args, **options):
        if args[4:5] == (0.1,):
            calls.append(args)
            if len(calls) == 2:
                raise BudgetError("keep=26, but image 0 of sample 0 has only 9 visual tokens")
        return whole(*args, **options)

    monkeypatch.setattr(runner, "answer", answer)
    out = tmp_path / "r.json"
    result = evaluate(*lab, [Letters()], ["norm"], [0.5, 0.1], out=out, batch_size=2)
    assert settings_of(result) == {("full", 1.0), ("norm", 0.5)}
    assert len(calls) == 2  # not asked again
    assert "only 9 visual tokens" in read_results(out).unreached[0]["why"]


def test_shards_of_such_a_run(lab, tmp_path):
    out = tmp_path / "r.json"
    for shard in ("1/2", "2/2", None):
        result = evaluate(*lab, [Letters()], PRUNERS, KEEPS, out=out, batch_size=2, shard=shard)
    assert settings_of(result) == REST
    assert len(result["unreached"]) == 1
    assert read_results(out).unreached == result["unreached"]


def test_nothing_reached_is_an_error_before_anything_is_written(lab, tmp_path):
    with pytest.raises(BudgetError, match=r"fastv:layer=1 at 10%: 26 of 256 .*; fastv:layer=1 at 3: 3 of 256"):
        evaluate(*lab, [Letters()], ["fastv:layer=1"], [0.1, 3], out=tmp_path / "r.json")
    assert not [*tmp_path.iterdir()]


def test_eval_on_the_command_line(lab, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("gripvlm.models.loading.load_model", lambda *args, **options: lab)
    line = ["eval", "--tasks", "lab/existence", "--limit", "2", "--pruners", "norm,fastv:layer=1", "--keep", "300,75%"]
    assert main(line) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "not measured: norm at 300: keep=300, but image 0 of sample 0 has only 256 visual tokens" in said
