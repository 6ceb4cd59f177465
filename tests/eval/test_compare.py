"""`gripvlm compare`: a change that costs accuracy or speed is seen, and nothing else is."""

from __future__ import annotations

import json

import pytest

from gripvlm.cli import main
from gripvlm.eval import ResultsError, compare, read_results, samples_path
from tiny_results import made_up


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    return made_up(tmp_path_factory.mktemp("old") / "old.json", pictures=20, keeps=(0.1,))


def changed(old, folder, change):
    """A copy of the run whose records and rows agree after `change(record)`."""
    new = folder / "new.json"
    content = json.loads(old.read_text())
    lines = [json.loads(line) for line in samples_path(old).read_text().splitlines()]
    for record in lines[1:]:
        change(record)
    for row in content["rows"]:
        mine = [r["score"] for r in lines[1:] if (r["task"], r["pruner"]) == (row["task"], row["pruner"])]
        row["score"] = sum(mine) / len(mine)
    content["samples"] = samples_path(new).name
    new.write_text(json.dumps(content))
    samples_path(new).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return new


def lose(count):
    """`mine` gets so many right answers wrong."""
    left = [count]

    def change(record):
        if record["pruner"] == "mine" and record["score"] == 1.0 and left[0]:
            record.update(score=0.0, prediction="other")
            left[0] -= 1

    return change


def test_the_same_run_passes(old, capsys):
    assert main(["compare", str(old), str(old)]) == 0
    text = capsys.readouterr().out
    assert "mine at 0.1" in text
    assert "no regression" in text


def test_one_lost_answer_is_a_regression_unless_it_is_tolerated(old, tmp_path, capsys):
    new = changed(old, tmp_path, lose(1))  # one of 40 in one of two tasks: 1.25 points of the mean
    assert main(["compare", str(old), str(new)]) == 1
    text = " ".join(capsys.readouterr().out.split())
    assert "REGRESSION: mine at 0.1 lost 1.25 points (tolerance 0): lab/reading" in text
    assert "-1 +0" in text
    assert "1 regression" in text
    assert main(["compare", str(old), str(new), "--tolerance", "1"]) == 1
    assert main(["compare", str(old), str(new), "--tolerance", "1.3"]) == 0
    assert main(["compare", str(new), str(old)]) == 0  # the other way round it is a gain


def test_a_loss_that_another_gain_hides_is_counted(old, tmp_path):
    def swap(record, seen=set()):  # noqa: B006  one set a test
        if (
            record["pruner"] == "mine"
            and record["task"] == "lab/text"
            and record["score"] not in seen
            and len(seen) < 2
        ):
            seen.add(record["score"])
            record.update(score=1 - record["score"], prediction="other")

    verdict = compare(read_results(old), read_results(changed(old, tmp_path, swap)))
    assert verdict.regressions == ()
    assert any("-1 +1" in line for line in verdict.lines)


def test_slower_is_judged_against_the_full_model_of_the_same_run(old, tmp_path):
    def slow(factor, only=None):
        def change(record):
            if only is None or record["pruner"] == only:
                record["seconds"] = {name: factor * value for name, value in record["seconds"].items()}

        return change

    machine = compare(read_results(old), read_results(changed(old, tmp_path, slow(7))))
    assert machine.regressions == ()
    method = read_results(changed(old, tmp_path, slow(1.6, "mine")))
    verdict = compare(read_results(old), method)
    assert list(verdict.regressions) == [
        "REGRESSION: mine at 0.1 takes 0.88 of the full model's time, was 0.55 (tolerance: 1.5 times)"
    ]
    assert compare(read_results(old), method, slower=1.7).regressions == ()


