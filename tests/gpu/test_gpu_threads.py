"""Many threads prune with one model on one device, and each gets what it would have got alone."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import gripvlm
from on_device import IMAGES, WORDS, put, tiny
from tiny_families import TINY, make

THREADS, TURNS = 8, 6
PRUNERS = ("norm", "divprune", "cdpruner", "visionzip", "fastervlm")
"""The last two watch the vision tower."""


def prunings(model: Any, inputs: list[dict[str, Any]], number: int) -> list[Any]:
    """What one thread does: every pruner on prompts of its own."""
    found = []
    with torch.no_grad():
        for turn in range(TURNS):
            for pruner in PRUNERS:
                mine = inputs[(number + turn) % len(inputs)]
                arguments, record = gripvlm.prune_inputs(model, mine, pruner, 4, return_record=True)
                rows = [one.indices.tolist() for sample in record.selections for one in sample]
                found.append((pruner, rows, arguments["position_ids"].tolist()))
    return found


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("family", ["llava", "internvl"])
def test_threads_get_what_they_would_get_alone(device, family):
    model, _ = tiny(family, device, torch.float32)
    inputs = [put(make(TINY[family], IMAGES, WORDS, seed=s).inputs, device, torch.float32) for s in range(THREADS)]
    alone = [prunings(model, inputs, number) for number in range(THREADS)]
    with ThreadPoolExecutor(THREADS) as pool:
        together = list(pool.map(lambda number: prunings(model, inputs, number), range(THREADS)))
    assert together == alone
