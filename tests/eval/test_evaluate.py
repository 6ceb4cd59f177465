"""The runner: right rows, resuming after any interruption, honest intervals, the oracle's order."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

import gripvlm
from eval_cases import KEEPS, PRUNERS, Letters, run, untimed
from gripvlm.errors import BudgetError, GripError, InputError, Interrupted, PrunerError
from gripvlm.eval import (
    ResumeError,
    answer,
    make_inputs,
    question_ids,
    read_results,
    runner,
    samples_path,
)
from gripvlm.eval.answering import prompt_text
from gripvlm.eval.oracle import oracle, oracle_order, spread_order
from gripvlm.eval.records import unpack_masks
from gripvlm.eval.variants import fingerprint
from gripvlm.pruners import get_pruner
from gripvlm.tasks import lab_tasks
from tiny_lab import tiny_lab, write_sample


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run: its result and its samples file's lines."""
    out = tmp_path_factory.mktemp("whole") / "r.json"
    return run(out), out


def test_every_row_is_there_with_full_first(whole):
    result, out = whole
    for task in ("letters", "others"):
        arms = [(row["pruner"], row["keep"]) for row in result["rows"] if row["task"] == task]
        assert arms == [("full", 1.0)] + [(pruner, keep) for pruner in PRUNERS for keep in KEEPS]
    by_keep = {row["keep"]: row for row in result["rows"]}
    assert (by_keep[0.1]["tokens"], by_keep[0.1]["keep_fraction"]) == (26, 26 / 256)
    assert (by_keep[40]["tokens"], by_keep[1.0]["tokens"]) == (40, 256)
    row = result["rows"][1]
    assert row["pruner_config"] == {"name": "random", "seed": 3}
    assert {row["n"] for row in result["rows"]} == {10, 6}
    for row in result["rows"]:
        assert row["ci_low"] <= row["score"] <= row["ci_high"]
        assert row["seconds_prefill"] > 0
        assert row["seconds_vision"] > 0
        assert row["seconds_decode"] > 0
        assert row["blind"] is not None
        assert 0 <= row["majority"] <= 1
    assert json.loads(out.read_text()) == json.loads(json.dumps(result))
    assert len({row["score"] for row in result["rows"]}) > 2, "the test's task tells nothing apart"


def test_the_header_says_how_it_was_measured(whole):
    header = whole[0]["header"]
    assert header["command"] == "test"
    assert header["dtype"] == "float32"
    assert header["batch_size"] == 4
    assert header["versions"]["torch"] == torch.__version__.partition("+")[0] or "+" in header["versions"]["torch"]
    assert header["hardware"]["cores"] >= 1
    assert header["git"] is None or len(header["git"]["commit"]) == 40


def test_means_average_over_tasks(whole):
    result = whole[0]
    grid = [row["score"] for row in result["rows"] if (row["pruner"], row["keep"]) == ("grid", 40)]
    mean = next(row for row in result["means"] if (row["pruner"], row["keep"]) == ("grid", 40))
    assert mean["score"] == pytest.approx(np.mean(grid))
    assert mean["ci_low"] <= mean["score"] <= mean["ci_high"]


def test_scores_are_those_of_generate_inside_a_prune_block(whole):
    """The rows say what a user would get with three lines of their own."""
    model, processor = tiny_lab()
    lines = map(json.loads, samples_path(whole[1]).read_text().splitlines()[2:])
    record = next(r for r in lines if (r["pruner"], r["keep"], r["id"]) == ("grid", "0.1", "letters3"))
    sample = Letters().samples[3]
    inputs = make_inputs(model, processor, [sample.question], [sample.images])
    with gripvlm.prune(model, "grid", keep=0.1):
        ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    said = processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert record["prediction"] == said.strip()


