"""The gallery: chosen by one rule, failures first, in one file that asks nobody for anything."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest

from gripvlm.demo.gallery import AT, CASES, KEEPS, case_of, gallery, write
from gripvlm.errors import GripError
from gripvlm.tasks import Sample, Task, get_tasks
from places import ROOT
from tiny_lab import tiny_lab

METHODS = ["random", "pool", "fastv"]
RIGHT = {"score": 1.0}
WRONG = {"score": 0.5}
COMMITTED = ROOT / "docs/gallery/index.html"


class Endless(Task):
    """Two of the lab's questions, one with a text that must not end a script."""

    name = "endless"
    max_new_tokens = 2

    def __init__(self) -> None:
        (task,) = get_tasks("lab/text")
        first, second = task.samples[0], task.samples[40]
        self.samples = (replace(first, answer="</script><b>"), second)


def data_of(page: str) -> dict:
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    return json.loads(text)


def kept(answer: dict, n: int) -> list[int]:
    bits = f"{int(answer['kept'], 16):0{n}b}"
    return [i for i, bit in enumerate(bits) if bit == "1"]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gallery")
    data = gallery(*tiny_lab(), [Endless()], METHODS, model_name="tiny", limit=2, repeats=1)
    return data, write(data, folder)


def test_the_page_holds_what_was_found_and_needs_no_other_file(page):
    data, file = page
    text = file.read_text(encoding="utf-8")
    assert data_of(text) == json.loads(json.dumps(data))
    assert text.count("</script>") == 2, "a question must not end the data"
    assert not re.findall(r"""(?:src|href)=["'](?!data:)|https?://(?!www\.w3\.org/2000/svg)|@import|fetch\(""", text)
    assert [entry.name for entry in file.parent.iterdir() if entry.name != ".lock"] == ["index.html"]


def test_every_setting_has_its_tokens_answer_and_worth(page):
    data, _ = page
    assert data["methods"] == ["random", "pool"], "fastv cannot reach a tenth"
    assert sum(case["count"] for case in data["cases"]) == 2
    assert data["keeps"][data["start"]] == "10%"
    for example in data["examples"]:
        assert len(example["settings"]) == len(KEEPS)
        n = len(data["boxes"][example["parts"][0]["boxes"]])
        for keep, methods in zip(KEEPS, example["settings"], strict=True):
            random, pool = methods
            count = round(n * keep + 1e-9)
            assert len(kept(random, n)) == random["tokens"] == count
            assert len(random["worth"]) == (n if keep == AT else 0)
            assert pool["alone"]
            assert pool["worth"] == []
            order = sorted(range(n), key=lambda i: (-random["scores"][i], i))
            assert sorted(order[:count]) == kept(random, n)
            assert 0 <= random["of_full"] <= 1
        assert example["full"]["worth"] == []


@pytest.mark.parametrize(
    ("full", "methods", "case"),
    [
        (RIGHT, (WRONG, WRONG), 0),
        (RIGHT, (WRONG, RIGHT), 1),
        (RIGHT, (RIGHT, WRONG), 2),
        (RIGHT, (RIGHT, RIGHT), 3),
        (WRONG, (WRONG, RIGHT), 4),
        (WRONG, (WRONG, WRONG), 5),
    ],
)
def test_cases(full, methods, case):
    """Partly right is wrong."""

    class Results:
        def of(self, task, pruner, keep):
            assert (task, keep) == ("lab/text", "1.0" if pruner == "full" else "0.1")
            return {"a": full if pruner == "full" else methods[int(pruner)]}

    task = Task()
    task.name = "lab/text"
    sample = Sample("a", (), "?", "!")
    assert case_of(task, sample, ["0", "1"], Results()) == list(CASES)[case]


def test_nothing_to_show_is_said():
    with pytest.raises(GripError, match="no method to show: pass one that drops tokens"):
        gallery(*tiny_lab(), [Endless()], ["full"], model_name="tiny", limit=2)


def test_the_sites_gallery_is_of_the_labs_own_and_small(tmp_path):
    """Made by the command that it names."""
    text = COMMITTED.read_text(encoding="utf-8")
    data = data_of(text)
    assert COMMITTED.stat().st_size < 600_000
    assert data["model"] == "lab"
    assert all(name.startswith("lab/") for name in data["tasks"])
    assert data["command"] == "gripvlm demo --static docs/gallery --repeats 0", "as docs/demo.md says"
    order = [case["name"] for case in data["cases"]]
    assert order == [name.format(first="grip") for name in CASES]
    cases = [order.index(example["case"]) for example in data["examples"]]
    assert cases == sorted(cases), "failures first"
    assert {0, 1, 2} < set(cases)
    # a new template, style or script needs no new answers, but a new page: write(data_of(page), "docs/gallery")
    assert write(data, tmp_path).read_text(encoding="utf-8") == text
