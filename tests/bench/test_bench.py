"""`gripvlm bench`: numbers that fit one another, an order that cancels drift, what fails fails alone."""

from __future__ import annotations

import copy
import json
import time
from dataclasses import replace

import pytest
import torch

from gripvlm.bench import BenchInterrupted, architecture, bench, random_prompts, real_prompts, shapes
from gripvlm.bench import runner as bench_runner
from gripvlm.bench.measure import FULL, Cell, Setting, generated
from gripvlm.bench.roofline import Machine, Weights, measured, spread
from gripvlm.bench.runner import settings_of, turns
from gripvlm.budget import Budget
from gripvlm.cli import main
from gripvlm.errors import BudgetError, GripError
from gripvlm.models.hooks.attention import blocks_of
from gripvlm.models.text import visual_places
from gripvlm.pruners import get_pruner
from tiny_lab import tiny_lab

CPU = torch.device("cpu")
PROMPT, NEW, N = 12, 3, 16
LAYERS, WIDTH, HEADS, KV, HEAD, MLP, VOCABULARY = 4, 48, 4, 2, 12, 96, 99
HALF = Budget(0.5)
MACHINE = Machine(1e10, 1e10, 8, 8)


@pytest.fixture(scope="module")
def tiny():
    return shapes.random_model("random:tiny", CPU, torch.float32)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(bench_runner, "measured", lambda device, dtype: MACHINE)


def prompts(model, name="tiny"):
    return lambda batch, length: random_prompts(model, architecture(name), batch, length, 112)


def chosen(model, *specs):
    return [(spec, shapes.random_pruner(spec, model)) for spec in specs]


def small(model, **options):
    given = {"batches": [1], "lengths": [PROMPT], "new": NEW, "repeats": 2} | options
    return bench(model, prompts(model), chosen(model, "norm"), [HALF], **given)


