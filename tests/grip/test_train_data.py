"""What training draws: budgets, and the questions of each step."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gripvlm.errors import TrainError
from gripvlm.grip.train import Engine
from gripvlm.grip.train.data import (
    QuestionStream,
    check_apart,
    check_pictures,
    draw_counts,
    generator,
    load_questions,
    pictures_of,
    split,
)
from gripvlm.tasks import Sample
from tiny_train import Asked, asked, drawn, pairs, picture, tiny_config, tiny_vlm, write_jsonl, write_several


@pytest.fixture(scope="module")
def engine():
    return Engine(*tiny_vlm())


# --- budgets ------------------------------------------------------------------------------------------------------


def counts(groups: int = 4000, n: int = 1000, **changes) -> torch.Tensor:
    config = tiny_config(**changes)
    return draw_counts(config, torch.full((groups,), n), torch.arange(groups), drawn())


def test_budgets_lie_between_their_bounds_log_uniformly():
    found = counts(keep_low=0.01, keep_high=0.64)
    assert 10 <= int(found.min()) <= 11
    assert 600 <= int(found.max()) <= 640
    assert float(found.float().median()) == pytest.approx(80, rel=0.1)  # the root of 10 x 640


def test_budgets_that_are_listed_are_drawn_alike_and_no_others():
    found, times = counts(budgets="choices", keep_choices="0.5,0.03,0.5,1").unique(return_counts=True)
    assert found.tolist() == [30, 500, 1000]
    assert (times / (4000 / 3) - 1).abs().max() < 0.1
    for budgets, choices, message in (("choices", "", "set keep_choices"), ("log_uniform", "0.5", "by budgets = 'cho")):
        with pytest.raises(TrainError, match=message):
            tiny_config(budgets=budgets, keep_choices=choices)


def test_images_of_a_question_share_their_fraction_and_keep_one_at_least():
    sizes, owner = torch.tensor([100, 50, 1, 40, 7]), torch.tensor([0, 0, 0, 1, 1])
    for seed in range(20):
        kept = draw_counts(tiny_config(keep_low=0.02, keep_high=1.0), sizes, owner, drawn(seed))
        assert abs(int(kept[0]) / 100 - int(kept[1]) / 50) <= 0.02
        assert ((kept >= 1) & (kept <= sizes)).all()
        assert kept[2] == 1


# --- data ---------------------------------------------------------------------------------------------------------


def test_the_stream_is_told_by_seed_and_number_and_an_epoch_is_every_image_once():
    questions = pairs(asked(pictures=7, each=3))
    stream, again, other = (QuestionStream(questions, 2, 2, seed) for seed in (1, 1, 2))
    forward = [[s.id for _, s in stream.batch(i)] for i in range(14)]
    assert [[s.id for _, s in again.batch(i)] for i in reversed(range(14))] == forward[::-1]
    assert [[s.id for _, s in other.batch(i)] for i in range(14)] != forward
    assert len(stream) == 7
    seen = [name.split("-")[0] for batch in forward for name in batch]
    assert all(a == b for a, b in zip(seen[::2], seen[1::2], strict=True))  # two questions an image, side by side
    for epoch in (seen[:14], seen[14:28]):
        assert sorted(epoch[::2]) == [str(i) for i in range(7)]
    assert seen[:14] != seen[14:28]
    assert len({name for batch in forward for name in batch}) > 14  # not the same two questions every time


def test_pictures_of_two_tasks_are_not_mixed_up(tmp_path, engine):
    """Two files that both call their pictures 0.png, and number their questions from 1."""
    write_jsonl(tmp_path / "a", 3)
    write_jsonl(tmp_path / "b", 3)
    for i in range(3):
        picture(50 + i).save(tmp_path / "b" / f"{i}.png")
    questions = [pair for name in "ab" for pair in load_questions(str(tmp_path / name / "q.jsonl"))]
    stream = QuestionStream(questions, 2, 2, 0)
    assert len(stream) == 6
    batch = engine.prepare([questions[0], questions[6]])
    assert not torch.allclose(batch.tokens[0][0].features, batch.tokens[1][0].features)
    stream.skip(questions[0], "why")
    left = [(task.name, s.id) for i in range(3) for task, s in stream.batch(i)]
    assert len(left) == 11
    assert (questions[0][0].name, "1") not in left
    assert (questions[6][0].name, "1") in left


def test_the_same_file_in_two_tasks_is_one_picture(tmp_path):
    file = write_jsonl(tmp_path, 3)
    assert len(QuestionStream(load_questions(str(file)) + load_questions(str(file)), 2, 2, 0)) == 3


def test_questions_about_several_pictures_are_grouped_by_all_of_them(tmp_path):
    questions = load_questions(str(write_several(tmp_path)))
    ids = {sample.id: pictures_of(task, sample) for task, sample in questions}
    assert ids["q1"] == ids["q3"]
    assert len(set(ids.values())) == 5  # the order counts, too: it is another prompt
    stream = QuestionStream(questions, 1, 2, 0)
    assert sorted(sorted(s.id for _, s in stream.batch(i)) for i in range(5)) == [
        *(["q0"], ["q1", "q3"], ["q2"], ["q4"], ["q5"])
    ]
    made = [Sample(f"m{i}", (lambda: picture(0), lambda: picture(1)), "q", "a", image_id="0") for i in range(2)]
    assert len({pictures_of(Asked(made), sample) for sample in made}) == 2  # what functions make is not known


def test_no_picture_is_on_both_sides_of_the_split(tmp_path):
    questions = load_questions(str(write_several(tmp_path)))
    found = set()
    for share in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8):
        try:
            sides = split(questions, share)
        except TrainError:
            continue
        train, held = ({path for _, sample in side for path in sample.pictures} for side in sides)
        assert not train & held
        found.add(len(held))
    assert found


def test_each_picture_of_a_question_must_be_there_and_validation_is_apart(tmp_path):
    questions = load_questions(str(write_several(tmp_path)))
    with pytest.raises(TrainError, match="1 of 1 validation questions are training questions too, such as 'q1'"):
        check_apart(questions, [questions[1]])
    swapped = replace(questions[1][1], pictures=questions[1][1].pictures[::-1])
    check_apart(questions, [(questions[1][0], swapped)])
    (tmp_path / "1.png").unlink()
    with pytest.raises(TrainError, match=r"sample 'q1' asks about '.*1\.png', .* no such file \(and 2 more samples\)"):
        check_pictures(questions)


def test_a_stream_with_nothing_left_stops():
    stream = QuestionStream(pairs(asked(pictures=1, each=2)), 1, 2, 0)
    stream.skip(stream.questions[0], "first")
    assert [s.id for _, s in stream.batch(0)] == ["0-1"]
    with pytest.raises(TrainError, match="not one of 2 questions can be used; the last: second"):
        stream.skip(stream.questions[1], "second")


def test_split_takes_whole_pictures_and_never_changes():
    questions = pairs(asked(pictures=40, each=2))
    train, held = split(questions, 0.25)
    images = [{s.image_id for _, s in part} for part in (train, held)]
    assert not images[0] & images[1]
    assert len(train) + len(held) == 80
    assert 4 <= len(images[1]) <= 17
    shuffled = [questions[i] for i in torch.randperm(80, generator=drawn()).tolist()]
    assert {s.id for _, s in split(shuffled[:60], 0.25)[1]} <= {s.id for _, s in held}
    assert {s.image_id for _, s in split(questions, 0.5)[1]} > images[1]
    for share, side in ((0.0001, "validation"), (0.9999, "training")):
        with pytest.raises(TrainError, match=f"leaves none for {side}; type another --eval-share, bring more pictures"):
            split(questions, share)
    with pytest.raises(TrainError, match="no questions"):
        load_questions(Asked([]))


def test_streams_of_random_numbers_differ_by_name():
    firsts = [float(torch.rand((), generator=generator(*name))) for name in ((0, "a"), (0, "b"), (1, "a"), (0, "a", 1))]
    assert len(set(firsts)) == 4
    assert firsts[0] == float(torch.rand((), generator=generator(0, "a")))
