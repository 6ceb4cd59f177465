"""Gradient checkpointing runs layers again in backward: they drop, merge and weigh what they did before."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import gripvlm
from gripvlm.errors import GripError, InputError
from gripvlm.models.families import installed
from tiny_families import TINY, build, make


def gradients(
    model: Any,
    name: str,
    spec: str,
    again: bool,
    elsewhere: bool = False,
    sizes: bool = False,
    reentrant: bool = False,
) -> list[Any]:
    """Of every weight, of a sum of the last logits; backward `elsewhere` runs in a thread that has no block."""
    model = copy.deepcopy(model).train()
    if again:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    inputs = make(TINY[name], [1, 2], [7, 9]).inputs
    with gripvlm.pruned_run(model, inputs, spec, 0.75, proportional_attention=sizes) as (arguments, record):
        loss = model(**arguments, use_cache=False).logits[:, -2:].logsumexp(-1).sum()
        if elsewhere:
            with ThreadPoolExecutor(1) as pool:
                pool.submit(loss.backward).result()
        else:
            loss.backward()
    assert all(one.layers and len(set(one.counts)) > 1 for sample in record.selections for one in sample)
    return [None if weight.grad is None else weight.grad.clone() for weight in model.parameters()]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize(
    ("name", "spec", "sizes"),
    [
        ("llava", "fastv", False),
        ("llava", "pyramiddrop", False),
        ("llava", "pumer", False),
        ("llava", "pumer", True),
        ("llava", "sparsevlm", False),
        ("gemma3", "fastv", False),
        ("qwen3_vl", "pyramiddrop", False),
    ],
)
def test_gradients_are_those_without_checkpointing(name, spec, sizes, elsewhere, reentrant):
    if reentrant and name == "qwen3_vl" and installed() < (5, 23):
        # hooks ran inside what is run again, where a plane that the vision tower learns from is used twice: loudly
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            gradients(build(name), name, spec, True, elsewhere, sizes, reentrant)
        return
    plain = gradients(build(name), name, spec, False, sizes=sizes)
    again = gradients(build(name), name, spec, True, elsewhere, sizes, reentrant)
    assert sum(one is not None for one in plain) > 20
    for ours, theirs in zip(again, plain, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_backward_that_could_be_anybodys_is_refused():
    """Layers run again in a thread of autograd's own, and two blocks are open on the model."""
    model, inputs = copy.deepcopy(build("llava")).train(), make(TINY["llava"], [1], [7]).inputs
    model.gradient_checkpointing_enable({"use_reentrant": False})
    said: list[BaseException] = []

    def other() -> None:
        with gripvlm.pruned_run(model, inputs, "pumer", 0.75, proportional_attention=True) as (arguments, _):
            loss = model(**arguments, use_cache=False).logits.sum()
            thread = threading.Thread(target=backward, args=(loss,))
            thread.start()
            thread.join()

    def backward(loss: torch.Tensor) -> None:
        try:
            loss.backward()
        except GripError as error:
            said.append(error)

    with gripvlm.pruned_run(model, inputs, "pumer", 0.75, proportional_attention=True):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert "train in one thread at a time" in str(said[0])


def test_a_tower_that_merges_is_not_run_again():
    model, inputs = copy.deepcopy(build("llava")).train(), make(TINY["llava"], [1], [7]).inputs
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with pytest.raises(InputError, match=r"encode under torch\.no_grad"):
        gripvlm.prune_inputs(model, inputs, "tome", 4)
    with torch.no_grad():
        arguments = gripvlm.prune_inputs(model, inputs, "tome", 4)
    assert model(**arguments).logits.isfinite().all()


def test_layers_without_their_model_are_refused():
    model, inputs = build("llava"), make(TINY["llava"], [1], [7]).inputs
    with (
        gripvlm.pruned_run(model, inputs, "fastv", 0.75) as (arguments, _),
        pytest.raises(InputError, match="run without their model"),
    ):
        model.get_decoder()(input_ids=arguments["input_ids"])
