"""Files that strangers made: each ends in one readable line, before anything is taken from the memory for it."""

from __future__ import annotations

import gzip
import json
import os
import random
import resource
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from eval_cases import Letters, run
from gripvlm.cli import main
from gripvlm.errors import GripError
from gripvlm.eval import ResultsError, read_results, samples_path
from gripvlm.eval.scores import scores_of
from gripvlm.grip.scorer import Scorer, ScorerError
from gripvlm.report import report
from gripvlm.tasks import JsonlTask, TaskError
from gripvlm.utils.strict_json import DEEPEST, BadJSON, parse
from tiny_results import made_up
from tiny_train import tiny_scorer, tiny_vlm

# --- JSON -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[" * 100_000, f"is nested more than {DEEPEST} deep"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, f"is nested more than {DEEPEST} deep"),
        ("[" * (DEEPEST + 1) + "]" * (DEEPEST + 1), f"is nested more than {DEEPEST} deep"),
        ("9" * 5000, "holds a number of 5000 digits"),
        (str(10**400), "holds a number of 401 digits"),
        ("1e400", "holds 1e400, a number that is too large"),
        (r'{"a": "\ud800"}', r"holds half of a surrogate pair, \\ud800"),
        (r'{"\udfff": 1}', r"holds half of a surrogate pair, \\udfff"),
        (b'"\xff"', "is no text in UTF-8"),
        ('{"a": 1', "is cut off or no JSON: .* at line 1 column 8"),
        ("{a: 1}", "is cut off or no JSON: Expecting property name .* at line 1 column 2"),
    ],
)
def test_what_is_no_json_for_us_is_said(text, says):
    with pytest.raises(BadJSON, match=says):
        parse(text)


@pytest.mark.parametrize("whole", [json.dumps([{"w": False}, None, -1.5e-07, "\u00e9\n"], indent=1), '"abc"', "true"])
def test_every_beginning_of_a_text_is_refused(whole):
    for length in range(len(whole)):
        with pytest.raises(BadJSON, match=r"^is cut off or no JSON: .* at line \d+ column \d+$"):
            parse(whole[:length])


def test_what_is_json_is_what_json_says():
    whole = {"a": [1, -2.5, None, True, "\U0001f600 é"], "b": {"c": 10**18}, "d": float("inf")}
    assert parse(json.dumps(whole)) == parse(json.dumps(whole, ensure_ascii=False)) == whole
    assert parse("[" * DEEPEST + "]" * DEEPEST) is not None
    assert parse(json.dumps("[" * 1000)) == "[" * 1000


# --- results --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return made_up(tmp_path_factory.mktemp("good") / "r.json", pictures=4)


@pytest.fixture
def copy(good, tmp_path):
    for old in (good, samples_path(good)):
        (tmp_path / old.name).write_bytes(old.read_bytes())
    return tmp_path / good.name


def put(path: Path, place: tuple, value: str) -> None:
    """Writes `value`, raw JSON, at a place of the file."""
    content = json.loads(path.read_text())
    inner = content
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = "HERE"
    path.write_text(json.dumps(content).replace('"HERE"', value))


ROW = ("rows", 2, "score")
IN_RESULTS = [
    (("samples",), '"../x"', r"its samples are '\.\./x': write the name of a file in the same folder"),
    (("samples",), r'"a\u0000b"', "write the name of a file in the same folder"),
    (("extra",), "[" * 50_000 + "]" * 50_000, "is nested more than"),
    (ROW, "7" * 5000, "holds a number of 5000 digits"),
    (ROW, str(10**400), "holds a number of 401 digits"),
    (ROW, "null", r"rows\[2\]\.score: None is not of type 'number'"),
    (("header", "model"), r'"\ud800"', "holds half of a surrogate pair"),
    (("header", "task_specs"), '["lab/reading"]', "task_specs has 1 entries for 2 tasks"),
    (("header", "seed"), "5", "the first line of .* has other options"),
]


