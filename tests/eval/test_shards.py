"""Seeds, shards and their merge: many machines give what one gives."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from test_evaluate import Letters, run, untimed

from gripvlm.api import encode
from gripvlm.cli import main
from gripvlm.errors import GripError
from gripvlm.eval import ResultsError, make_inputs, merge, question_ids, read_results, samples_path
from gripvlm.eval.chunks import Shard
from gripvlm.eval.kept import unpacked
from gripvlm.eval.variants import digest, make_arms
from gripvlm.pruners import get_pruner
from gripvlm.report.points import command_of
from tiny_lab import tiny_lab

TASKS = [Letters(), Letters("others", 6)]
PLAN = {"tasks": TASKS, "pruners": ["random", "grid"], "keeps": [0.1], "seeds": [0, 1]}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A run in one piece, and its two shards."""
    folder = tmp_path_factory.mktemp("shards")
    names = ("whole", "a", "b")
    for name, shard in zip(names, (None, "1/2", "2/2"), strict=True):
        run(folder / f"{name}.json", **PLAN, shard=shard)
    return [folder / f"{name}.json" for name in names]


def answers(path):
    """Every record without its times, in order."""
    lines = [json.loads(line) for line in samples_path(path).read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines if "task" in line]


def test_two_shards_merged_equal_one_run(parts, tmp_path):
    whole, *shards = parts
    out = tmp_path / "c.json"
    result = merge(shards[::-1], out, tasks=TASKS, command="merge")
    one = json.loads(whole.read_text())
    assert untimed(result["rows"]) == untimed(one["rows"])
    assert untimed(result["means"]) == untimed(one["means"])
    assert answers(out) == answers(whole)
    assert json.loads(out.read_text()) == json.loads(json.dumps(result))
    sizes = [sum(row["n"] for row in read_results(part).rows) for part in shards]
    assert sum(sizes) == sum(row["n"] for row in one["rows"])
    assert min(sizes) > 0
    assert [head["shard"] for head in result["header"]["shards"]] == ["1/2", "2/2"]
    seconds = np.mean([r["seconds"]["prefill"] for r in read_results(out).of("letters", "grid", "0.1").values()])
    row = next(row for row in result["rows"] if row["pruner"] == "grid")
    assert row["seconds_prefill"] == pytest.approx(seconds)


def test_a_merged_file_is_gone_on_from_as_a_finished_run(parts, tmp_path, monkeypatch):
    from gripvlm.eval import runner

    out = tmp_path / "c.json"
    merge(parts[1:], out, tasks=TASKS)
    monkeypatch.setattr(runner, "answer", lambda *args, **kwargs: pytest.fail("measured again"))
    assert run(out, **PLAN)["rows"] == json.loads(out.read_text())["rows"]


def edited(path, folder, change):
    """A copy of a shard with another configuration."""
    new = folder / f"{len(list(folder.iterdir()))}-{path.name}"
    result, lines = json.loads(path.read_text()), samples_path(path).read_text().splitlines()
    head = json.loads(lines[0])
    for one in (result["header"], head["config"]):
        one.update(change)
    result["samples"] = samples_path(new).name
    new.write_text(json.dumps(result))
    samples_path(new).write_text("\n".join([json.dumps(head), *lines[1:]]) + "\n")
    return new


def test_what_cannot_be_merged_is_said_and_nothing_is_written(parts, tmp_path):
    whole, a, b = parts
    out = tmp_path / "c.json"
    for files, says in (
        ([a], "two or more shards"),
        ([a, a], "shard 1/2 is there twice"),
        ([a, whole], "no shard but a run of its own"),
        ([a, edited(b, tmp_path, {"shard": "2/3"})], "shard: of 2 there, of 3 here"),
        ([a, edited(b, tmp_path, {"seed": 1})], "different runs.*seed: 0 there, 1 here"),
        ([edited(a, tmp_path, {"shard": "1/3"}), edited(b, tmp_path, {"shard": "2/3"})], "shard 3/3 is missing"),
        ([a, edited(a, tmp_path, {"shard": "2/2"})], "an answer that another shard has too"),
        ([a, tmp_path / "none.json"], "there is no file"),
    ):
        with pytest.raises(ResultsError, match=says):
            merge(files, out, tasks=TASKS)
        assert not out.exists()
        assert not samples_path(out).exists()
    out.write_text("mine")
    with pytest.raises(ResultsError, match="exists: type another --out, or --overwrite"):
        merge([a, b], out, tasks=TASKS)
    assert out.read_text() == "mine"
    merge([a, b], out, tasks=TASKS, overwrite=True)
    with pytest.raises(ResultsError, match=r"asked others, but the tasks given are letters, my others: pass those"):
        merge([a, b], tmp_path / "d.json", tasks=[TASKS[0], Letters("my others", 6)])
    with pytest.raises(ResultsError, match="other questions here"):
        merge([a, b], tmp_path / "d.json", tasks=[Letters(count=9), TASKS[1]])


