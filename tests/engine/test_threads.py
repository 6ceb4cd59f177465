"""One model, many threads: what a block does belongs to its calls. Every pruner on three families, equal to serial.

python -m pytest -q tests/engine/test_threads.py -m slow       # 2,000 calls
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from transformers.modeling_utils import AttentionInterface

import gripvlm
from matrix import SPECS, lacking, needs_of, pruner_of
from tiny_families import TINY, build, make

NAMES = ("internvl", "llava", "qwen2_5_vl")
PROMPTS = [make(TINY[name], [1, 2], [7, 9], seed=seed) for name in NAMES for seed in (1, 2)]
GREEDY = {"max_new_tokens": 3, "do_sample": False}


@dataclass(frozen=True)
class Job:
    """One call: what a server would run for a request."""

    spec: str
    name: str
    seed: int
    sizes: bool = False

    def run(self) -> list[torch.Tensor]:
        """What is kept in each layer, and three tokens."""
        model, inputs = build(self.name), PROMPTS[2 * NAMES.index(self.name) + self.seed].inputs
        pruner = "tome" if self.spec == "tome" else pruner_of(self.spec, self.name)
        keep = 0.75 if self.spec != "tome" and needs_of(self.spec)[1] == "llm" else 0.5
        with (
            torch.no_grad(),
            gripvlm.pruned_run(model, inputs, pruner, keep, proportional_attention=self.sizes) as (arguments, record),
        ):
            said = model.generate(**arguments, **GREEDY)
        kept = [rows for sample in record.selections for one in sample for rows in (one.indices, *(one.layers or ()))]
        return [*kept, said]


MERGING = ("pool", "prumerge", "visionzip")
JOBS = [Job(spec, name, seed) for name in NAMES for spec in SPECS if not lacking(spec, name) for seed in (0, 1)]
JOBS += [Job("tome", "llava", seed) for seed in (0, 1)]
JOBS += [Job(spec, "llava", seed, True) for spec in (*MERGING, "tome") for seed in (0, 1)]


@pytest.fixture(autouse=True)
def _one_core_a_call():
    """Eight calls that each want all cores wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return len(ours) == len(theirs) and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def hooks(model: Any) -> list[Any]:
    """All that blocks put on a model, as it is now."""
    return [
        (len(module._forward_pre_hooks), len(module._forward_hooks), sorted(vars(module))) for module in model.modules()
    ]


def agree(jobs: list[Job], threads: int = 8) -> None:
    """Runs the jobs one by one, then from so many threads; afterwards the models are as before."""
    alone = {job: job.run() for job in dict.fromkeys(jobs)}
    before, interface = [hooks(build(name)) for name in NAMES], AttentionInterface.get_interface
    with ThreadPoolExecutor(threads) as pool:
        found = list(pool.map(Job.run, jobs))
    assert [job for job, one in zip(jobs, found, strict=True) if not same(one, alone[job])] == []
    assert [hooks(build(name)) for name in NAMES] == before
    assert AttentionInterface.get_interface is interface


@pytest.mark.parametrize("name", NAMES)
def test_every_pruner_from_eight_threads(name):
    jobs = [job for job in JOBS if job.name == name]
    random.Random(0).shuffle(jobs)
    agree(jobs)


@pytest.mark.slow
def test_two_thousand_calls_from_eight_threads():
    agree(random.Random(1).choices(JOBS, k=2000))


@pytest.mark.parametrize("spec", ["fastv", "pyramiddrop", "sparsevlm", "mustdrop_llm", "pumer"])
def test_two_blocks_open_at_once_are_each_their_own(spec):
    """Two threads step through their blocks together: prompt by prompt, and token by token."""
    model, barrier = build("llava"), threading.Barrier(2, timeout=60)

    def work(seed: int, together: Callable[[], object]) -> tuple[list[Any], torch.Tensor]:
        inputs = PROMPTS[2 * NAMES.index("llava") + seed].inputs

        def meet(*_: Any) -> None:
            together()

        with gripvlm.pruned_run(model, inputs, spec, 0.75) as (arguments, record):
            handle = model.get_decoder().layers[2].register_forward_hook(meet)
            try:
                together()  # both hooks act in both threads: neither may start before the other's is there
                said = model.generate(**arguments, **GREEDY)
                together()
            finally:
                handle.remove()
        return [one.indices.tolist() for sample in record.selections for one in sample], said

    alone = [work(seed, lambda: None) for seed in (0, 1)]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(partial(work, together=barrier.wait), (0, 1)))
    for ours, theirs in zip(found, alone, strict=True):
        assert ours[0] == theirs[0]
        assert torch.equal(ours[1], theirs[1])
