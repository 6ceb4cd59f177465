"""Tasks: reading samples, comparing answers, drawing a slice, and each family's further numbers."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from gripvlm.tasks import LabTask, Sample, Task, TaskError, get_tasks, lab_tasks, named_choice, normalise, open_image
from gripvlm.tasks.jsonl import read_samples
from tiny_lab import write_sample
from tiny_train import picture, write_several


@pytest.fixture
def sample_folder(tmp_path, monkeypatch):
    monkeypatch.setitem(lab_tasks.SAMPLES, "lab", write_sample(tmp_path / "sample"))
    return tmp_path / "sample"


@pytest.mark.parametrize(
    ("said", "same"),
    [
        ("  Yes. ", "yes"),
        ("A cat!", "a cat"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("12:30.", "12:30"),
        ("-4", "-4"),
        ("well-known", "well known"),
        ("don't", "don\u2019t"),
        ("a\n b", "a b"),
    ],
)
def test_answers_are_compared_without_case_and_punctuation(said, same):
    assert normalise(said) == normalise(same)


def test_numbers_that_differ_stay_different():
    assert len({normalise(text) for text in ("3.5", "35", "-35", "3:5", "5")}) == 5


@given(st.text())
def test_normalising_twice_changes_nothing(text):
    assert normalise(normalise(text)) == normalise(text)


@pytest.mark.parametrize(
    ("said", "named"),
    [
        ("Cat.", "cat"),
        ("The answer is: black cat", "black cat"),
        ("it is a cat", "cat"),
        ("cat or dog", None),
        ("concatenate", None),
        ("", None),
        ("fox", None),
    ],
)
def test_a_choice_is_named_as_whole_words_and_alone(said, named):
    assert named_choice(said, ["cat", "black cat", "dog"]) == named


def test_yes_and_no_are_judged_by_the_one_that_is_named():
    sample = Sample("1", (lambda: Image.new("RGB", (4, 4)),), "is it?", "no")
    task = Task()
    assert [task.score(said, sample) for said in ("No, it is not.", "yes", "nothing", "yes no")] == [1, 0, 0, 0]


def test_free_answers_must_be_equal():
    sample = Sample("1", (lambda: Image.new("RGB", (4, 4)),), "read it", "abc")
    assert [Task().score(said, sample) for said in ("ABC.", "abcd", "it says abc")] == [1, 0, 0]


def test_lab_is_six_tasks_and_each_has_its_own_samples(sample_folder):
    tasks = get_tasks("lab")
    assert [task.name for task in tasks] == [f"lab/{family}" for family in lab_tasks.FAMILIES]
    assert all({sample.family for sample in task.samples} == {task.family} for task in tasks)
    first = tasks[0].samples[0]
    assert first.images[0].size == (128, 128)
    assert first.evidence == (3, 4, 200)
    assert get_tasks(["lab/text", "lab", "lab/text"])[0].name == "lab/text"
    assert len(get_tasks(["lab/text", "lab"])) == 6


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("lab/exist", "lab/existence"),
        ("reading", "lab/reading"),
        ("labb", "lab"),
        ("x", "known are"),
        ("jsonl:", "jsonl:PATH"),
        ("my/questions.jsonl", "type jsonl:my/questions.jsonl"),
    ],
)
def test_an_unknown_task_names_the_nearest(name, hint):
    with pytest.raises(TaskError, match=hint):
        get_tasks(name)


def test_a_limit_keeps_pairs_whole_and_is_seeded(sample_folder):
    task = LabTask("perception")
    drawn = task.take(4, seed=1)
    assert len(drawn) == 4
    assert all(sum(other.pair == sample.pair for other in drawn) == 2 for sample in drawn)
    assert drawn == task.take(4, seed=1)
    assert any(drawn != task.take(4, seed=seed) for seed in range(2, 6))
    assert task.take(None, 0) == task.take(99, 0) == list(task.samples)
    assert len(task.take(1, 0)) == 1
    with pytest.raises(TaskError, match="use 1 or more"):
        task.take(0, 0)


def test_existence_counts_yes_as_the_positive_answer(sample_folder):
    task = LabTask("existence")  # yes, no, yes, no, ...
    said = ["yes", "yes", "yes", "no", "no", "no", "no", "no"]
    records = [{"id": s.id, "prediction": p} for s, p in zip(task.samples, said, strict=True)]
    found = task.summary(records)
    assert found == pytest.approx({"precision": 2 / 3, "recall": 0.5, "f1": 4 / 7, "yes_share": 3 / 8})
    nothing = task.summary([{"id": s.id, "prediction": "?"} for s in task.samples])
    assert nothing == {"precision": 0, "recall": 0, "f1": 0, "yes_share": 0}


def test_perception_counts_pairs_that_are_right_twice(sample_folder):
    task = LabTask("perception")
    scores = [1, 1, 1, 0, 0, 0, 1, 1]
    records = [{"id": s.id, "score": x} for s, x in zip(task.samples, scores, strict=True)]
    assert task.summary(records) == {"accuracy_plus": 0.5}
    assert task.summary(records[:1]) == {}


def test_science_is_scored_on_the_text_of_the_choice(sample_folder):
    task = LabTask("science")
    assert [task.score(said, task.samples[0]) for said in ("the cat", "dog", "cat or dog")] == [1, 0, 0]


def test_your_own_questions(tmp_path):
    Image.new("L", (10, 20)).save(tmp_path / "a.png")
    file = tmp_path / "mine.jsonl"
    rows = [
        {"image": "a.png", "question": "What?", "answer": "b", "choices": ["a", "b"]},
        {"image": "a.png", "question": "Which?", "answer": "x"},
    ]
    file.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    (task,) = get_tasks(f"jsonl:{file}")
    one, two = task.samples
    assert one.images[0].mode == "RGB"
    assert one.image_id == two.image_id
    assert one.id != two.id
    assert task.prompt(one).startswith("What?\n")
    assert "a, b" in task.prompt(one)
    assert task.prompt(two) == "Which?"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('{"image": "a.png", "question": "q"}', ":1 needs a text 'answer'"),
        ('{"image": "a.png", "question": "q", "answer": "a"}\n{', ":2 is not JSON"),
        ("[1]", "is a list"),
        ('{"image": [], "question": "q", "answer": "a"}', r"a picture's path 'image', or a list .*got \[\]"),
        ('{"image": ["a.png", ""], "question": "q", "answer": "a"}', r"list of such paths, got \['a.png', ''\]"),
        ('{"question": "q", "answer": "a"}', ":1 needs a picture's path 'image'"),
        ('{"image": "a.png", "question": "q", "answer": "a", "choices": ["b"]}', "none of the choices"),
        ('{"image": "a.png", "question": "q", "answer": "a", "evidence": [-1]}', "patch indices"),
        ('{"image": "a.png", "question": "q", "answer": "a", "id": 1}\n' * 2, "twice"),
        ("", "no questions"),
    ],
)
def test_a_bad_line_is_named(tmp_path, text, complaint):
    file = tmp_path / "mine.jsonl"
    file.write_text(text)
    with pytest.raises(TaskError, match=complaint):
        _ = get_tasks(f"jsonl:{file}")[0].samples


def test_a_line_may_show_several_pictures(tmp_path):
    (task,) = get_tasks(f"jsonl:{write_several(tmp_path)}")
    one, two, *_, four, _ = task.samples
    assert [path.name for path in two.pictures] == ["0.png", "1.png"]
    assert [image.tobytes() for image in two.images] == [picture(p).tobytes() for p in (0, 1)]
    assert four.evidence == (55, 5, 48)
    assert four.evidence_by_image((4, 4)) == [[5], [], [], [7, 0]]
    assert one.evidence_by_image((4, 4)) == [[7, 5, 0]]
    clusters = [sample.image_id for sample in task.samples]
    assert clusters[0] == clusters[1] == clusters[2] == clusters[3]  # 1.png links 0.png and 2.png
    assert len(set(clusters)) == 3
    assert clusters[5] == "7.png"


def test_long_chains_of_pictures_are_one_cluster(tmp_path):
    file = tmp_path / "mine.jsonl"
    chain = [[f"{i}.png", f"{i + 1}.png"] for i in range(2000)]
    for rows in (chain, chain[::-1], [names[::-1] for names in chain], [*chain[::2], *chain[1::2]]):
        file.write_text("".join(json.dumps({"image": names, "question": "q"}) + "\n" for names in rows))
        assert len({sample.image_id for sample in read_samples(file, tmp_path, answers=False)}) == 1


def test_evidence_beyond_the_last_picture_is_refused(tmp_path):
    file = write_several(tmp_path)
    file.write_text(file.read_text().replace("[23, 5, 16]", "[23, 5, 32]", 1))
    with pytest.raises(TaskError, match=r"jsonl:2: sample 'q1' marks patch 32, .* 0 to 31 in 2 pictures: count them"):
        _ = get_tasks(f"jsonl:{file}")[0].samples


def test_missing_files_say_so(tmp_path, monkeypatch):
    monkeypatch.setitem(lab_tasks.SAMPLES, "lab", tmp_path / "nowhere")
    with pytest.raises(TaskError, match="not in this installation"):
        _ = LabTask("text").samples
    with pytest.raises(TaskError, match="no file"):
        _ = get_tasks(f"jsonl:{tmp_path / 'no.jsonl'}")[0].samples
    with pytest.raises(TaskError, match="no image"):
        open_image(tmp_path / "no.png")
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(TaskError, match="not a picture"):
        open_image(tmp_path / "text.png")
    with pytest.raises(TaskError, match="is a folder"):
        open_image(tmp_path)


def test_missing_pictures_show_before_any_is_opened(tmp_path):
    Image.new("L", (10, 20)).save(tmp_path / "a.png")
    file = tmp_path / "mine.jsonl"
    rows = [{"image": f"{name}.png", "question": "q", "answer": "a"} for name in "abbc"]
    file.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(TaskError, match=r"'b.png' \(and 1 more\), but there is no such file: .*relative to"):
        _ = get_tasks(f"jsonl:{file}")[0].samples


def test_a_photo_is_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # taken with the camera on its side
    Image.new("RGB", (40, 20)).save(tmp_path / "a.jpg", exif=exif)
    assert open_image(tmp_path / "a.jpg").size == (20, 40)
