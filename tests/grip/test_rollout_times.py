"""runs/rollout_times.py: the limit does the engine's arithmetic and nothing else, and every way finds the same."""

from __future__ import annotations

import sys

import pytest
import torch

from gripvlm.bench.roofline import spread
from gripvlm.grip.train import Engine
from places import ROOT
from tiny_train import asked, tiny_scorer, tiny_vlm

sys.path.insert(0, str(ROOT / "runs"))
import rollout_times
from rollout_times import Group


@pytest.fixture(scope="module", params=["alone", "shared"])
def group(request):
    """3 questions, 4 subsets each, in micro-batches of 5; with and without a prefix that all prompts share."""
    model, processor = tiny_vlm()
    if request.param == "shared":
        processor.chat_template = "is there a cat next to the dog? yes " + processor.chat_template
    task = asked(pictures=3, each=1)
    questions = [(task, sample) for sample in task.samples]
    made = Group(Engine(model, processor, rows=5), tiny_scorer(model), questions, k=6, group=4, looped=12)
    assert (made.batch.shared > 0) is (request.param == "shared")
    return made


def test_the_loop_finds_what_the_engine_finds(group):
    assert torch.allclose(group.found, group.loop(), atol=1e-4)
    assert group.found.shape == (12,)
    assert all(len(kept[0]) == 6 for kept in group.kept)


def test_the_limit_gives_the_logits_of_the_engines_rollouts(group):
    logits = group.limit(group._copied())
    assert [len(one) for one in logits] == [5, 5, 2]
    mine = torch.cat(logits).flatten(1)
    theirs = group.engine.run(group.batch, group.rows, group.kept).logits.flatten(1)
    apart = torch.cdist(mine, theirs)
    assert sorted(apart.argmin(-1).tolist()) == list(range(12))  # rows are in the order of the micro-batches
    assert float(apart.min(-1).values.max()) < 1e-3
    assert torch.equal(torch.cat(group.limit(group._copied())), torch.cat(logits))


def test_the_limit_runs_neither_tower_nor_pruning(group, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError

    for name in ("pruned", "prepare", "run"):
        monkeypatch.setattr(group.engine, name, never)
    monkeypatch.setattr(group.engine.model.model.vision_tower, "forward", never)
    assert len(group.limit(group._copied())) == 3


def test_a_step_trains_the_scorer_at_that_budget(group, monkeypatch):
    seen, run = [], group.engine.run
    monkeypatch.setattr(
        group.engine, "run", lambda b, rows, kept, **more: seen.append((rows, kept)) or run(b, rows, kept, **more)
    )
    gradients: list[float] = []
    monkeypatch.setattr(
        group.stage.scorer,
        "zero_grad",
        lambda: gradients.append(sum(float(p.grad.abs().sum()) for p in group.stage.scorer.parameters())),
    )
    group.step()
    ((rows, kept),) = seen
    assert rows == group.rows
    assert {len(images[0]) for images in kept} == {6}
    assert gradients[0] > 0


def test_times_are_ratios_of_the_same_turn_in_alternating_order(group, monkeypatch):
    now, order = [0.0], []
    seconds = {"rollouts": [9, 4, 5, 10], "limit": [9, 3, 4, 5], "step": [9, 12, 8, 20], "loop": [9, 24, 40, 60]}

    def taking(name):
        def work(*args):
            now[0] += seconds[name][order.count(name)]
            order.append(name)

        return work

    for name in seconds:
        monkeypatch.setattr(group, name, taking(name))
    monkeypatch.setattr(rollout_times, "device_time", lambda device: now[0])
    found = group.times(3)
    names = list(seconds)
    assert order == [*names[::-1], *names, *names[::-1], *names]  # the first warms up
    assert found["subsets_per_second"]["rollouts"]["median"] == 12 / 5
    assert found["share_of_limit"]["rollouts"] == pytest.approx(spread([3 / 4, 4 / 5, 5 / 10]))
    assert found["share_of_limit"]["step"] == pytest.approx(spread([3 / 12, 4 / 8, 5 / 20]))
    assert found["to_re_encoding"]["rollouts"]["median"] == 6
    assert found["shared_prefix"] == group.batch.shared
