"""Scores of answers on worked examples of the official definitions; the arithmetic stands beside each."""

from __future__ import annotations

import pytest
from PIL import Image

from gripvlm.tasks import METRICS, Sample, TaskError, get_tasks
from gripvlm.tasks.metrics import (
    anls,
    contains,
    contains_verbatim,
    exact,
    get_metric,
    mme_answer,
    option_letter,
    pope_answer,
    yes_no_summary,
)
from gripvlm.tasks.vqa_answer import vqa_accuracy, vqa_normalise


def sample(answer: str, *answers: str, choices: tuple[str, ...] = ()) -> Sample:
    return Sample("1", (lambda: Image.new("RGB", (4, 4)),), "q", answer, choices=choices, answers=answers)


@pytest.mark.parametrize(
    ("matches", "score"),
    [
        (0, 0.0),
        (1, 0.3),  # (1 x 0 + 9 x 1/3) / 10
        (2, 0.6),  # (2 x 1/3 + 8 x 2/3) / 10
        (3, 0.9),  # (3 x 2/3 + 7 x 1) / 10
        (4, 1.0),  # three others agree, whoever is left out
        (10, 1.0),
    ],
)
def test_vqa_accuracy_leaves_each_of_ten_answers_out(matches, score):
    answers = ["dakota"] * matches + [f"other {i}" for i in range(10 - matches)]
    assert vqa_accuracy("Dakota.", answers) == pytest.approx(score)