@pytest.fixture(scope="module")
def result(tiny, tmp_path_factory):
    """Two batch sizes, three pruners, and the file that was written."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_runner, "measured", lambda device, dtype: MACHINE)
        out = tmp_path_factory.mktemp("bench") / "new" / "bench.json"
        made = bench(
            tiny,
            prompts(tiny),
            chosen(tiny, "norm", "grip", "fastv:layer=1"),
            [HALF],
            batches=[1, 2],
            lengths=[PROMPT],
            new=NEW,
            repeats=3,
            out=out,
            about={"name": "random:tiny"},
        )
    assert json.loads(out.read_text()) == json.loads(json.dumps(made))
    return made


def of(result, setting, batch=1):
    (found,) = [row for row in result["rows"] if row["setting"] == setting and row["batch"] == batch]
    return found


def test_every_setting_is_measured_at_every_batch_size(result):
    names = ["full", "limit 0.5", "norm 0.5", "grip 0.5", "fastv:layer=1 0.5"]
    assert [(row["batch"], row["setting"]) for row in result["rows"]] == [(b, name) for b in (1, 2) for name in names]
    assert result["schema"] == "gripvlm.bench/1"
    assert result["finished"] is True
    assert result["model"]["name"] == "random:tiny"
    assert result["model"]["dtype"] == "float32"
    assert {"versions", "hardware", "git"} == result["environment"].keys()
    assert result["command"]
    for row in result["rows"]:
        assert row["visual_tokens"] == N
        assert row["kept"] == pytest.approx(N if row["kind"] == "full" else N / 2, abs=0.5)  # fastv: to half a token
        assert row["turns"] == 3


def test_parts_add_up_to_the_whole(result):
    for row in result["rows"]:
        for run in row["runs"]:
            before = run["vision"] + run["pruner"] + run["overhead"] + run["other"]
            assert before + run["prefill"] == pytest.approx(run["first_token"])
            assert run["first_token"] + run["decode"] == pytest.approx(run["whole"])
            assert min(run[phase] for phase in ("vision", "prefill", "decode", "whole")) > 0
            assert run["other"] > -1e-6
            assert (run["pruner"] + run["overhead"] > 0) == (row["kind"] == "pruned")
        for phase, value in row["seconds"].items():
            assert value["low"] <= value["median"] <= value["high"], phase
        assert row["seconds"]["decode_token"]["median"] == pytest.approx(row["seconds"]["decode"]["median"] / (NEW - 1))


def test_the_whole_is_what_a_clock_outside_sees(tiny):
    cell = Cell(tiny, prompts(tiny)(1, PROMPT), [HALF], NEW)
    for setting in settings_of(chosen(tiny, "norm"), [HALF]):
        began = time.perf_counter()
        seconds, peak = cell.timed(setting)
        outside = time.perf_counter() - began
        assert 0 < seconds["whole"] <= outside
        assert peak is None  # a CPU does not say


def test_kv_bytes_are_those_of_the_formula(result):
    for row in result["rows"]:
        if row["pruner"] != "fastv:layer=1":
            tokens = row["batch"] * (PROMPT + row["kept"] + NEW - 1)
            assert row["kv_bytes"] == 2 * LAYERS * KV * HEAD * 4 * tokens
            assert row["to_full"]["kv_bytes"] == (PROMPT + row["kept"] + NEW - 1) / (PROMPT + N + NEW - 1)
    inside = of(result, "fastv:layer=1 0.5")["kv_bytes"]  # dropped tokens stay in the first layers
    assert inside < of(result, "full")["kv_bytes"]


def formula(tokens, queries=None):
    """FLOPs of a forward of the tiny Llama over `queries` of `tokens`, one sample, logits of the last."""
    queries = tokens if queries is None else queries
    linear = 2 * WIDTH * (2 * WIDTH + 2 * KV * HEAD + 3 * MLP)
    attention = 4 * queries * tokens * HEADS * HEAD
    return LAYERS * (queries * linear + attention) + 2 * WIDTH * VOCABULARY


def test_flops_are_those_of_the_formula(result):
    for row in result["rows"]:
        if row["pruner"] == "fastv:layer=1":
            continue
        length = PROMPT + int(row["kept"])
        assert row["flops"]["prefill"] == row["batch"] * formula(length)
        assert row["flops"]["decode"] == row["batch"] * sum(formula(length + i, 1) for i in range(1, NEW))
        assert row["to_full"]["flops_prefill"] == formula(length) / formula(PROMPT + N)
        parts = ("vision", "pruning", "prefill", "decode")
        assert row["flops"]["whole"] == sum(row["flops"][part] for part in parts)
    assert of(result, "norm 0.5")["flops"]["pruning"] == of(result, "full")["flops"]["pruning"] == 0
    assert of(result, "grip 0.5")["flops"]["pruning"] > 0
    assert of(result, "full", 2)["flops"]["vision"] == 2 * of(result, "full")["flops"]["vision"] > 0


def test_ratios_are_taken_turn_by_turn(result):
    full, limit, row = (of(result, name) for name in ("full", "limit 0.5", "grip 0.5"))
    for phase in ("vision", "prefill", "first_token", "decode", "whole"):
        for other, ratios in ((full, row["to_full"]), (limit, row["to_limit"])):
            pairs = zip(row["runs"], sorted(other["runs"], key=lambda run: run["turn"]), strict=True)
            assert ratios[phase] == spread([a[phase] / b[phase] for a, b in pairs])
    added = [
        (a["pruner"] + a["overhead"] + a["other"]) / b["prefill"]
        for a, b in zip(row["runs"], full["runs"], strict=True)
    ]
    assert row["to_full"]["added"] == spread(added)
    assert full["to_full"]["whole"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    assert full["to_limit"] is None


def test_the_roofline_is_arithmetic_or_bytes_whichever_takes_longer(result, tiny):
    row, weights = of(result, "full", 2), Weights.of(tiny)
    table = VOCABULARY * WIDTH * 4
    assert weights.language + weights.vision + table == sum(p.nbytes for p in tiny.parameters())
    assert weights.vision == sum(
        p.nbytes for part in (tiny.model.vision_tower, tiny.model.multi_modal_projector) for p in part.parameters()
    )
    least = max(row["flops"]["prefill"] / 1e10, weights.language / 1e10)
    assert row["roofline"]["prefill"] == pytest.approx(least / row["seconds"]["prefill"]["median"])
    a_token = max(row["flops"]["decode"] / (NEW - 1) / 1e10, (weights.language + row["kv_bytes"]) / 1e10)
    assert row["roofline"]["decode"] == pytest.approx(a_token / row["seconds"]["decode_token"]["median"])


def test_tied_embeddings_are_read_as_the_output_head():
    shape = architecture("tiny")
    config = copy.deepcopy(shape.config) | {"tie_word_embeddings": True}
    config["text_config"] = config["text_config"] | {"tie_word_embeddings": True}
    from transformers import AutoConfig, AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model("llava", **config))
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    weights = Weights.of(model)
    assert weights.language + weights.vision == sum(p.nbytes for p in model.parameters())


def test_the_machine_is_measured():
    found = measured(CPU, torch.float32, seconds=0.01)
    assert found.flops > 1e7
    assert found.bandwidth > 1e7
    assert Machine(10.0, 5.0, 1, 1).seconds(100, 5) == 10
    assert Machine(10.0, 5.0, 1, 1).seconds(10, 50) == 10


@pytest.mark.parametrize("name", ["tiny", "tiny-qwen"])
def test_the_limit_is_a_prompt_that_had_so_few_tokens(name):
    model = shapes.random_model(name, CPU, torch.float32)
    inputs = prompts(model, name)(2, PROMPT)
    cell = Cell(model, inputs, [HALF], NEW)
    n = cell.sizes[0]
    assert int(visual_places(model, inputs["input_ids"][:1]).sum()) == n
    assert inputs["input_ids"].shape == (2, PROMPT + n)
    for keep, k in ((None, n), (HALF, n // 2)):
        arguments = cell.received[keep]
        assert arguments["input_ids"].shape == (2, PROMPT + k)
        assert bool(arguments["attention_mask"].all())
        assert sum(len(rows) for rows in arguments["mm_encoder_outputs"]["image"].pooler_output) == 2 * k
        assert "pixel_values" not in arguments
    if name == "tiny":
        assert cell.received[HALF]["position_ids"].tolist() == [list(range(PROMPT + n // 2))] * 2
    seconds, _ = cell.timed(settings_of([], [HALF])[1])
    assert seconds["pruner"] == seconds["overhead"] == 0
    assert cell.counted(FULL).kept == 2 * n


def test_all_tokens_asked_for_are_generated(tiny):
    """Random weights may choose the end or an image token: neither is allowed."""
    cell = Cell(tiny, prompts(tiny)(2, PROMPT), [], 40)
    _, output = generated(tiny, cell.received[None], 40, cell.forbidden)
    new = output.sequences[:, PROMPT + N :]
    assert new.shape == (2, 40)
    assert not torch.isin(new, torch.tensor([2, 98])).any()


@pytest.mark.parametrize("name", ["tiny", "tiny-qwen"])
def test_a_pruner_in_the_tower_has_a_second_limit(name):
    """A tower that had half of the rows from its first block on, and a quarter of them in the prompt."""
    model, quarter = shapes.random_model(name, CPU, torch.float32), Budget(0.25)
    block = len(blocks_of(model.get_encoder("image"))) - 2
    spec = f"tower(norm):block={block},tower_keep=0.5"
    made = bench(
        model, prompts(model, name), chosen(model, "norm", spec), [quarter], lengths=[PROMPT], new=NEW, repeats=1
    )
    names = ["full", "limit 0.25", "limit 0.25, tower 0.5", "norm 0.25", f"{spec} 0.25"]
    assert [row["setting"] for row in made["rows"]] == names
    full, limit, tower_limit, behind, tower = made["rows"]
    n = full["visual_tokens"]
    assert [row["tower_kept"] for row in made["rows"]] == [n, n, n / 2, n, n / 2]
    assert [row["kept"] for row in made["rows"]] == [n, n / 4, n / 4, n / 4, n / 4]
    assert tower_limit["flops"]["vision"] < limit["flops"]["vision"] == full["flops"]["vision"]
    # tiny-qwen drops before its first block too, so it is at the limit
    assert tower_limit["flops"]["whole"] <= tower["flops"]["whole"] < behind["flops"]["whole"]
    for row in (full, limit, behind):
        assert row["to_tower_limit"] is row["between"] is None
    assert tower["to_limit"]["flops_whole"] < 1 <= tower["to_tower_limit"]["flops_whole"]
    for phase in ("vision", "whole"):
        own, high, low = (row["runs"][0][phase] for row in (tower, limit, tower_limit))
        assert tower["between"][phase]["median"] == pytest.approx((high - own) / (high - low))


def test_the_order_alternates():
    settings = settings_of([("norm", get_pruner("norm"))], [HALF])
    order = list(turns(settings, 4))
    assert [turn for turn, _ in order] == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    assert [one for _, one in order] == [*settings, *settings[::-1]] * 2
    places = {one.name: [i for i, (_, other) in enumerate(order) if other is one] for one in settings}
    assert len({sum(places) for places in places.values()}) == 1  # on average all run at the same moment


def test_bench_runs_in_that_order_after_one_warm_up_each(tiny, monkeypatch):
    seen = []
    counted, timed = Cell.counted, Cell.timed
    monkeypatch.setattr(Cell, "counted", lambda self, s: seen.append(("warm", s.name)) or counted(self, s))
    monkeypatch.setattr(Cell, "timed", lambda self, s: seen.append(("timed", s.name)) or timed(self, s))
    small(tiny)
    names = ["full", "limit 0.5", "norm 0.5"]
    measured = [("timed", name) for name in [*names, *names[::-1]]]
    assert seen == [("warm", name) for name in names] + measured
    del seen[:]
    small(tiny, batches=[3])  # counted on one prompt, warmed up with all
    assert seen == [(what, name) for name in names for what in ("warm", "timed")] + measured
    del seen[:]
    small(tiny, batches=[1, 3])  # and counted once
    assert seen == [*[("warm", name) for name in names], *measured, *[("timed", name) for name in names], *measured]


@pytest.mark.parametrize("name", ["tiny", "tiny-qwen"])
def test_what_is_counted_of_one_prompt_goes_for_so_many(name):
    model = shapes.random_model(name, CPU, torch.float32)
    cells = [Cell(model, prompts(model, name)(batch, PROMPT), [HALF], NEW) for batch in (1, 2, 3)]
    for setting in settings_of(chosen(model, "norm", "divprune", "grip", "fastv:layer=1", "visionzip"), [HALF]):
        one, two, three = (cell.counted(setting) for cell in cells)
        once = 2 * one.flops["pruning"] - two.flops["pruning"]  # done once a batch: Grip places the grid's cells
        assert 0 <= once < 0.01 * one.flops["pruning"] if setting.spec == "grip" else once == 0
        more = {part: three.flops[part] + 2 * once for part in ("pruning", "whole")}
        assert one.times(3) == replace(three, flops=three.flops | more), setting.name


def test_ctrl_c_keeps_what_is_done(tiny, monkeypatch, tmp_path):
    timed, calls = Cell.timed, []

    def stopped(self, setting):
        calls.append(setting)
        if len(calls) == 6 + 3 + 4 + 1:  # the first cell, a warm-up of 3, one turn of 3 and the backward turn's first
            raise KeyboardInterrupt
        return timed(self, setting)

    monkeypatch.setattr(Cell, "timed", stopped)
    out = tmp_path / "bench.json"
    with pytest.raises(BenchInterrupted, match=r"Stopped. 6 of 9 rows are in .*bench.json") as stop:
        small(tiny, batches=[1, 2, 3], out=out)
    kept = json.loads(out.read_text())
    assert kept == json.loads(json.dumps(stop.value.result))
    assert kept["finished"] is False
    assert [(cell["batch"], cell["runs_done"], cell["runs_asked"]) for cell in kept["cells"]] == [(1, 6, 6), (2, 4, 6)]
    assert [row["turns"] for row in kept["rows"]] == [2, 2, 2, 1, 1, 2]
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]


def test_ctrl_c_before_anything_is_measured_leaves_a_valid_file(tiny, monkeypatch, tmp_path):
    def stopped(self, setting):
        raise KeyboardInterrupt

    monkeypatch.setattr(Cell, "counted", stopped)
    with pytest.raises(BenchInterrupted, match="0 of 3 rows"):
        small(tiny, out=tmp_path / "b.json")
    assert json.loads((tmp_path / "b.json").read_text())["rows"] == []
    with pytest.raises(BenchInterrupted, match="nothing is kept, because no --out"):
        small(tiny)


def test_a_setting_that_does_not_fit_is_said_and_the_rest_goes_on(tiny, monkeypatch):
    timed = Cell.timed

    def full_is_too_large(self, setting):
        if setting is FULL and len(self.sizes) == 2:
            raise torch.OutOfMemoryError("tried to allocate 9 GiB\nmore")
        return timed(self, setting)

    monkeypatch.setattr(Cell, "timed", full_is_too_large)
    result = small(tiny, batches=[1, 2])
    row = of(result, "full", 2)
    assert row["failed"] == "out of memory: tried to allocate 9 GiB"
    assert "seconds" not in row
    assert of(result, "norm 0.5", 2)["to_full"]["whole"] is None
    assert of(result, "norm 0.5", 2)["to_limit"]["whole"]["median"] > 0


# --- models and prompts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("llava-1.5-7b", 7_063_427_072), ("qwen2.5-vl-7b", 8_292_166_656), ("llava-0.5b", None)],
)
def test_shapes_are_those_of_the_published_models(name, parameters):
    model = shapes.random_model(name, torch.device("meta"), torch.bfloat16)
    assert model.dtype == torch.bfloat16
    count = sum(p.numel() for p in model.parameters())
    if parameters is None:  # Qwen2-0.5B as published, and LLaVA's tower
        text = sum(p.numel() for p in model.get_decoder().parameters())
        assert text == 494_032_768
        assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    else:
        assert count == parameters


def test_an_untrained_scorer_serves_its_random_model_only(tiny):
    grip = shapes.random_pruner("grip", tiny)
    grip.check(tiny)
    with pytest.raises(GripError, match="this scorer was trained for random weights"):
        grip.check(shapes.random_model("tiny-qwen", CPU, torch.float32))
    assert shapes.random_pruner("norm", tiny).name == "norm"
    lab = [("grip:scorer=lab", shapes.random_pruner("grip:scorer=lab", tiny))]
    with pytest.raises(GripError, match="but the model is"):
        bench(tiny, prompts(tiny), lab, [HALF])


def test_a_real_prompt_has_exactly_so_many_text_tokens():
    model, processor = tiny_lab()
    for prompt in (32, 57):
        inputs = real_prompts(model, processor, 2, prompt, 64)
        assert (~visual_places(model, inputs["input_ids"])).sum(-1).tolist() == [prompt, prompt]
        assert bool(inputs["attention_mask"].all())
    Cell(model, inputs, [HALF], 2).timed(FULL)
    with pytest.raises(GripError, match=r"--prompt 2: .* have \d+ text tokens already: type --prompt \d+ or more"):
        real_prompts(model, processor, 1, 2, 64)


@pytest.mark.parametrize("name", ["lab", "tiny", "tiny-qwen"])
def test_a_prompt_with_several_pictures_has_as_many_text_tokens(name):
    if name == "lab":
        model, processor = tiny_lab()
        inputs, n = real_prompts(model, processor, 2, 32, 64, images=3), 256
    else:
        model = shapes.random_model(name, CPU, torch.float32)
        inputs, n = random_prompts(model, architecture(name), 2, 32, 112, images=3), 16
    visual = visual_places(model, inputs["input_ids"])
    assert visual.sum(-1).tolist() == [3 * n, 3 * n]
    assert (~visual).sum(-1).tolist() == [32, 32]
    assert Cell(model, inputs, [HALF], 2).sizes == [n] * 6


def test_prompts_that_cannot_be_are_refused(tiny):
    with pytest.raises(GripError, match="--prompt 5: a prompt has 6 text tokens at least"):
        random_prompts(tiny, architecture("tiny"), 1, 5, 112, images=2)
    with pytest.raises(GripError, match="--prompt 3: a prompt has 4 text tokens at least"):
        prompts(tiny)(1, 3)
    qwen = shapes.random_model("tiny-qwen", CPU, torch.float32)
    with pytest.raises(GripError, match="--picture 10: type 28 or more pixels"):
        random_prompts(qwen, architecture("tiny-qwen"), 1, 8, 10)
    with pytest.raises(BudgetError, match="has only 16 visual tokens"):
        Cell(tiny, prompts(tiny)(1, 8), [Budget(17)], 2).timed(Setting("limit", Budget(17)))


def test_numbers_below_one_are_refused(tiny):
    for wrong in ({"batches": [0]}, {"repeats": 0}, {"new": 1}):
        with pytest.raises(GripError, match="1 or more"):
            small(tiny, **wrong)


# --- budgets that a pruner does not reach ---------------------------------------------------------------------------


def reached(model, pruners, keeps):
    chosen = [(spec, get_pruner(spec)) for spec in pruners]
    return bench(model, prompts(model), chosen, keeps, lengths=[PROMPT], new=NEW, repeats=2)


def test_bench_notes_the_row_and_measures_the_rest(tiny):
    result = reached(tiny, ["norm", "fastv:layer=1"], [Budget(0.75), Budget(0.1), Budget(17)])
    rows = {row["setting"]: row for row in result["rows"]}
    assert {name for name, row in rows.items() if row["failed"]} == {
        "fastv:layer=1 0.1", "limit 17", "norm 17", "fastv:layer=1 17",
    }  # fmt: skip
    assert "less than pruner 'fastv' can reach" in rows["fastv:layer=1 0.1"]["failed"]
    assert "has only 16 visual tokens" in rows["limit 17"]["failed"]
    assert rows["norm 0.1"]["turns"] == rows["fastv:layer=1 0.75"]["turns"] == 2
    assert rows["fastv:layer=1 0.1"]["failed"].startswith("2 of 16")
    assert rows["fastv:layer=1 0.1"]["unreached"] is True
    json.dumps(result)


def test_bench_that_reaches_nothing_says_so(tiny):
    with pytest.raises(BudgetError, match=r"fastv:layer=1 at 10%: 2 of 16 .*pass keep=\d+ or more"):
        reached(tiny, ["fastv:layer=1"], [Budget(0.1)])


def test_bench_on_the_command_line(tiny, capsys):
    line = ["bench", "--model", "random:tiny", "--prompt", "32", "--new", "2", "--repeats", "1", "--picture", "112"]
    assert main([*line, "--pruners", "norm,fastv:layer=1", "--keep", "75%,10%"]) == 0
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 80
    assert "fastv:layer=1 0.1 was not measured: " in " ".join(said.split())


# --- smaller pictures -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny", "tiny-qwen"])
def test_smaller_pictures_are_timed_with_their_own_encoder(name):
    model = shapes.random_model(f"random:{name}", CPU, torch.float32)

    def made(batch, length, keep=None):
        return random_prompts(model, architecture(name), batch, length, 112, keep=keep)

    settings = {"lengths": [PROMPT], "new": NEW, "repeats": 2}
    result = bench(model, made, [("downsample", None), *chosen(model, "norm")], [Budget(0.3)], **settings)
    row, pruned, full = (of(result, setting) for setting in ("downsample 0.3", "norm 0.3", "full"))
    assert (row["kind"], row["pruner"], row["kept"], row["visual_tokens"]) == ("downsample", "downsample", 4, 16)
    assert row["flops"]["vision"] < pruned["flops"]["vision"] == full["flops"]["vision"]
    assert row["flops"]["prefill"] < full["flops"]["prefill"]
    assert row["seconds"]["vision"]["median"] > 0


def test_a_model_whose_pictures_cannot_be_smaller_has_a_row_that_says_why(tiny):
    def made(batch, length, keep=None):
        if keep is not None:
            raise BudgetError("no smaller picture")
        return prompts(tiny)(batch, length)

    settings = {"lengths": [PROMPT], "new": NEW, "repeats": 1}
    result = bench(tiny, made, [("downsample", None), *chosen(tiny, "norm")], [HALF], **settings)
    assert of(result, "downsample 0.5")["failed"] == "no smaller picture"
    assert of(result, "norm 0.5")["turns"] == 1
    with pytest.raises(BudgetError, match="no smaller picture"):
        bench(tiny, made, [("downsample", None)], [HALF], **settings)


def test_real_pictures_are_made_smaller_by_the_models_processor():
    model, processor = tiny_lab()
    inputs = real_prompts(model, processor, 2, 40, 64, keep=Budget(32))
    assert inputs["pixel_values"].shape[-2:] == (5 * 8, 6 * 8)
    assert (~visual_places(model, inputs["input_ids"])).sum(-1).tolist() == [40, 40]