@pytest.mark.parametrize("stop", [1, 2, 9, 17, 30])
def test_an_interrupted_run_resumes_to_the_same_rows(whole, tmp_path, monkeypatch, stop):
    out, calls = tmp_path / "r.json", []

    def stopping(*args, **kwargs):
        calls.append(1)
        if len(calls) == stop:
            raise KeyboardInterrupt
        return answer(*args, **kwargs)

    monkeypatch.setattr(runner, "answer", stopping)
    with pytest.raises(KeyboardInterrupt) as stopped:
        run(out)
    assert not out.exists()
    if stop > 1:  # the first call is the rehearsal, before the samples file is opened
        assert isinstance(stopped.value, Interrupted)
        assert "same command" in str(stopped.value)
    done = calls.copy()
    result = run(out)
    assert untimed(result["rows"]) == untimed(whole[0]["rows"])
    assert untimed(result["means"]) == untimed(whole[0]["means"])
    finished = max(0, stop - 2)  # of 40: 3 + 2 batches, 8 arms; and one rehearsal a run
    assert len(calls) - len(done) == 1 + 40 - finished
    assert len(result["header"]["sessions"]) == (2 if stop > 2 else 1)


@pytest.mark.parametrize("share", [0.2, 0.51, 0.77, 0.999])
def test_a_file_cut_at_any_byte_resumes_to_the_same_rows(whole, tmp_path, share):
    out = tmp_path / "r.json"
    content = samples_path(whole[1]).read_bytes()
    samples_path(out).write_bytes(content[: int(share * len(content))])
    assert untimed(run(out)["rows"]) == untimed(whole[0]["rows"])
    lines = samples_path(out).read_text().splitlines()
    assert all(json.loads(line) for line in lines)


def test_a_finished_run_measures_nothing_again_and_duplicates_count_once(whole, tmp_path, monkeypatch):
    out = tmp_path / "r.json"
    lines = samples_path(whole[1]).read_text().splitlines(keepends=True)
    samples_path(out).write_text("".join([*lines, *lines[5:20]]))
    calls = []
    monkeypatch.setattr(runner, "answer", lambda *args, **kwargs: calls.append(1) or answer(*args, **kwargs))
    assert run(out)["rows"] == whole[0]["rows"]
    assert len(calls) <= 1


def test_a_finished_run_leaves_its_files_as_they_are(whole, tmp_path, monkeypatch, capsys):
    """The header's times are those of the run that measured."""
    out = tmp_path / "r.json"
    for old, new in ((whole[1], out), (samples_path(whole[1]), samples_path(out))):
        new.write_bytes(old.read_bytes())
    monkeypatch.setattr(runner, "answer", lambda *args, **kwargs: pytest.fail("measured again"))
    result = run(out, command="another", progress=True)
    assert result == json.loads(out.read_text())
    assert out.read_bytes() == whole[1].read_bytes()
    assert samples_path(out).read_bytes() == samples_path(whole[1]).read_bytes()
    assert "All 128 answers are in" in " ".join(capsys.readouterr().err.split())


def test_a_finished_run_counts_anew_where_its_rows_are_stale(whole, tmp_path):
    out = tmp_path / "r.json"
    stale = json.loads(whole[1].read_text())
    stale["rows"][0]["score"] = 7
    out.write_text(json.dumps(stale))
    samples_path(out).write_bytes(samples_path(whole[1]).read_bytes())
    run(out)
    assert untimed(json.loads(out.read_text())["rows"]) == untimed(whole[0]["rows"])


def test_a_damaged_line_is_named(whole, tmp_path):
    out = tmp_path / "r.json"
    lines = samples_path(whole[1]).read_text().splitlines(keepends=True)
    lines[6] = lines[6][:40] + "\n"
    samples_path(out).write_text("".join(lines))
    with pytest.raises(ResumeError, match=r"line 7 .* damaged.*--overwrite"):
        run(out)
    del lines[6]
    samples_path(out).write_text("".join(lines))
    assert untimed(run(out)["rows"]) == untimed(whole[0]["rows"])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "seed: 0 then, 1 now"),
        ({"batch_size": 5}, "batch_size"),
        (
            {"keeps": [0.2, 40]},
            r'arms: random:seed=3 0.1 {"name": "random", "seed": 3}, grid 0.1 .* only then, .* only now',
        ),
        ({"pruners": [*PRUNERS[1:], PRUNERS[0]]}, "arms: in another order"),
        ({"pruners": [*PRUNERS, "norm"]}, r'arms: norm 0.1 {"name": "norm"}, norm 40 {"name": "norm"} only now'),
        ({"limit": 3}, "limit"),
    ],
)
def test_another_configuration_is_refused_and_nothing_is_overwritten(whole, tmp_path, change, named):
    out = tmp_path / "r.json"
    content = samples_path(whole[1]).read_text()
    samples_path(out).write_text(content)
    with pytest.raises(ResumeError, match=f"{named}.*--overwrite"):
        run(out, **change)
    assert samples_path(out).read_text() == content