@pytest.mark.parametrize(
    ("said", "compared"),
    [
        ("The Coca-Cola", "coca cola"),  # the hyphen touches no space, so it becomes one
        ("a - b", "b"),  # the hyphen stands beside a space, so it goes; a is an article
        ("Two dogs, three cats", "2 dogs 3 cats"),
        ("none", "0"),
        ("3.5", "3.5"),
        ("St. 5.", "st 5"),  # a period goes unless a digit follows
        ("1,000", "1000"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("im", "im"),  # the table has Im with a capital, but compares lower case
        ("John's", "john 's"),
        ("yes/no", "yes no"),
        ("what?", "what"),
        ("line\nbreak", "line break"),
        ("an apple", "apple"),
    ],
)
def test_vqa_compares_answers_as_its_server_does(said, compared):
    assert vqa_normalise(said) == compared


@pytest.mark.parametrize(
    ("said", "answers", "score"),
    [
        ("abc", ["abd"], 2 / 3),  # one substitution in three letters: 1 - 1/3
        ("abcd", ["abxy"], 0.0),  # 2/4 is not below the threshold
        ("abcd", ["abcxy"], 0.6),  # two edits in five letters: 1 - 2/5
        ("ABC ", ["zzz", "abc"], 1.0),  # the best of several
        ("", ["abc"], 0.0),
    ],
)
def test_anls_is_one_minus_the_normalised_distance(said, answers, score):
    assert anls(said, answers) == pytest.approx(score)


@pytest.mark.parametrize(
    ("said", "read"),
    [
        ("Yes", "yes"),
        ("No, there is not.", "no"),
        ("There is not a dog.", "no"),
        ("Yes. There is no doubt.", "yes"),  # only the first sentence
        ("Nothing", "yes"),  # whole words only, and what is not no is yes
        ("NO", "yes"),  # POPE knows No and no
        ("", "yes"),
    ],
)
def test_pope_reads_the_first_sentence(said, read):
    assert pope_answer(said) == read


@pytest.mark.parametrize(
    ("said", "read"),
    [
        ("Yes.", "yes"),
        ("n", "no"),
        ("No, it is", "no"),
        ("yesterday", "yes"),  # the first four letters hold yes
        ("It is yes", None),
        ("", None),
    ],
)
def test_mme_reads_the_first_four_letters(said, read):
    assert mme_answer(said) == read


@pytest.mark.parametrize(
    ("said", "letter"),
    [
        ("B", "B"),
        ("b", "B"),
        ("(B)", "B"),
        ("B.", "B"),
        ("B. cat", "B"),
        ("B: cat", "B"),
        ("(B) cat", "B"),
        ("The answer is B.", "B"),
        ("The answer is (B) because", "B"),
        ("E", None),  # there are four options
        ("Because", None),
        ("a cat", None),
        ("", None),
    ],
)
def test_an_option_is_read_by_its_letter(said, letter):
    assert option_letter(said, 4) == letter


def test_ocrbench_looks_for_the_answer_anywhere():
    assert contains("It says Centre\nCourt", ["centre court", "x"]) == 1
    assert contains("\uff23entre", ["centre"]) == 1  # a full-width letter
    assert contains("cent re", ["centre"]) == 0
    assert contains_verbatim("so X=a+ b", ["X = a + b"]) == 1
    assert contains_verbatim("x = a + b", ["X = a + b"]) == 0


def test_yes_no_numbers_by_hand():
    # yes where yes: 3, yes where no: 1, no where yes: 2, no where no: 4
    said = [True] * 3 + [True] + [False] * 2 + [False] * 4
    true = [True] * 3 + [False] + [True] * 2 + [False] * 4
    # precision 3/4, recall 3/5, f1 = 2 x 0.75 x 0.6 / 1.35 = 2/3, yes 4 of 10
    assert yes_no_summary(said, true) == pytest.approx(
        {"precision": 0.75, "recall": 0.6, "f1": 2 / 3, "yes_share": 0.4}
    )


def test_metrics_by_name():
    assert exact("The Cat.", ["a", "the cat"]) == 1
    assert METRICS["exact"]("Cat", sample("dog", "dog", "cat")) == 1
    assert METRICS["choice"]("I say cat", sample("cat", choices=("cat", "dog"))) == 1
    assert METRICS["choice"]("cat", sample("dog", "dog", "cat")) == 1
    assert METRICS["vqa"]("cat", sample("cat", *["cat"] * 2, *"abcdefgh")) == pytest.approx(0.6)
    assert METRICS["anls"]("abc", sample("abd")) == pytest.approx(2 / 3)
    assert METRICS["contains"]("a cat here", sample("Cat")) == 1
    assert METRICS["letter"]("(b) dog", sample("B", choices=("A", "B"))) == 0  # a small letter with more behind it
    assert METRICS["letter"]("b", sample("B", choices=("A", "B"))) == 1
    assert METRICS["yes_no"]("no, it is not", sample("No")) == 1
    assert METRICS["yes_no"]("perhaps", sample("No")) == 0
    with pytest.raises(TaskError, match="metric= with one of choice, exact, vqa"):
        get_metric("bleu")


def test_questions_of_ones_own_choose_their_metric(tmp_path):
    Image.new("L", (10, 20)).save(tmp_path / "a.png")
    file = tmp_path / "mine.jsonl"
    file.write_text('{"image": "a.png", "question": "What?", "answers": ["cat", "dog", "dog", "cow"]}\n')
    (vqa,) = get_tasks(f"custom:{file},metric=vqa")
    assert vqa.name == f"custom:{file},metric=vqa"
    (only,) = vqa.samples
    assert only.answer == "dog"
    assert vqa.score("dog", only) == pytest.approx(0.5)  # (2 x 1/3 + 2 x 2/3) / 4
    (plain,) = get_tasks([f"jsonl:{file}"])
    assert [plain.score(said, plain.samples[0]) for said in ("cow", "cat", "hen")] == [1, 1, 0]


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("jsonl:a.jsonl,metric=bleu", "unknown metric 'bleu'"),
        ("jsonl:a.jsonl,score=vqa", "jsonl has no option 'score=vqa': type name=value with metric"),
        ("jsonl:a.jsonl,metric=", "no option 'metric='"),
        ("jsonl:a.jsonl,metric=vqa,metric=anls", "metric= twice"),
        ("pope:/data", "pope has no option '/data': type name=value with path"),
        ("pope:", "ends too early"),
        ("pope:paht=/data", "type name=value with path, repo, config, split"),
        ("pope/rare", "type pope/random or pope/popular or pope/adversarial"),
        ("scienceqa/x", "type scienceqa"),
        ("pop", "did you mean 'pope'"),
        ("hf:", "hf:REPO"),
    ],
)
def test_a_wrong_option_says_what_there_is(name, complaint):
    with pytest.raises(TaskError, match=complaint):
        get_tasks(name)


def test_a_list_of_answers_must_be_texts(tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text('{"image": "a.png", "question": "What?", "answers": [1]}\n')
    with pytest.raises(TaskError, match="answers must be a list of texts"):
        _ = get_tasks(f"jsonl:{file}")[0].samples
