"""The lab `lab-dense` by its name, in every command: on a tiny stand-in, so that no test here needs its weights."""

from __future__ import annotations

import json

import pytest
import torch

import gripvlm
from gripvlm import lab
from gripvlm.cli import main
from gripvlm.errors import GripError, TrainError
from gripvlm.grip import pruner as grip
from gripvlm.grip.fingerprint import ScorerError
from gripvlm.grip.train.data import load_questions
from gripvlm.models.loading import ModelError, load_model
from gripvlm.tasks import TaskError, get_tasks, lab_tasks
from tiny_lab import tiny_lab
from tiny_train import picture, tiny_scorer

SHOWN = {"half": ([0], [1]), "pictures": ([0, 1], [2, 3, 4, 5])}
"""Family -> the pictures of its questions."""


def write_dense(folder):
    """A sample as `lab-dense` has it: questions about one, two or four pictures."""
    (folder / "images").mkdir(parents=True)
    for p in range(6):
        picture(p, 128).save(folder / "images" / f"{p}.png")
    rows = []
    for family, asked in SHOWN.items():
        for shown in asked:
            row = {"id": f"{family}-{shown[0]}", "image": [f"{p}.png" for p in shown], "family": family}
            row |= {"question": "is there a cat?", "answer": "yes", "evidence": [256 * len(shown) - 1, 3]}
            rows.append(row)
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def standin(tmp_path_factory):
    """A folder as `gripvlm/lab/data`, whose `dense` holds a tiny model, questions and a scorer."""
    data = tmp_path_factory.mktemp("data")
    for part in tiny_lab():
        part.save_pretrained(data / "dense" / "model")
    write_dense(data / "dense" / "sample")
    tiny_scorer(tiny_lab()[0]).save_pretrained(data / "dense" / "grip" / "question")
    return data


@pytest.fixture(params=[True])
def dense(request, standin, tmp_path, monkeypatch):
    """`lab-dense` is the stand-in; with the parameter False it is not in the installation."""
    data = standin if request.param else tmp_path / "data"
    monkeypatch.setitem(lab.FOLDERS, "lab-dense", data / "dense")
    monkeypatch.setitem(lab_tasks.SAMPLES, "lab-dense", data / "dense" / "sample")
    monkeypatch.setattr(grip, "SHIPPED", data)
    monkeypatch.chdir(tmp_path)


missing = pytest.mark.parametrize("dense", [False], indirect=True)


def test_the_parts_of_a_lab_lie_in_its_folder():
    assert {name: folder / "sample" for name, folder in lab.FOLDERS.items()} == lab_tasks.SAMPLES
    for name, folder in lab.FOLDERS.items():
        assert grip.SHIPPED / grip.SHIPPED_NAMES[name] == folder / "grip" / "question"
        assert folder.is_relative_to(lab.DATA)  # so that it is in the wheel (pyproject.toml)


def test_it_loads_by_name(dense):
    model, processor = lab.load("lab-dense")
    assert not model.training
    assert torch.equal(model.get_input_embeddings().weight, tiny_lab()[0].get_input_embeddings().weight)
    assert processor.chat_template
    assert load_model("lab-dense", "cpu", "bfloat16")[0].dtype == torch.bfloat16
    with pytest.raises(GripError, match=r"no lab 'lab-sparse': use one of lab, lab-dense"):
        lab.load("lab-sparse")
    with pytest.raises(ModelError, match="no model 'lab-sparse': use 'lab', 'lab-dense', a folder that exists"):
        load_model("lab-sparse")


def test_its_tasks_are_the_families_of_its_rows(dense):
    tasks = get_tasks("lab-dense")
    assert [task.name for task in tasks] == ["lab-dense/half", "lab-dense/pictures"]
    assert [len(sample.pictures) for task in tasks for sample in task.samples] == [1, 1, 2, 4]
    assert [len(image) for image in tasks[1].samples[1].evidence_by_image((16, 16))] == [1, 0, 0, 1]
    assert [task.spec for task in get_tasks(["lab-dense/half", "lab/text"])] == ["lab-dense/half", "lab/text"]
    clusters = [sample.image_id for task in tasks for sample in task.samples]
    assert clusters[0] == clusters[1] == clusters[2] != clusters[3]  # across families: they are of one file
    with pytest.raises(TaskError, match="lab-dense has no family of questions 'halves': use one of half, pictures"):
        _ = get_tasks("lab-dense/halves")[0].samples


def test_it_is_evaluated_and_reported_by_name(dense, capsys):
    pruners = ["--pruners", "oracle,grip:scorer=lab-dense", "--keep", "10%"]
    assert main(["eval", "--model", "lab-dense", "--tasks", "lab-dense", *pruners, "--out", "r.json"]) == 0
    with open("r.json") as file:
        rows = json.load(file)["rows"]
    assert {(row["task"], row["pruner"]): row["tokens"] for row in rows if row["keep"] == 0.1} == {
        (f"lab-dense/{family}", name): 26 * sum(map(len, asked)) / 2
        for family, asked in SHOWN.items()
        for name in ("oracle", "grip:scorer=lab-dense")
    }
    assert {row["pruner_config"].get("scorer") for row in rows} == {None, "lab-dense"}
    assert main(["report", "r.json", "--out", "page"]) == 0
    with open("page/report.md") as file:
        assert "lab evidence, never a statement about a larger model" in file.read()
    capsys.readouterr()
    asked = ["ask", "--model", "lab-dense", "--question", "is there a cat?", "--pruner", "grid"]
    images = [str(lab.FOLDERS["lab-dense"] / "sample" / "images" / f"{p}.png") for p in (2, 3)]
    assert main([*asked, "--image", images[0], "--image", images[1], "--keep", "64"]) == 0
    assert "128 of 512 visual tokens kept" in capsys.readouterr().out


def test_its_questions_are_no_training_data(dense):
    with pytest.raises(TrainError, match="the lab tasks are the test split"):
        load_questions("lab-dense/half")


@missing
def test_what_is_not_installed_is_said_plainly(dense, capsys):
    with pytest.raises(GripError, match=r"the model lab-dense is not in this installation \(.* has no config\.json\)"):
        load_model("lab-dense")
    with pytest.raises(TaskError, match="the questions of lab-dense are not in this installation"):
        get_tasks("lab-dense")
    with pytest.raises(TaskError, match="the questions of lab-dense are not in this installation"):
        _ = get_tasks("lab-dense/half")[0].samples
    for use in (gripvlm.Grip.from_pretrained, lambda name: gripvlm.get_pruner(f"grip:scorer={name}")):
        with pytest.raises(ScorerError, match=r"the scorer lab-dense is not in this installation .* or train one with"):
            use("lab-dense")
    picture(0).save("cat.png")
    assert main(["ask", "--model", "lab-dense", "--image", "cat.png", "--question", "is there a cat?"]) == 2
    assert "lab-dense is not in this installation" in " ".join(capsys.readouterr().err.split())