def test_overwrite_starts_anew(whole, tmp_path):
    out = tmp_path / "r.json"
    samples_path(out).write_text(samples_path(whole[1]).read_text())
    result = run(out, overwrite=True, tasks=[Letters(count=2)], keeps=[1], pruners=["grid"])
    assert [row["tokens"] for row in result["rows"]] == [256, 1]
    samples_path(out).unlink()
    with pytest.raises(ResumeError, match="--overwrite"):
        run(out)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"keeps": [300]}, BudgetError, "only 256"),
        ({"pruners": ["gird"]}, PrunerError, "grid"),
        ({"keeps": []}, GripError, "needs a budget"),
        ({"batch_size": 0}, GripError, "1 or more"),
        ({"positions": "odd"}, GripError, "renumbered"),
        ({"pruners": ["blind"]}, GripError, "leave it out"),
    ],
)
def test_mistakes_show_before_anything_is_written(tmp_path, options, error, text):
    with pytest.raises(error, match=text):
        run(tmp_path / "r.json", **options)
    assert list(tmp_path.iterdir()) == []


def test_the_oracle_needs_marked_evidence(tmp_path):
    task = Letters(count=2)
    task.evidence_grid = None
    with pytest.raises(GripError, match="oracle"):
        run(tasks=[task])
    other = Letters(count=2)
    other.evidence_grid = (8, 8)
    with pytest.raises(GripError, match=r"8 x 8 cells.*16"):
        run(tasks=[other])


def test_another_checkpoint_has_another_fingerprint():
    model, _ = tiny_lab()
    before = fingerprint(model)
    weight = model.model.language_model.layers[1].mlp.up_proj.weight
    old = weight[0, 0].item()
    with torch.no_grad():
        weight[0, 0] = old + 1
        changed = fingerprint(model)
        weight[0, 0] = old
    assert changed != before == fingerprint(model)


def test_an_image_goes_through_the_vision_encoder_once_for_all_pruners_and_budgets():
    model, _ = tiny_lab()
    passes = []
    hook = model.base_model.vision_tower.register_forward_hook(lambda _, args, out: passes.append(1))
    try:
        run(tasks=[Letters(count=8)], pruners=["random", "grid", "norm"], keeps=[0.1, 40, 0.5], seeds=[0, 1])
    finally:
        hook.remove()
    assert len(passes) == 2 + 1  # two batches of four, and the rehearsal


def test_what_was_kept_is_recorded(tmp_path):
    out = tmp_path / "r.json"
    run(out, tasks=[Letters(count=2)], pruners=["grid", "pool"], keeps=[40])
    model, processor = tiny_lab()
    sample = Letters(count=2).samples[1]
    inputs = make_inputs(model, processor, [sample.question], [sample.images])
    encoded = gripvlm.encode(model, inputs, [get_pruner("grid")])
    ids = question_ids(processor, [sample.question])
    _, record = gripvlm.prune_inputs(model, inputs, "grid", 40, encoded=encoded, question=ids, return_record=True)
    found = read_results(out)
    (kept,) = unpack_masks(found.of("letters", "grid", "40")["letters1"]["kept"])
    assert kept.mask().nonzero().flatten().tolist() == record.selections[0][0].indices.tolist()
    assert (kept.n, kept.grid, kept.merge) == (256, (16, 16), None)
    assert unpack_masks(found.of("letters", "pool", "40")["letters1"]["kept"])[0].merge is True
    assert unpack_masks(found.of("letters", "full", "1.0")["letters1"]["kept"])[0].mask().all()


# --- the oracle -----------------------------------------------------------------------------------


def test_the_oracle_keeps_evidence_first_then_covers_the_picture():
    order = oracle_order([200, 3, 17], (16, 16))
    assert order[:3] == [200, 3, 17]
    assert sorted(order) == list(range(256))


