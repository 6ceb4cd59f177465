"""`gripvlm bench --fit`: the largest batch that the memory holds, on a CPU whose memory is made to run out."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gripvlm.bench import BenchInterrupted, architecture, bench, fit, random_prompts, real_prompts, shapes
from gripvlm.bench import runner as bench_runner
from gripvlm.bench.fit import FINE, fits, largest, tiled
from gripvlm.bench.measure import FULL
from gripvlm.bench.roofline import Machine
from gripvlm.bench.runner import settings_of
from gripvlm.budget import Budget
from gripvlm.cli import main
from gripvlm.errors import GripError
from gripvlm.pruners import get_pruner
from tiny_lab import tiny_lab

CPU = torch.device("cpu")
PROMPT, NEW, N = 12, 3, 16
HALF, TENTH = Budget(0.5), Budget(0.1)
SETTINGS = settings_of([("norm", get_pruner("norm"))], [HALF, TENTH])


@pytest.fixture(scope="module")
def tiny():
    return shapes.random_model("random:tiny", CPU, torch.float32)


def prompts(model, name="tiny"):
    return lambda batch, length: random_prompts(model, architecture(name), batch, length, 112)


class Memory:
    """Holds so many prompt tokens at once; what is more runs out of it in the language model's first layer."""

    def __init__(self, model, tokens):
        self.model, self.tokens, self.batches, self.steps = model, tokens, [], 0

    def _read(self, module, args, kwargs):
        batch, length = kwargs["inputs_embeds"].shape[:2]
        if length == 1:
            self.steps += 1
            return
        self.batches.append(batch)
        if batch * length > self.tokens:
            raise torch.OutOfMemoryError("tried to allocate 9 GiB")

    def __enter__(self):
        self.hook = self.model.get_decoder().register_forward_pre_hook(self._read, with_kwargs=True)
        return self

    def __exit__(self, *error):
        self.hook.remove()


# --- the search -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [1, 5, 40, 64])
@pytest.mark.parametrize("edge", [0, 1, 2, 3, 7, 8, 31, 33, 62, 63])
def test_the_edge_is_found_exactly_where_batches_are_small(edge, start):
    tried = []
    found = largest(lambda size: tried.append(size) or size <= edge, 64, start)
    assert found == (edge, edge + 1)
    assert len(tried) == len(set(tried))
    assert all(1 <= size <= 64 for size in tried)


@pytest.mark.parametrize("edge", [64, 100, 1000, 1023, 4095])
def test_beyond_that_it_is_found_to_a_part(edge):
    tried = []
    good, bad = largest(lambda size: tried.append(size) or size <= edge, 10_000)
    assert good <= edge < bad
    assert bad - good <= good / FINE
    assert len(tried) <= 20


@pytest.mark.parametrize("most", [1, 6, 64])
def test_the_bound_is_tried_and_never_passed(most):
    tried = []
    assert largest(lambda size: tried.append(size) or True, most, 5) == (most, None)
    assert tried[-1] == max(tried) == most


