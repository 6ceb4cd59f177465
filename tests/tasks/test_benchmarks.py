"""The six benchmarks and hub data sets: small files of the published schemas, asked and scored as published."""

from __future__ import annotations

import json
import sys

import pytest

from gripvlm.errors import TrainError
from gripvlm.grip.train.data import load_questions, pictures_of
from gripvlm.tasks import TaskError, get_tasks
from gripvlm.tasks.benchmarks import BENCHMARKS, MME
from tiny_benchmarks import (
    AI2D_ROWS,
    SCIENCEQA_ROWS,
    TEXTVQA_ROWS,
    mme_rows,
    picture,
    pope_rows,
    table,
    write,
    write_all,
)

datasets = pytest.importorskip("datasets", reason="pip install 'gripvlm[bench]'")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """Nothing of these tests stays in the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    datasets.disable_progress_bars()


@pytest.fixture(scope="module")
def six(tmp_path_factory):
    return write_all(tmp_path_factory.mktemp("six"))


def task(name):
    (only,) = get_tasks(name)
    return only


def answered(task, say):
    """Records of answers that `say` gives to each sample."""
    return [
        {"id": sample.id, "prediction": said, "score": task.score(said, sample)}
        for sample, said in ((sample, say(sample)) for sample in task.samples)
    ]


def test_all_six_from_one_folder(six):
    tasks = get_tasks(f"benchmarks:path={six}")
    assert [one.name for one in tasks] == list(BENCHMARKS)
    for one in tasks:
        assert one.samples[0].images[0].size == (16, 12)
        assert one.score(one.samples[0].answer, one.samples[0]) == 1
        assert one.score("qqq", one.samples[0]) == (1 if one.name == "pope" else 0)  # POPE: what is not no is yes
        assert one.held_out
        ids = [sample.id for sample in one.samples]
        assert len(set(ids)) == len(ids)


def test_prompts_are_the_published_ones(six):
    first = {one.name: one.prompt(one.samples[0]) for one in get_tasks(f"benchmarks:path={six}")}
    short = "\nAnswer the question using a single word or phrase."
    letter = "\nAnswer with the option's letter from the given choices directly."
    assert first == {
        "pope": f"Is there a thing 0 in the image?{short}",
        "scienceqa": f"Context: Both are shown.\nWhich is heavier?\nA. a feather\nB. a stone\nC. neither{letter}",
        "ai2d": f"What eats grass?\nA. fox\nB. hare\nC. owl\nD. oak{letter}",
        "mme": f"Is this existence Yes?{short}",
        "ocrbench": "what is written in the image?",
        "textvqa": f"What is the brand of this camera?{short}",
    }


def test_pope_numbers(six):
    pope = task(f"pope:path={six / 'pope'}")
    assert len(pope.samples) == 30
    assert len({sample.image_id for sample in pope.samples}) == 2

    def say(sample):
        """In `random` all right; elsewhere three of five yes right, and one of five no wrong."""
        number = int(sample.id.partition("/")[2])
        if sample.family == "random":
            return sample.answer
        return "Yes" if number in (1, 2, 3, 6) else "No"

    found = pope.summary(answered(pope, say))
    # elsewhere: precision 3/4, recall 3/5, f1 2/3, accuracy 7/10; all together: yes right 5 + 3 + 3 of 15,
    # said yes 5 + 4 + 4 = 13, so precision 11/13, recall 11/15, f1 22/28, accuracy 24/30
    assert found["f1_random"] == found["accuracy_random"] == 1
    assert found["f1_popular"] == found["f1_adversarial"] == pytest.approx(2 / 3)
    assert found["accuracy_popular"] == pytest.approx(0.7)
    assert found["precision"] == pytest.approx(11 / 13)
    assert found["recall"] == pytest.approx(11 / 15)
    assert found["f1"] == pytest.approx(22 / 28)
    assert found["accuracy"] == pytest.approx(0.8)
    assert found["yes_share"] == pytest.approx(13 / 30)


def test_a_part_of_pope(six):
    popular = task(f"pope/popular:path={six / 'pope'}")
    assert {sample.family for sample in popular.samples} == {"popular"}
    found = popular.summary(answered(popular, lambda sample: "yes"))
    assert found == pytest.approx({"accuracy": 0.5, "f1": 2 / 3, "precision": 0.5, "recall": 1, "yes_share": 1})


def test_mme_scores_pairs(tmp_path):
    mme = task(f"mme:path={write(mme_rows(MME.PERCEPTION + MME.COGNITION[:2]), tmp_path / 'mme.parquet')}")
    assert len(mme.take(4, 0)) == 4
    assert all(sum(b.pair == a.pair for b in mme.take(4, 0)) == 2 for a in mme.take(4, 0))

    def say(sample):
        """All yes where the second picture of existence is shown; everything else right."""
        return "yes" if sample.image_id == "existence/existence/0001.png" else f"{sample.answer}, it is."

    found = mme.summary(answered(mme, say))
    assert found["existence"] == pytest.approx(100 * (3 / 4 + 1 / 2))
    assert found["count"] == 200
    assert found["perception"] == pytest.approx(9 * 200 + 125)
    assert "cognition" not in found  # two of its four subtasks are missing
    assert found["accuracy_plus"] == pytest.approx(23 / 24)
    assert mme.summary(answered(mme, say)[:1]) == {}


def test_parts_of_mme(six):
    cognition = task(f"mme/cognition:path={six / 'mme'}")
    assert {sample.family for sample in cognition.samples} == set(MME.COGNITION)
    assert cognition.summary(answered(cognition, lambda sample: sample.answer))["cognition"] == 800
    assert task(f"mme/perception:path={six / 'mme'}").samples[0].family == "existence"


def test_options_are_scored_by_letter(six):
    science = task(f"scienceqa:path={six / 'scienceqa'}")
    first, second = science.samples
    assert (first.answer, second.answer, first.family) == ("B", "A", "natural science")
    assert [science.score(said, first) for said in ("B", "b.", "B. a stone", "a stone", "D")] == [1, 1, 1, 0, 0]
    ai2d = task(f"ai2d:path={six / 'ai2d'}")
    assert [sample.answer for sample in ai2d.samples] == ["B", "A"]
    assert ai2d.samples[0].image_id == ai2d.samples[1].image_id != ""  # the same diagram


def test_ocrbench_scores_by_containment(six):
    ocr = task(f"ocrbench:path={six / 'ocrbench'}")
    word, date, formula = ocr.samples
    assert [ocr.score(said, word) for said in ("the Centre", "cent")] == [1, 0]
    assert ocr.score("on May 4 we", date) == 1
    assert [ocr.score(said, formula) for said in ("X=a+b", "x=a+b")] == [1, 0]
    found = ocr.summary(answered(ocr, lambda sample: "may 4 and centre"))
    assert found["final_score"] == pytest.approx(2000 / 3)
    assert found["Doc-oriented VQA"] == found["Regular Text Recognition"] == 1
    assert found["Handwritten Mathematical Expression Recognition"] == 0


def test_textvqa_asks_ten_people(six):
    text = task(f"textvqa:path={six / 'textvqa'}")
    (only,) = text.samples
    assert only.answer == "dakota"
    assert text.score("Dakota", only) == 1  # seven of ten
    assert text.score("dakota digital", only) == pytest.approx(0.3)


def test_questions_without_answers_are_refused(tmp_path):
    rows_ = [{**TEXTVQA_ROWS[0], "answers": []}, TEXTVQA_ROWS[0]]
    file = write(rows_, tmp_path / "test.parquet")
    with pytest.raises(TaskError, match=r"row 0 of .* has no answers: the test split keeps them back"):
        _ = task(f"textvqa:path={file}").samples


CARD = """---
configs:
- config_name: Full
  data_files:
  - split: popular
    path: Full/popular-*