def test_tasks_whose_names_end_alike_are_told_apart(tmp_path):
    tasks = [Letters("my letters", 6), Letters("letters", 8)]
    plan = {"tasks": tasks, "pruners": ["grid"], "keeps": [0.1]}
    parts = [tmp_path / f"{i}.json" for i in (1, 2)]
    for i, part in enumerate(parts, 1):
        run(part, **plan, shard=f"{i}/2")
    result = merge(parts, tmp_path / "c.json", tasks=tasks[::-1])
    assert {row["task"]: row["n"] for row in result["rows"]} == {"my letters": 6, "letters": 8}


def test_shards_of_a_benchmark_in_a_folder_are_merged_from_that_folder(tmp_path):
    pytest.importorskip("datasets", reason="pip install 'gripvlm[tasks]'")
    from tiny_benchmarks import pope_rows, write

    spec = f"pope/random:path={write(pope_rows(), tmp_path / 'data' / 'pope.parquet')}"
    parts = [tmp_path / f"{i}.json" for i in (1, 2)]
    for i, part in enumerate(parts, 1):
        run(part, tasks=spec, pruners=["grid"], keeps=[0.1], shard=f"{i}/2")
    result = merge(parts, tmp_path / "c.json")
    assert result["header"]["task_specs"] == [spec]
    assert {(row["task"], row["n"]) for row in result["rows"]} == {("pope/random", 10)}
    whole = read_results(tmp_path / "c.json")
    assert f"--tasks {spec}" in command_of(
        dataclasses.replace(whole, content=whole.content | {"header": whole.header | {"command": "gripvlm eval"}}),
        ("grid",),
        0.1,
    )


def test_other_accepted_answers_are_other_questions():
    plain = Letters(count=2).samples
    assert digest(plain) == "4ff23bb34f23f27a"
    first, second = (
        [dataclasses.replace(sample, answers=answers) for sample in plain] for answers in (("a", "b"), ("a", "c"))
    )
    assert len({digest(plain), digest(first), digest(second)}) == 3


@pytest.mark.parametrize("text", ["0/2", "3/2", "2", "a/b", "1/0", "-1/2"])
def test_a_shard_is_i_of_n(text):
    with pytest.raises(GripError, match="i/n"):
        Shard.parse(text)


def test_a_shard_without_work_is_said(tmp_path):
    with pytest.raises(GripError, match=r"are only 5 batches of 4. Type at most 5 shards, or type a sm"):
        run(tmp_path / "r.json", shard="6/6")
    with pytest.raises(GripError, match=r"is only 1 batch of 8. Leave --shard out, or type a smaller --batch"):
        run(tmp_path / "r.json", tasks=[Letters(count=3)], batch_size=8, shard="2/2")
    assert list(tmp_path.iterdir()) == []


def test_seeds_are_given_to_pruners_that_have_one_and_none_typed():
    arms = make_arms(["random", "random:seed=7", "grid", "oracle"], [8], blind=False, seeds=[3, 4])
    assert [(arm.label, arm.config.get("seed")) for arm in arms] == [
        ("full", None),
        ("random:seed=3", 3),
        ("random:seed=4", 4),
        ("random:seed=7", 7),
        ("grid", None),
        ("oracle", None),
    ]


def test_an_object_gets_seeds_too():
    arms = make_arms([get_pruner("random"), get_pruner("random", seed=7)], [8], blind=False, seeds=[3, 4])
    assert [arm.config.get("seed") for arm in arms] == [None, 3, 4, 7]


def test_seeds_in_wrappers_are_their_own():
    arms = make_arms(["mmr(random:seed=5)"], [8], blind=False, seeds=[1, 2])
    assert [arm.label for arm in arms] == ["full", "mmr(random:seed=5)"]


def test_arms_know_whether_they_were_trained():
    arms = make_arms(["mmr(norm)", "grid"], [8], blind=False)
    assert not any(arm.trained for arm in arms)
    assert {arm.label: arm.trained for arm in make_arms(["grip", "mmr(grip)"], [8], blind=False)} == {
        "full": False,
        "grip": True,
        "mmr(grip)": True,
    }


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
    inputs = make_inputs(model, processor, [sample.question], [sample.image])
    from gripvlm.api import prune_inputs

    encoded = encode(model, inputs, [get_pruner("grid")])
    ids = question_ids(processor, [sample.question])
    _, record = prune_inputs(model, inputs, "grid", 40, encoded=encoded, question=ids, return_record=True)
    found = read_results(out)
    (kept,) = unpacked(found.of("letters", "grid", "40")["letters1"]["kept"])
    assert kept.mask().nonzero().flatten().tolist() == record.selections[0][0].indices.tolist()
    assert (kept.n, kept.grid, kept.merge) == (256, (16, 16), None)
    assert unpacked(found.of("letters", "pool", "40")["letters1"]["kept"])[0].merge is True
    assert unpacked(found.of("letters", "full", "1.0")["letters1"]["kept"])[0].mask().all()


def test_a_shard_without_a_file_would_be_lost(capsys):
    assert main(["eval", "--shard", "1/2", "--limit", "1"]) == 2
    assert "leaves nothing to merge" in capsys.readouterr().err
    assert main(["eval", "--seeds", "a", "--limit", "1"]) == 2
    assert "whole numbers" in capsys.readouterr().err
