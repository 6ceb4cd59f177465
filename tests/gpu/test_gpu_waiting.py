"""A real GPU is not waited for between the vision encoder and the prefill (docs/speed.md, Where the host waits).

`no_waiting.py` shows it for a device in name only; here the device is kept busy after the encoder, and the arguments of
the prefill must be there while it still is. PyTorch refuses what it knows to wait (`set_sync_debug_mode`) in between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import gripvlm
from gripvlm.bench.shapes import random_pruner
from gripvlm.engine.request import checked_pruner
from gripvlm.pruners import Pruner
from gripvlm.types import Selection, VisualTokens
from on_device import GPU, NEVER_WAIT, tiny

BUSY = 400_000_000
"""Clock cycles, about 0.2 s."""
WAYS = {"even": 3, "ragged": [2, [3, 4]]}


class Watch:
    """Keeps the GPU busy once the encoder was asked for, and refuses to wait until the arguments are there."""

    def __init__(self, model: Any) -> None:
        self.model, self.on_gpu = model, model.device.type == "cuda"
        self.asked, self.ahead = False, True

    @contextmanager
    def after_the_encoder(self) -> Iterator[None]:
        real = self.model._prepare_multimodal_encoder_kwargs_for_generation

        def then_busy(inputs: Any) -> Any:
            answer = real(inputs)
            self.asked = True
            if self.on_gpu:
                torch.cuda._sleep(BUSY)
                self.done = torch.cuda.Event()
                self.done.record()
                torch.cuda.set_sync_debug_mode("error")
            return answer

        self.model._prepare_multimodal_encoder_kwargs_for_generation = then_busy
        try:
            yield
        finally:
            self.end()
            del self.model._prepare_multimodal_encoder_kwargs_for_generation

    def end(self) -> None:
        if self.on_gpu and torch.cuda.get_sync_debug_mode():
            torch.cuda.set_sync_debug_mode("default")
            self.ahead = not self.done.query()


CASES = [("cpu", torch.float32, "llava", name, "ragged") for name in NEVER_WAIT]
CASES += [("cpu", torch.bfloat16, "qwen2_5_vl", "divprune", "even")]
CASES += [
    pytest.param("cuda", torch.bfloat16, family, name, way, marks=pytest.mark.gpu)
    for family in ("llava", "qwen2_5_vl", "internvl")
    for name in NEVER_WAIT
    for way in WAYS
]


@pytest.mark.parametrize(("device", "dtype", "family", "name", "way"), CASES)
def test_the_prefill_is_asked_for_while_the_encoder_still_runs(device, dtype, family, name, way):
    model, inputs = tiny(family, device, dtype)
    pruner = random_pruner(name, model) if name == "grip" else checked_pruner(name, model)
    keep = 1.0 if name == "keep_all" else WAYS[way]
    with torch.no_grad():
        expected = gripvlm.prune_inputs(model, inputs, pruner, keep)  # kernels are loaded, memory is there after it
        for _ in range(2):
            watch = Watch(model)
            with watch.after_the_encoder(), gripvlm.pruned_run(model, inputs, pruner, keep) as (arguments, _):
                watch.end()
                logits = model(**arguments).logits
            assert watch.asked
        assert watch.ahead, "the GPU was done before the arguments were there: something waited for it"
        assert torch.equal(arguments["input_ids"], expected["input_ids"])
        real = arguments["attention_mask"].bool()
        assert torch.equal(logits[real], model(**expected).logits[real])


class Waits(Pruner):
    """Keeps the first rows, and has something done with the features before."""

    name = "waits"
    needs = frozenset({"features"})

    def __init__(self, wait: Callable[[Tensor], Any]) -> None:
        self.wait = wait

    def select(self, tokens: VisualTokens) -> Selection:
        self.wait(tokens.features)
        return Selection(torch.arange(tokens.keep, device=tokens.features.device), tokens.n, sound=True)


@torch.no_grad()
def watched(device: str, wait: Callable[[Tensor], Any]) -> bool:
    """Whether the GPU was still busy when the arguments were there."""
    model, inputs = tiny("llava", device, torch.float32)
    watch = Watch(model)
    with watch.after_the_encoder(), gripvlm.pruned_run(model, inputs, Waits(wait), 3) as (arguments, _):
        watch.end()
        model(**arguments)
    assert watch.asked
    return watch.ahead


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_the_watch_notices_nothing_where_nothing_waits(device):
    for _ in range(2):  # kernels are loaded, memory is there after the first
        ahead = watched(device, lambda rows: rows.sum())
    assert ahead


@pytest.mark.parametrize("device", [GPU])
@pytest.mark.parametrize(
    "wait",
    [
        lambda rows: bool(rows.any()),
        lambda rows: rows.tolist(),
        lambda rows: rows.nonzero(),
        lambda rows: rows[rows > 0],
        lambda rows: torch.arange(3).to(rows.device),
        lambda rows: torch.zeros_like(rows).__setitem__(torch.zeros(2, dtype=torch.long, device=rows.device), 1.0),
    ],
    ids=["bool", "tolist", "nonzero", "mask", "to", "number"],
)
def test_the_watch_refuses_what_pytorch_knows_to_wait(device, wait):
    with pytest.raises(RuntimeError, match="synchroniz"):
        watched(device, wait)


@pytest.mark.parametrize("device", [GPU])
def test_the_watch_notices_what_pytorch_does_not_refuse(device):
    assert not watched(device, lambda rows: torch.cuda.synchronize())