@pytest.mark.parametrize("grid", [(16, 16), (24, 24), (7, 13), (1, 5), (1, 1)])
def test_every_prefix_of_the_spread_covers_the_picture(grid):
    order = spread_order(grid)
    h, w = grid
    assert sorted(order) == list(range(h * w))
    quarter = [cell // w * 2 // h * 2 + cell % w * 2 // w for cell in range(h * w)]
    area = np.bincount(quarter, minlength=4) / (h * w)
    for k in (16, 32, h * w // 2) if h * w > 64 else ():
        share = np.bincount([quarter[cell] for cell in order[:k]], minlength=4) / k
        assert (share > 0.7 * area).all(), (k, share, area)


def test_the_oracle_keeps_what_is_marked_in_a_real_batch():
    model, processor = tiny_lab()
    samples = Letters().samples[:3]
    inputs = make_inputs(model, processor, [s.question for s in samples], [s.images for s in samples])
    encoded = gripvlm.encode(model, inputs)
    outcome = answer(model, processor, inputs, oracle(samples, encoded, (16, 16)), 2, max_new_tokens=1, encoded=encoded)
    assert [selections[0].indices.tolist() for selections in outcome.selections] == [[0, 1], [1, 2], [2, 3]]


# --- prompts and inputs ---------------------------------------------------------------------------


def test_the_blind_prompt_is_the_same_without_the_image():
    _, processor = tiny_lab()
    assert prompt_text(processor, "is it?") == "<image> is it? answer:"
    assert prompt_text(processor, "is it?", image=False) == "is it? answer:"


def test_a_processor_without_a_template_gets_image_and_question():
    class Bare:
        chat_template = None
        image_token = "<img>"

    assert prompt_text(Bare(), "Q?") == "<img>\nQ?"
    assert prompt_text(Bare(), "Q?", image=False) == "Q?"


def test_a_question_may_not_bring_its_own_placeholder():
    model, processor = tiny_lab()
    for images in ([Image.new("RGB", (64, 64))], None):
        with pytest.raises(InputError, match="holds <image>, the model's own placeholder"):
            make_inputs(model, processor, ["an <image> of what?"], images)


def test_batches_are_padded_on_the_left_and_a_template_may_bring_its_own_start():
    model, processor = tiny_lab()
    image = Image.new("RGB", (64, 64))
    inputs = make_inputs(model, processor, ["is it?", "is there a big red cat?"], [image, image])
    assert inputs["attention_mask"][0, 0] == 0
    assert inputs["attention_mask"][:, -1].tolist() == [1, 1]
    old = processor.chat_template
    processor.chat_template = "<s>" + old
    try:
        ids = make_inputs(model, processor, ["is it?"], [image])["input_ids"][0]
    finally:
        processor.chat_template = old
    assert (ids == processor.tokenizer.bos_token_id).sum() == 1


def test_the_lab_sample_runs_end_to_end(tmp_path, monkeypatch):
    monkeypatch.setitem(lab_tasks.SAMPLES, "lab", write_sample(tmp_path, pictures=2))
    result = run(tasks="lab", pruners=["pool", "divprune", "norm"], keeps=[0.25], limit=2)
    assert {row["task"] for row in result["rows"]} == {f"lab/{family}" for family in lab_tasks.FAMILIES}
    extras = {row["task"]: row["extras"] for row in result["rows"]}
    assert "f1" in extras["lab/existence"]
    assert "accuracy_plus" in extras["lab/perception"]


def test_a_pruner_inside_the_language_model_is_scored_by_what_the_layers_pay(tmp_path):
    """Two layers, all 256 tokens in the first, so 200 on average leave 144 for the second."""
    out = tmp_path / "r.json"
    result = run(out, pruners=["fastv:layer=1", "random"], keeps=[200], tasks=[Letters()])
    rows = {row["pruner"]: row for row in result["rows"]}
    assert rows["fastv:layer=1"]["tokens"] == rows["random"]["tokens"] == 200
    records = [json.loads(line) for line in samples_path(out).read_text().splitlines()[1:]]
    layers = {json.dumps(r.get("layers")) for r in records if r.get("pruner") == "fastv:layer=1"}
    assert layers == {"[[256, 144]]"}
    with pytest.raises(BudgetError, match="pass keep=129 or more"):
        run(pruners=["fastv:layer=1"], keeps=[0.1], tasks=[Letters()])