@given(st.integers(0, 3000), st.integers(1, 64))
def test_the_search_ends_at_the_edge_wherever_it_starts(edge, start):
    tried = []
    good, bad = largest(lambda size: tried.append(size) or size <= edge, 3000, start)
    assert good <= edge
    assert (edge < bad and bad - good <= max(1, good // FINE)) if bad else good == 3000
    assert len(tried) == len(set(tried)) <= 20


def test_sizes_double_then_halve_the_gap():
    tried = []
    largest(lambda size: tried.append(size) or size <= 11, 100)
    assert tried == [1, 2, 4, 8, 16, 12, 10, 11]


# --- a model ----------------------------------------------------------------------------------------------------------


def test_pruning_lets_more_prompts_in(tiny):
    """28 tokens a prompt unpruned, 20 with half, 14 with two: 300 hold 10, 15 and 21 of them."""
    with Memory(tiny, 300) as memory:
        found = list(fits(tiny, prompts(tiny), SETTINGS, [PROMPT], NEW, 100))
    assert [(row["setting"], row["fits"], row["fails"]) for row in found] == [
        ("full", 10, 11),
        ("norm 0.5", 15, 16),
        ("norm 0.1", 21, 22),
    ]
    assert [row["to_full"] for row in found] == [1.0, 1.5, 2.1]
    assert found[1] == {
        "prompt": PROMPT,
        "kind": "pruned",
        "setting": "norm 0.5",
        "pruner": "norm",
        "keep": 0.5,
        "tower_keep": None,
        "most": 100,
        "fits": 15,
        "fails": 16,
        "to_full": 1.5,
    }
    held = [batch for batch in memory.batches if batch <= 10]
    assert memory.steps >= (NEW - 1) * len(held)  # a size holds only if its new tokens are decoded too


def test_memory_that_runs_out_while_decoding_does_not_hold(tiny):
    def late(module, args, kwargs):
        if kwargs["inputs_embeds"].shape[:2] == (4, 1):
            raise torch.OutOfMemoryError

    hook = tiny.get_decoder().register_forward_pre_hook(late, with_kwargs=True)
    (row,) = fits(tiny, prompts(tiny), [FULL], [PROMPT], NEW, 4)
    hook.remove()
    assert (row["fits"], row["fails"]) == (3, 4)


def test_what_ends_otherwise_than_by_memory_is_no_answer(tiny, monkeypatch):
    def broken(*args):
        raise RuntimeError("another trouble")

    monkeypatch.setattr(fit, "_run", broken)
    with pytest.raises(RuntimeError, match="another trouble"):
        list(fits(tiny, prompts(tiny), SETTINGS, [PROMPT], NEW, 4))


def test_where_the_search_ends_at_its_bound_there_is_no_ratio(tiny):
    with Memory(tiny, 300):
        full, half, _ = fits(tiny, prompts(tiny), SETTINGS, [PROMPT], NEW, 12)
    assert (full["fits"], full["fails"], full["to_full"]) == (10, 11, 1.0)
    assert (half["fits"], half["fails"], half["to_full"]) == (12, None, None)
    with Memory(tiny, 20):
        found = list(fits(tiny, prompts(tiny), SETTINGS, [PROMPT], NEW, 12))
    assert [(row["fits"], row["fails"], row["to_full"]) for row in found] == [(0, 1, None), (1, 2, None), (1, 2, None)]


@pytest.mark.parametrize("name", ["tiny", "tiny-qwen", "lab"])
def test_one_prompt_repeated_is_shaped_as_a_batch(name):
    if name == "lab":
        model, processor = tiny_lab()
        made = [real_prompts(model, processor, batch, 40, 64) for batch in (1, 3)]
    else:
        model = shapes.random_model(name, CPU, torch.float32)
        made = [prompts(model, name)(batch, PROMPT) for batch in (1, 3)]
    one, three = made
    found = tiled(one, 3)
    assert {n: (v.shape, v.dtype) for n, v in found.items()} == {n: (v.shape, v.dtype) for n, v in three.items()}
    assert torch.equal(found["input_ids"][2], one["input_ids"][0])
    fit._run(model, found, FULL, 2)


# --- bench and the command --------------------------------------------------------------------------------------------


@pytest.fixture
def limited(monkeypatch):
    """As if a CPU's memory ran out as an accelerator's does."""
    monkeypatch.setattr(bench_runner, "measured", lambda device, dtype: Machine(1e10, 1e10, 8, 8))
    monkeypatch.setattr(bench_runner, "check_limit", lambda device: None)


def test_bench_writes_what_fits(tiny, limited, tmp_path):
    out = tmp_path / "b.json"
    norm = [("norm", get_pruner("norm"))]
    with Memory(tiny, 300):
        made = bench(tiny, prompts(tiny), norm, [HALF], lengths=[PROMPT], new=NEW, repeats=1, fit=100, out=out)
    assert json.loads(out.read_text()) == json.loads(json.dumps(made))
    assert made["schema"] == "gripvlm.bench/1"
    assert [row["fits"] for row in made["fits"]] == [10, 15]
    assert len(made["rows"]) == 3


def test_without_fit_nothing_is_looked_for(tiny, limited, monkeypatch):
    monkeypatch.setattr(bench_runner, "fits", None)
    norm = [("norm", get_pruner("norm"))]
    assert bench(tiny, prompts(tiny), norm, [HALF], lengths=[PROMPT], new=NEW, repeats=1)["fits"] == []


def test_ctrl_c_keeps_the_searches_that_ended(tiny, limited, monkeypatch, tmp_path):
    run, out = fit._run, tmp_path / "b.json"

    def stopped(model, inputs, setting, new):
        if setting.kind == "pruned":
            raise KeyboardInterrupt
        run(model, inputs, setting, new)

    monkeypatch.setattr(fit, "_run", stopped)
    norm = [("norm", get_pruner("norm"))]
    with pytest.raises(BenchInterrupted, match="3 of 3 rows"):
        bench(tiny, prompts(tiny), norm, [HALF], lengths=[PROMPT], new=NEW, repeats=1, fit=2, out=out)
    kept = json.loads(out.read_text())
    assert [row["setting"] for row in kept["fits"]] == ["full"]
    assert kept["finished"] is False
    assert len(kept["rows"]) == 3


def test_a_cpu_has_no_limit_to_find(tiny, capsys):
    said = "--fit looks for the largest batch that an accelerator's memory holds, but the model is on the cpu"
    with pytest.raises(GripError, match=said):
        bench(tiny, prompts(tiny), [], [HALF], fit=8)
    assert main(["bench", "--model", "random:tiny", "--device", "cpu", "--fit", "8"]) == 2
    text = " ".join(capsys.readouterr().err.split())
    assert said in text
    assert "leave --fit out, or type --device cuda" in text
    assert "Traceback" not in text
