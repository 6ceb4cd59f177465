"""Questions about several pictures, from the file to the results: prompts, budgets, the oracle, records, intervals."""

from __future__ import annotations

import pytest
import torch

import gripvlm
from gripvlm.eval import evaluate, interval, make_inputs, read_results
from gripvlm.eval.oracle import oracle, spread_order
from gripvlm.eval.records import unpack_masks
from gripvlm.eval.variants import digest
from gripvlm.report import build
from gripvlm.report.points import comparisons
from gripvlm.tasks import Sample, TaskError, get_tasks
from tiny_train import SEVERAL, Counted, picture, tiny_vlm, write_several


@pytest.fixture(scope="module")
def vlm():
    return tiny_vlm()


@pytest.fixture(scope="module")
def measured(vlm, tmp_path_factory):
    """The task and the results file of one run at a quarter of the tokens."""
    folder = tmp_path_factory.mktemp("several")
    (task,) = get_tasks(f"jsonl:{write_several(folder)}")
    task.score = lambda prediction, sample: sum(map(ord, prediction)) % 3 / 2  # an untrained model is never right
    options = {"batch_size": 4, "out": folder / "r.json", "model_name": "tiny"}
    with Counted(vlm[0]) as counted:
        evaluate(*vlm, [task], ["grid", "oracle"], [0.25], **options)
    assert counted.pictures == sum(map(len, SEVERAL)) + sum(map(len, SEVERAL[:4]))  # the rehearsal's batch once more
    return task, read_results(folder / "r.json")


@pytest.mark.parametrize("number", [1, 4])
def test_a_record_is_what_a_prune_block_says(vlm, measured, number):
    model, processor = vlm
    task, results = measured
    sample, count = task.samples[number], len(SEVERAL[number])
    inputs = make_inputs(model, processor, [task.prompt(sample)], [[picture(p) for p in SEVERAL[number]]])
    text = processor.decode(inputs["input_ids"][0])
    assert text.count("<image>") == 16 * count
    assert text.rindex("<image>") < text.index(sample.question)
    with gripvlm.prune(model, "grid", 0.25) as record:
        ids = model.generate(**inputs, max_new_tokens=task.max_new_tokens, do_sample=False)
    answer = results.of(task.name, "grid", "0.25")[sample.id]
    said = processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer["prediction"] == said.strip()
    assert (answer["k"], answer["n"]) == (4 * count, 16 * count)
    masks = [mask.mask() for mask in unpack_masks(answer["kept"])]
    assert len(masks) == count
    assert all(torch.equal(a, b.mask()) for a, b in zip(masks, record.selections[0], strict=True))


def test_without_images_all_pictures_are_gone(vlm, measured):
    model, processor = vlm
    task, results = measured
    sample = task.samples[4]
    ids = make_inputs(model, processor, [task.prompt(sample)], None)
    assert "<image>" not in processor.decode(ids["input_ids"][0])
    said = model.generate(**ids, max_new_tokens=task.max_new_tokens, do_sample=False)[0, ids["input_ids"].shape[1] :]
    answer = results.of(task.name, "blind", "")[sample.id]
    assert answer["prediction"] == processor.tokenizer.decode(said, skip_special_tokens=True).strip()
    assert (answer["k"], answer["n"]) == (0, 0)


def test_the_oracles_budget_is_that_of_all_pictures(vlm, measured):
    """Sixteen tokens of four pictures: the three that are evidence, then what covers all pictures evenly."""
    task, results = measured
    kept = unpack_masks(results.of(task.name, "oracle", "0.25")["q4"]["kept"])
    wanted: list[list[int]] = [[5], [], [], [7, 0]]
    for place in spread_order((4, 4)):
        for cells in wanted:
            if place not in cells and sum(map(len, wanted)) < 16:
                cells.append(place)
    assert [mask.mask().nonzero().flatten().tolist() for mask in kept] == [sorted(cells) for cells in wanted]


def test_the_oracle_ranks_in_the_order_of_the_row(vlm):
    model, processor = vlm
    images = (lambda: picture(0), lambda: picture(1))
    sample = Sample("a", images, "is there a cat?", "yes", evidence=(16 + 9, 3, 16 + 2, 16 + 14, 14))
    inputs = make_inputs(model, processor, [sample.question], [sample.images])
    encoded = gripvlm.encode(model, inputs)
    for k, wanted in ((1, [[3], [9]]), (2, [[3], [2, 9, 14]])):
        _, record = gripvlm.prune_inputs(
            model, inputs, oracle([sample], encoded, (4, 4)), k, encoded=encoded, return_record=True
        )
        assert [selection.indices.tolist() for selection in record.selections[0]] == wanted
    beyond = Sample("b", images, "is there a cat?", "yes", evidence=(32,))
    with pytest.raises(TaskError, match=r"'b' marks patch 32, but evidence_grid \[4, 4\] has patches 0 to 31 in 2 pic"):
        oracle([beyond], encoded, (4, 4))
    with pytest.raises(TaskError, match=r"4 x 4 cells, but this model has visual tokens 16 in \(4, 4\) \+ 16"):
        oracle([Sample("c", images[:1], "is there a cat?", "yes")], encoded, (4, 4))


def test_intervals_are_over_clusters_of_pictures(measured):
    task, results = measured
    row = next(row for row in results.rows if row["pruner"] == "grid")
    answers = results.of(task.name, "grid", "0.25")
    scores = [answers[f"q{q}"]["score"] for q in range(6)]
    assert len(set(scores)) > 1
    assert (row["ci_low"], row["ci_high"]) == interval([(scores, ["a", "a", "a", "a", "b", "c"])], 0)
    (one,) = comparisons([results])
    assert len(one.scores.images) == 3
    assert (row["tokens"], row["keep_fraction"]) == (4 * 12 / 6, 0.25)


def test_another_picture_is_another_question(measured):
    task, _ = measured
    before = digest(task.samples)
    other = [Sample(**vars(sample) | {"pictures": sample.pictures[:1] * 2}) for sample in task.samples[1:2]]
    assert digest(other) != digest(task.samples[1:2])
    assert digest(task.samples) == before


def test_each_picture_of_a_question_is_drawn(vlm, measured):
    task, results = measured
    (one,) = comparisons([results])
    point = next(point for point in one.points if point.method == "grid")
    question = build.Question(task.name, "q4", True, {}, task.samples[4])
    drawn = list(build.Page([one], "grid", True)._pictures(one, question, point, vlm[1]))
    assert [one.title for one in drawn] == [f"grid, 16 of 64 tokens picture {i}" for i in (1, 2, 3, 4)]
    assert len({one.path for one in drawn}) == 4
