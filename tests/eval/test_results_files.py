"""Reading results back: the published schema, and every way in which a file can be wrong."""

from __future__ import annotations

import gzip
import json

import pytest

from gripvlm.cli import main
from gripvlm.eval import ResultsError, read_results, samples_path
from gripvlm.eval.results import check_result
from places import ROOT
from tiny_results import made_up

COMMITTED = [
    ROOT / "experiments/ci_slice/results/ci-slice.json",
    ROOT / "experiments/lab_check/results/reader_with_dropping.json",
    ROOT / "experiments/lab_check/results/reader_without_dropping.json",
]


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return made_up(tmp_path_factory.mktemp("good") / "r.json", pictures=5)


@pytest.fixture
def copy(good, tmp_path):
    """A results file and its answers, to be damaged."""
    for old in (good, samples_path(good)):
        (tmp_path / old.name).write_bytes(old.read_bytes())
    return tmp_path / good.name


@pytest.mark.parametrize("file", COMMITTED, ids=lambda file: file.stem)
def test_what_is_committed_follows_the_schema(file):
    content = json.loads(file.read_text())
    assert check_result(content, file.name) is content


def test_answers_are_read_packed_or_not(good, copy):
    plain = read_results(good)
    assert len(plain.records) == 2 * 13 * 10
    file = samples_path(copy)
    with gzip.open(file.with_name(file.name + ".gz"), "wb") as packed:
        packed.write(file.read_bytes())
    file.unlink()
    assert read_results(copy).records == plain.records


def test_missing_answers_are_said(copy):
    samples_path(copy).unlink()
    result = read_results(copy)
    assert (result.records, result.missing) == (None, samples_path(copy))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_a_file_that_is_cut_off_is_said_and_left(copy, share, capsys):
    content = copy.read_bytes()
    copy.write_bytes(content[: int(share * len(content))])
    left = copy.read_bytes()
    with pytest.raises(ResultsError, match=r"r.json is cut off or no JSON.*run its evaluation again"):
        read_results(copy)
    assert main(["report", str(copy), "--out", str(copy.parent / "page")]) == 2
    assert "r.json is" in capsys.readouterr().err.replace("\n", " ")
    assert copy.read_bytes() == left
    assert not (copy.parent / "page").exists()


def test_packed_answers_that_are_cut_off_are_said(copy):
    file = samples_path(copy)
    whole = gzip.compress(file.read_bytes())
    file.unlink()
    file.with_name(file.name + ".gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ResultsError, match=r"samples.jsonl.gz is cut off or damaged"):
        read_results(copy)


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda c: c.update(schema="gripvlm.evaluate/2"),
            r"written by a newer gripvlm \(schema gripvlm.evaluate/2.*upg",
        ),
        (lambda c: c.update(schema="other/1"), "is no result of an evaluation"),
        (lambda c: c.update(schema="gripvlm.evaluate/x"), "is it damaged"),
        (
            lambda c: c["rows"].append(c["rows"][3]),
            r"holds a row twice in 'rows': task lab/reading, pruner random:seed=0",
        ),
        (lambda c: c["means"].append(c["means"][0]), "holds a row twice in 'means'"),
        (lambda c: c["rows"][2].pop("n"), r"rows\[2\]: 'n' is a required property"),
        (lambda c: c["rows"][2].update(score=float("nan")), r"rows\[2\].score: nan is not of type 'number'"),
        (lambda c: c["rows"][2].update(n=True), r"rows\[2\].n: True is not of type 'integer'"),
        (lambda c: c["header"].update(batch_size=0), "header.batch_size: 0 is less than the minimum of 1"),
        (lambda c: c["rows"][2].update(keep=0), r"rows\[2\].keep: 0 is less than or equal to the minimum of 0"),
        (lambda c: c["rows"][2].update(keep="64"), r"rows\[2\].keep: '64' does not match"),
        (lambda c: c.update(rows=[]), "rows: "),
        (lambda c: c["rows"][2].update(score=0.123), r"score 0\.\d+, but its row says 0.123000"),
        (lambda c: c["rows"].pop(), r"there are answers without a row, such as"),
    ],
)
def test_what_is_wrong_is_named(copy, change, says):
    edit(copy, change)
    with pytest.raises(ResultsError, match=says):
        read_results(copy)


def test_answers_that_lack_or_contradict_are_named(copy):
    file = samples_path(copy)
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:-1]))
    with pytest.raises(ResultsError, match=r"there are 9 of the 10 answers of lab/text, mine, keep 0.025"):
        read_results(copy)
    file.write_text("".join([*lines, lines[5]]))  # a killed run may write one twice
    assert len(read_results(copy).records) == len(lines) - 1
    other = json.loads(lines[5]) | {"prediction": "another"}
    file.write_text("".join([*lines, json.dumps(other) + "\n"]))
    with pytest.raises(ResultsError, match="two answers that differ to one question"):
        read_results(copy)
    file.write_text("".join([*lines[:9], lines[9][:30] + "\n", *lines[10:]]))
    with pytest.raises(ResultsError, match=r"line 10 of .* is cut off or damaged"):
        read_results(copy)