- config_name: default
  data_files:
  - split: test
    path: data/test-*
---
"""


def test_a_snapshot_of_the_hub_with_its_card(tmp_path):
    write(pope_rows(), tmp_path / "data" / "test-00000-of-00001.parquet")
    write(pope_rows()[:20], tmp_path / "Full" / "popular-00000-of-00001.parquet")
    (tmp_path / "README.md").write_text(CARD)
    assert len(task(f"pope:path={tmp_path}").samples) == 30
    full = task([f"pope:path={tmp_path}", "config=Full", "split=popular"])
    assert len(full.samples) == 20
    assert full.name == "pope:split=popular"
    assert not full.held_out
    with pytest.raises(TaskError, match='Unknown split "train"'):
        _ = task(f"pope:path={tmp_path},split=train").samples


def test_the_config_of_a_card_is_chosen(tmp_path):
    write(SCIENCEQA_ROWS, tmp_path / "a" / "test-0.parquet")
    write(SCIENCEQA_ROWS[:1], tmp_path / "b" / "test-0.parquet")
    names = (("ScienceQA-IMG", "a"), ("ScienceQA-FULL", "b"))
    parts = [f"- config_name: {n}\n  data_files:\n  - split: test\n    path: {d}/test-*\n" for n, d in names]
    (tmp_path / "README.md").write_text("---\nconfigs:\n" + "".join(parts) + "---\n")
    assert len(task(f"scienceqa:path={tmp_path}").samples) == 2
    assert len(task(f"scienceqa:path={tmp_path},config=ScienceQA-FULL").samples) == 1
    with pytest.raises(TaskError, match="several: type config= with one of"):
        _ = task(f"hf:{tmp_path}").samples


def test_what_save_to_disk_wrote(tmp_path):
    table(AI2D_ROWS).save_to_disk(str(tmp_path / "one"))
    assert len(task(f"ai2d:path={tmp_path / 'one'}").samples) == 2
    both = datasets.DatasetDict(test=table(AI2D_ROWS), train=table(AI2D_ROWS[:1]))
    both.save_to_disk(str(tmp_path / "both"))
    assert len(task(f"ai2d:path={tmp_path / 'both'}").samples) == 2
    assert len(task(f"ai2d:path={tmp_path / 'both'},split=train").samples) == 1
    with pytest.raises(TaskError, match="no split 'dev'"):
        _ = task(f"ai2d:path={tmp_path / 'both'},split=dev").samples
    with pytest.raises(TaskError, match="several: type split= with one of test, train"):
        _ = task(f"hf:{tmp_path / 'both'},choices=options").samples


def test_a_saved_split_that_is_another_one_is_refused(tmp_path):
    file = write(AI2D_ROWS, tmp_path / "train.parquet")
    datasets.load_dataset("parquet", data_files=str(file), split="train").save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(TaskError, match=r"scored on the split 'test', but .* is a saved 'train': type split=train"):
        _ = task(f"ai2d:path={tmp_path / 'saved'}").samples
    assert len(task(f"ai2d:path={tmp_path / 'saved'},split=train").samples) == 2


def test_json_lines_with_pictures_beside_them(tmp_path):
    picture(1).save(tmp_path / "a.png")
    lines = [{**row, "image": "a.png"} for row in pope_rows()]
    (tmp_path / "pope.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    samples = task(f"pope:path={tmp_path / 'pope.jsonl'}").samples
    assert len(samples) == 30
    assert samples[0].images[0].getpixel((0, 0)) == (1, 1, 1)
    with pytest.raises(TaskError, match="one file, which has no config and no split: leave out split"):
        _ = task(f"pope:path={tmp_path / 'pope.jsonl'},split=test").samples


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"category": "rare"}, "row 0 of .* has the category 'rare'"),
        ({"answer": "maybe"}, "the answer 'maybe'"),
    ],
)
def test_rows_that_are_not_popes_are_named(tmp_path, change, complaint):
    rows_ = pope_rows()
    rows_[0] |= change
    with pytest.raises(TaskError, match=complaint):
        _ = task(f"pope:path={write(rows_, tmp_path / 'a.parquet')}").samples


def test_a_wrong_place_says_what_to_type(tmp_path, six):
    with pytest.raises(TaskError, match=r"mme: .* has no column 'question_id', 'category', only"):
        _ = task(f"mme:path={six / 'ai2d'}").samples
    with pytest.raises(TaskError, match="no folder or file"):
        _ = task(f"mme:path={tmp_path / 'nowhere'}").samples
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(TaskError, match=r"is no \.parquet, \.jsonl, \.json, \.arrow file"):
        _ = task(f"mme:path={tmp_path / 'a.csv'}").samples
    (tmp_path / "empty").mkdir()
    with pytest.raises(TaskError, match=r"cannot be loaded: .*check the path"):
        _ = task(f"mme:path={tmp_path / 'empty'}").samples
    with pytest.raises(TaskError, match="two data sets for the one task 'pope'"):
        get_tasks([f"pope:path={tmp_path}", "pope"])


def test_no_network_says_how_to_do_without(monkeypatch):
    def away(*args, **kwargs):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", away)
    with pytest.raises(TaskError, match=r"POPE cannot be loaded: Couldn't reach .*type pope:path=FOLDER"):
        _ = task("pope").samples


def test_the_hub_is_asked_for_what_lmms_eval_asks_it(monkeypatch):
    asked = {}

    def load(repo, config=None, split=None):
        asked[repo] = (config, split)
        raise ConnectionError("no")

    monkeypatch.setattr(datasets, "load_dataset", load)
    for one in get_tasks("benchmarks"):
        with pytest.raises(TaskError):
            _ = one.samples
    assert asked == {
        "lmms-lab-encoder/POPE": (None, "test"),
        "lmms-lab-encoder/ScienceQA": ("ScienceQA-IMG", "test"),
        "lmms-lab-encoder/ai2d": (None, "test"),
        "lmms-lab-encoder/MME": (None, "test"),
        "echo840/OCRBench": (None, "test"),
        "lmms-lab-encoder/textvqa": (None, "validation"),
    }


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(TaskError, match=r"pip install 'gripvlm\[bench\]'"):
        _ = task("pope").samples


MINE = [
    {"img": picture(1), "q": "What?", "a": "cat"},
    {"img": picture(1), "q": "Who?", "a": "dog"},
    {"img": None, "q": "Why?", "a": "so"},
]


def test_any_data_set(tmp_path):
    file = write(MINE, tmp_path / "mine.parquet")
    mine = task(f"hf:{file},image=img,question=q,answer=a,metric=exact")
    assert [sample.question for sample in mine.samples] == ["What?", "Who?"]  # the one without a picture is left out
    assert mine.samples[0].image_id == mine.samples[1].image_id
    assert mine.prompt(mine.samples[0]) == "What?"
    assert mine.score("Cat.", mine.samples[0]) == 1
    with pytest.raises(TaskError, match="has no column 'question', 'answer', 'image', only img, q, a"):
        _ = task(f"hf:{file}").samples
    with pytest.raises(TaskError, match="no image the picture of row 0"):
        _ = task(f"hf:{file},image=a,question=q,answer=q").samples[0].images
    with pytest.raises(TaskError, match="cannot be the picture and a text"):
        task(f"hf:{file},image=q,question=q")
    with pytest.raises(TaskError, match="has no text in 'img': name a column of texts, question="):
        _ = task(f"hf:{file},image=a,question=img,answer=q").samples


@pytest.mark.parametrize(
    ("answer", "letter"), [(1, "B"), ("1", "B"), ("b", "B"), ("dog", "B"), ("7", None), ("hen", None)]
)
def test_any_data_set_with_choices(tmp_path, answer, letter):
    rows_ = [{"image": picture(1), "question": "Which?", "options": ["cat", "dog"], "answer": answer}]
    mine = task(f"hf:{write(rows_, tmp_path / 'mine.parquet')},choices=options")
    if letter is None:
        with pytest.raises(TaskError, match="no index, letter or text of"):
            _ = mine.samples
        return
    (only,) = mine.samples
    assert only.answer == letter
    assert mine.prompt(only) == (
        "Which?\nA. cat\nB. dog\nAnswer with the option's letter from the given choices directly."
    )
    assert [mine.score(said, only) for said in ("B", "A")] == [1, 0]


def test_several_answers_and_several_pictures(tmp_path):
    rows_ = [{"image": [picture(1)], "question": "Which?", "answer": ["cat", "dog", "dog"]}]
    mine = task(f"hf:{write(rows_, tmp_path / 'mine.parquet')},metric=vqa")
    assert mine.samples[0].answer == "dog"
    assert mine.samples[0].images[0].size == (16, 12)
    assert mine.score("dog", mine.samples[0]) == pytest.approx((2 * 1 / 3 + 2 / 3) / 3)
    both = [{"image": [picture(1), picture(2)], "question": "Which?", "answer": "cat"}]
    with pytest.raises(TaskError, match=r"row 0 of .* has 2 pictures"):
        _ = task(f"hf:{write(both, tmp_path / 'both.parquet')}").samples


def test_training_takes_data_sets_but_not_what_is_scored(tmp_path, six):
    file = write(MINE[:2], tmp_path / "mine.parquet")
    questions = load_questions(f"hf:{file},image=img,question=q,answer=a")
    assert [sample.answer for _, sample in questions] == ["cat", "dog"]
    assert pictures_of(*questions[0]) == pictures_of(*questions[1])
    with pytest.raises(TrainError, match="scores are published on the questions of pope"):
        load_questions(f"pope:path={six / 'pope'}")
    assert len(load_questions(f"pope:path={six / 'pope'},split=test")) == 30
    picture(1).save(tmp_path / "a.png")
    lines = [{**row, "image": "a.png"} for row in pope_rows()]
    (tmp_path / "pope.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    with pytest.raises(TrainError, match="scores are published"):
        load_questions(f"pope:path={tmp_path / 'pope.jsonl'}")


def test_the_six_through_the_runner(six):
    from gripvlm.eval import evaluate
    from tiny_lab import tiny_lab

    result = evaluate(*tiny_lab(), f"benchmarks:path={six}", ["grid"], [16], limit=4, blind=False)
    extras = {row["task"]: row["extras"] for row in result["rows"] if row["pruner"] == "grid"}
    assert list(extras) == list(BENCHMARKS)
    assert {"accuracy", "f1", "precision", "recall", "yes_share"} <= set(extras["pope"])
    assert "accuracy_plus" in extras["mme"]
    assert "final_score" in extras["ocrbench"]
    assert all(row["tokens"] == 16 for row in result["rows"] if row["pruner"] == "grid")
