"""A real GPU is not waited for between the vision encoder and the prefill (docs/speed.md, What is waited for).

`no_waiting.py` shows it for a device in name only; here the device is kept busy after the encoder, and the arguments of
the prefill must be there while it still is. PyTorch refuses what it knows to wait (`set_sync_debug_mode`) in between.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import gripvlm
from gripvlm.bench.architectures import random_pruner
from gripvlm.checks import checked_pruner
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


@pytest.mark.parametrize("device", [GPU])
def test_the_watch_would_notice(device):
    model, inputs = tiny("llava", device, torch.float32)
    watch = Watch(model)
    with watch.after_the_encoder(), torch.no_grad(), gripvlm.pruned_run(model, inputs, "norm", 3) as (arguments, _):
        ids = arguments["input_ids"]
        for wait in (lambda: bool(ids.any()), lambda: ids.tolist(), lambda: ids.nonzero(), lambda: ids[ids > 0]):
            with pytest.raises(RuntimeError, match="synchroniz"):
                wait()
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
    assert not watch.ahead