@pytest.mark.parametrize(("place", "value", "says"), IN_RESULTS, ids=lambda value: str(value)[:30])
def test_a_strangers_results_end_in_one_line(copy, tmp_path, capsys, place, value, says):
    put(copy, place, value)
    with pytest.raises(ResultsError, match=says):
        read_results(copy)
    assert main(["report", str(copy), "--out", str(tmp_path / "page")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("Error: ")
    assert "Traceback" not in said
    assert not (tmp_path / "page").exists()


def test_a_command_with_one_quote_is_shown_as_it_is(copy, tmp_path):
    put(copy, ("header", "command"), '"gripvlm eval \'x"')
    page = report([copy], tmp_path / "page", pictures=False)
    assert "gripvlm eval 'x" in page.with_name("report.md").read_text()


IN_ANSWERS = [
    ("score", "null", "says that score is null"),
    ("score", "NaN", "says that score is NaN"),
    ("score", str(10**400), "holds a number of 401 digits"),
    ("score", '"1"', 'says that score is "1"'),
    ("prediction", "3", "says that prediction is 3"),
    ("prediction", r'"\udc00"', "holds half of a surrogate pair"),
    ("image_id", "[]", "says that image_id is"),
    ("seconds", '{"vision": 1}', "is no answer .*KeyError"),
    ("seconds", "null", "says that seconds is null"),
    ("kept", "[1]", "is no answer"),
    ("kept", '[{"n": 1000000000000, "grid": null, "mask": "AAAA"}]', "says that kept is"),
    ("kept", '[{"n": 4, "grid": [2, "2"], "mask": "AAAA"}]', "says that kept is"),
    ("kept", '[{"n": 4, "grid": null, "mask": "!"}]', "is no answer"),
    ("n", "[" * 100_000, "is nested more than"),
]


@pytest.mark.parametrize(("name", "value", "says"), IN_ANSWERS, ids=lambda value: str(value)[:30])
def test_a_strangers_answers_end_in_one_line(copy, name, value, says):
    lines = samples_path(copy).read_text().splitlines()
    lines[4] = json.dumps(json.loads(lines[4]) | {name: "HERE"}).replace('"HERE"', value)
    samples_path(copy).write_text("\n".join(lines) + "\n")
    with pytest.raises(ResultsError, match=rf"line 5 of .* is cut off or damaged \(it {says}"):
        read_results(copy)


def test_packed_answers_with_a_flipped_byte_or_without_an_end(copy):
    file = samples_path(copy)
    packed = gzip.compress(file.read_bytes())
    file.unlink()
    target = file.with_name(file.name + ".gz")
    for place in range(10, len(packed), 40):
        target.write_bytes(packed[:place] + bytes([packed[place] ^ 0x20]) + packed[place + 1 :])
        with pytest.raises(ResultsError, match=r"samples\.jsonl"):
            read_results(copy)
    target.write_bytes(gzip.compress(b" " * 2**25))
    with pytest.raises(ResultsError, match="has a line of 16777216 characters or more"):
        read_results(copy)


@pytest.mark.parametrize(
    ("seed", "turns"), [(0, 40), *(pytest.param(seed, 1000, marks=pytest.mark.slow) for seed in (1, 2))]
)
def test_whatever_is_changed_in_results_there_is_no_traceback(copy, good, tmp_path, seed, turns):
    """Random changes: read and reported, or refused in one line."""
    chance, values = random.Random(seed), [None, True, -1, 0, 1e300, 10**200, "", "x", "'", [], {}, [[]], {"a": None}]
    content, lines = json.loads(good.read_text()), samples_path(good).read_text().splitlines()

    def changed(value):
        places = []

        def walk(one):
            for key in one if isinstance(one, dict) else range(len(one)):
                places.append((one, key))
                if isinstance(one[key], (dict, list)):
                    walk(one[key])

        walk(value)
        inner, key = chance.choice(places)
        inner[key] = chance.choice(values)
        return value

    for turn in range(turns):
        mine, answers = json.loads(json.dumps(content)), list(lines)
        if turn % 2:
            mine = changed(mine)
        else:
            number = chance.choice([0, 0, 1, len(lines) // 2])
            answers[number] = json.dumps(changed(json.loads(answers[number])))
        copy.write_text(json.dumps(mine))
        samples_path(copy).write_text("\n".join(answers) + "\n")
        with suppress(GripError):
            scores_of([read_results(copy)])
        if turn % 10 < 2:
            with suppress(GripError):
                report([copy], tmp_path / "page", pictures=turn % 20 == 0)


# --- scorers --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scorer(tmp_path_factory):
    """The two files of a scorer."""
    folder = tmp_path_factory.mktemp("scorer")
    tiny_scorer(tiny_vlm()[0]).save_pretrained(folder)
    return {file.name: file.read_bytes() for file in folder.iterdir()}


IN_SCORER = [
    (("base",), "[1]", "is damaged .TypeError"),
    (("base",), "3", "is damaged .TypeError"),
    (("base", "weights"), '{"a": [1]}', "is damaged .ValueError"),
    (("base", "sketch"), "null", "is damaged .TypeError"),
    (("base", "sketch"), '["a"]', "is damaged .ValueError"),
    (("base", "sketch"), str([1.0] * 31), "base.sketch has 31 numbers, not 32"),
    (("base", "sketch"), str([1.0] * 31 + [10**299]), ""),
    (("scorer", "width"), str(10**9), "does not fit"),
    (("scorer", "width"), str(10**13), "does not fit"),
    (("scorer", "blocks"), str(10**9), "blocks = 1000000000, but there are 1"),
    (("scorer", "features"), str(10**12), "does not fit"),
    (("scorer", "heads"), str(10**9), "heads must divide width"),
    (("scorer", "width"), "null", "sizes are whole numbers"),
    (("scorer", "width"), "16.0", "sizes are whole numbers"),
    (("scorer", "question"), "1", "true or false"),
    (("scorer",), "[]", "is damaged"),
    (("notes",), "[1]", "is damaged .TypeError"),
    (("notes",), "[" * 10_000, "is nested more than"),
    (("notes",), "9" * 5000, "holds a number of 5000 digits"),
    (("format",), "null", "has format None"),
]


@pytest.mark.parametrize(("place", "value", "says"), IN_SCORER, ids=lambda value: str(value)[:30])
def test_a_strangers_scorer_ends_in_one_line_and_takes_no_memory(scorer, tmp_path, place, value, says):
    for name, content in scorer.items():
        (tmp_path / name).write_bytes(content)
    put(tmp_path / "config.json", place, value)
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    if says:
        with pytest.raises(ScorerError, match=says):
            Scorer.from_pretrained(tmp_path)
    else:
        Scorer.from_pretrained(tmp_path)
    assert time.monotonic() - began < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kB


def test_sizes_that_only_one_of_the_weights_has_are_not_believed(scorer, tmp_path):
    for name, content in scorer.items():
        (tmp_path / name).write_bytes(content)
    width = 2**20
    save_file({"enter.1.weight": torch.zeros(width, 1), "blocks.0.x": torch.zeros(1)}, tmp_path / "model.safetensors")
    put(tmp_path / "config.json", ("scorer", "width"), str(width))
    put(tmp_path / "config.json", ("scorer", "features"), "1")
    with pytest.raises(ScorerError, match=r"model\.safetensors does not fit config\.json"):
        Scorer.from_pretrained(tmp_path)


# --- questions ------------------------------------------------------------------------------------

LINE = '{"image": "a.png", "question": "q", "answer": "a"}\n'


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("[" * 100_000 + "]" * 100_000, "is nested more than"),
        ('{"id": ' + "9" * 5000 + "}", "a number of 5000 digits"),
        (r'{"image": "a.png", "question": "\ud800", "answer": "a"}', "half of a surrogate pair"),
        ('{"image": "a.png", "question": "q"', "is cut off"),
    ],
)
def test_a_strangers_questions_end_in_one_line(tmp_path, line, says):
    file = tmp_path / "q.jsonl"
    for text, number in ((line, 1), (LINE + line, 2)):
        file.write_text(text)
        with pytest.raises(TaskError, match=rf"q\.jsonl:{number} is not JSON that can be used \(it .*{says}"):
            _ = JsonlTask(file).samples
    file.write_text(line)
    with pytest.raises(TaskError, match=says):
        _ = JsonlTask(file).evidence_grid


@pytest.mark.skipif(os.name != "posix", reason="named pipes")
def test_a_pipe_is_waited_for_by_nobody(tmp_path, copy, capsys):
    os.mkfifo(tmp_path / "pipe.json")
    for command in (
        ["report", str(tmp_path / "pipe.json"), "--out", str(tmp_path / "page")],
        ["eval", "--tasks", f"jsonl:{tmp_path / 'pipe.json'}"],
        ["train", "--config", str(tmp_path / "pipe.json")],
        ["ask", "--image", str(tmp_path / "pipe.json"), "--question", "q"],
    ):
        assert main(command) == 2
        assert "a pipe, a socket or a device, not a file" in " ".join(capsys.readouterr().err.split())


# --- tasks ----------------------------------------------------------------------------------------


class Scored(Letters):
    """Scores as it is told to."""

    def __init__(self, score):
        super().__init__(count=2)
        self.given = score

    def score(self, prediction, sample):
        return self.given


def test_a_tasks_scores_are_finite_numbers(tmp_path):
    settings = {"pruners": ["grid"], "keeps": [0.1]}
    for wrong in (float("nan"), float("inf")):
        with pytest.raises(GripError, match=r"task 'letters' scores sample 'letters0' with (nan|inf): return a finite"):
            run(tmp_path / "r.json", tasks=[Scored(wrong)], **settings)
    run(tmp_path / "s.json", tasks=[Scored(True)], **settings)
    assert {record["score"] for record in read_results(tmp_path / "s.json").records.values()} == {1.0}