def test_what_does_not_compare_is_an_error_not_a_pass(old, tmp_path, capsys):
    other = made_up(tmp_path / "other.json", pictures=20, keeps=(0.1,), tasks=["lab/reading (7, 1)"])
    assert main(["compare", str(old), str(other)]) == 2
    assert "asked different questions (tasks:" in " ".join(capsys.readouterr().err.split())
    for change, says in (
        ({"shard": "1/2"}, "asked different questions (shard: none then, 1/2 now)"),
        ({"model": "n"}, "are of different models (model: m then, n now)"),
        ({"weights": "other"}, "(weights: abc then, other now)"),
    ):
        other = made_up(tmp_path / "other.json", pictures=20, keeps=(0.1,), **change)
        assert main(["compare", str(old), str(other)]) == 2
        assert says in " ".join(capsys.readouterr().err.split())
    fewer = made_up(tmp_path / "fewer.json", arms=(("grid", 0.6),), pictures=20, keeps=(0.1,))
    with pytest.raises(ResultsError, match=r"has no random:seed=0 at 0.1, .*, mine at 0.1, which"):
        compare(read_results(old), read_results(fewer))
    assert compare(read_results(fewer), read_results(old)).regressions == ()  # more settings are fine
    bare = made_up(tmp_path / "bare.json", answers=False)
    with pytest.raises(ResultsError, match=r"the answers of .* are not there"):
        compare(read_results(old), read_results(bare))


def test_a_whole_run_and_its_shard_do_not_compare(tmp_path, capsys):
    """Their headers name the same questions, but the shard has answers to some of them only."""
    whole, part = tmp_path / "whole.json", tmp_path / "part.json"
    made_up(whole, pictures=20, keeps=(0.1,))
    made_up(part, pictures=10, keeps=(0.1,), shard="1/2")
    for files in ((whole, part), (part, whole)):
        assert main(["compare", *map(str, files)]) == 2
        assert "asked different questions (shard: " in " ".join(capsys.readouterr().err.split())
    assert main(["compare", str(part), str(part)]) == 0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"batch_size": 9}, "batch_size: 4 then, 9 now"),
        ({"dtype": "bfloat16", "weights": "rounded"}, "dtype: float32 then, bfloat16 now"),
        ({"attention": "eager"}, "attention: sdpa then, eager now"),
        (
            {"device": "NVIDIA H100"},
            "machine: cpu (an abacus, None threads) then, NVIDIA H100 (an abacus, None threads) now",
        ),
        (
            {"hardware": {"processor": "a slide rule", "threads": 7}},
            "machine: cpu (an abacus, None threads) then, cpu (a slide rule, 7 threads) now",
        ),
        (
            {"shards": [{"device": name, "hardware": {"processor": "an abacus"}} for name in ("cpu", "mps")]},
            "machine: cpu (an abacus, None threads) then, cpu (an abacus, None threads) and mps (an abacus, None "
            "threads) now",
        ),
    ],
)
def test_times_of_other_settings_or_machines_are_not_judged(old, tmp_path, change, says, capsys):
    new = made_up(tmp_path / "new.json", pictures=20, keeps=(0.1,), **change)

    def slow(record):
        if record["pruner"] == "mine":
            record["seconds"] = {name: 9 * value for name, value in record["seconds"].items()}

    new = changed(new, tmp_path, slow)
    assert main(["compare", str(old), str(new)]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert f"WARNING: speed is not judged, since times of other settings or machines do not compare ({says})" in text
    assert "no regression in scores; speed not judged" in text
    assert main(["compare", str(old), str(changed(new, tmp_path, lose(1)))]) == 1


def test_a_pruner_with_other_options_is_said(old, tmp_path, capsys):
    new = changed(old, tmp_path, lambda record: None)
    content = json.loads(new.read_text())
    for row in content["rows"]:
        if row["pruner"] == "mine":
            row["pruner_config"]["sharpness"] = 2
    new.write_text(json.dumps(content))
    assert main(["compare", str(old), str(new)]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "WARNING: mine is configured otherwise (sharpness: " in text
    assert text.count("WARNING") == 1
