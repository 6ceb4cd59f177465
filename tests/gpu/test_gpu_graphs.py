"""`pad_to_multiple_of` gives static shapes: the language model is captured once and replayed with other prompts.

All of a model's forward is not captured: transformers asks there whether placeholders and rows are as many
(docs/speed.md, Faster runs).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

import gripvlm
from on_device import put, tiny
from tiny_families import TINY, make

MULTIPLE, KEEP = 16, 3


class _Reached(Exception):
    """The language model was reached."""


def language(model: Any, arguments: Mapping[str, Any]) -> tuple[Callable[..., Tensor], dict[str, Any]]:
    """(the language model, what the model would give it): all of the prefill but looking up and placing embeddings."""
    decoder, found = model.get_decoder(), {}

    def reached(module: Any, positional: Any, named: dict[str, Any]) -> None:
        assert not positional
        found.update({name: value for name, value in named.items() if value is not None})
        raise _Reached

    handle = decoder.register_forward_pre_hook(reached, with_kwargs=True)
    try:
        model(**arguments, use_cache=False)
    except _Reached:
        pass
    finally:
        handle.remove()
    head = model.get_output_embeddings()
    return lambda **given: head(decoder(**given).last_hidden_state), found


class Replayed:
    """A function that is captured in a CUDA graph once; on a CPU it reads the same buffers without one."""

    def __init__(self, function: Callable[..., Tensor], arguments: dict[str, Any], on_gpu: bool) -> None:
        leaves, self.spec = tree_flatten(arguments)
        self.buffers = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        given = tree_unflatten(self.buffers, self.spec)
        self.run = lambda: function(**given)
        self.graph = None
        if on_gpu:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    self.run()
            torch.cuda.current_stream().wait_stream(side)
            torch.cuda.synchronize()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.out = self.run()

    def __call__(self, arguments: dict[str, Any]) -> Tensor:
        leaves, spec = tree_flatten(arguments)
        assert spec == self.spec
        for buffer, leaf in zip(self.buffers, leaves, strict=True):
            if isinstance(buffer, Tensor):
                assert buffer.shape == leaf.shape
                buffer.copy_(leaf)
            else:
                assert buffer == leaf
        if self.graph is None:
            return self.run()
        self.graph.replay()
        return self.out.clone()


@torch.no_grad()
def replays(family: str, device: str, dtype: torch.dtype) -> None:
    """One capture serves prompts of several lengths, other words and other pictures."""
    model, _ = tiny(family, device, dtype)
    replayed: Replayed | None = None
    lengths = set()
    for seed, words in ((1, [5, 8]), (2, [6, 9]), (3, [8, 6])):
        inputs = put(make(TINY[family], [1, 1], words, seed=seed).inputs, device, dtype)
        lengths.add(inputs["input_ids"].shape[1])
        arguments = gripvlm.prune_inputs(model, inputs, "norm", KEEP, pad_to_multiple_of=MULTIPLE)
        assert arguments["input_ids"].shape[1] % MULTIPLE == 0
        real = arguments["attention_mask"].bool()
        expected = model(**arguments, use_cache=False).logits[real]
        function, given = language(model, arguments)
        if replayed is None:
            replayed = Replayed(function, given, device == "cuda")
        found = replayed(given)[real]
        off = float((found - expected).abs().max() / expected.abs().max())
        assert off <= (2e-5 if dtype == torch.float32 else 2e-2), off
    assert len(lengths) > 1


FAMILIES = ("llava", "qwen2_5_vl", "internvl")
CASES = [("cpu", family, torch.float32) for family in ("llava", "qwen2_5_vl")]
ON_GPU = [
    pytest.param("cuda", family, dtype, marks=pytest.mark.gpu)
    for family in FAMILIES
    for dtype in (torch.float32, torch.bfloat16)
]


@pytest.mark.usefixtures("full_precision")
@pytest.mark.parametrize(("device", "family", "dtype"), [*CASES, *ON_GPU])
def test_the_language_model_is_replayed(device, family, dtype):
    replays(family, device, dtype)
