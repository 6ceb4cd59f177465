"""Tests of accelerators: they run on a GPU where there is one (marker `gpu`), and always on the CPU, so that no
test is first tried where time is short. `experiments/gpu/checks.py` runs the marked ones."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from gripvlm.bench import architecture, random_prompts
from tiny_families import TINY, build, make

__all__ = ["GPU", "NEVER_WAIT", "cut", "put", "rounded", "tiny"]

GPU = pytest.param("cuda", marks=pytest.mark.gpu)
NEVER_WAIT = ("keep_all", "norm", "grid", "divprune", "otprune", "mmr(norm)", "cdpruner", "hawk", "grip")
"""Pruners that leave nothing to wait for between the vision encoder and the prefill, as docs/speed.md promises."""
IMAGES, WORDS = [1, 2], [7, 9]


def rounded(model: Any, dtype: torch.dtype) -> Any:
    """Rounds the parameters; buffers, such as rotary frequencies, stay float32, as `from_pretrained` leaves them."""
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)
    return model


def tiny(family: str, device: str, dtype: torch.dtype, attention: str = "sdpa") -> tuple[Any, dict[str, Any]]:
    """A copy of a family's tiny model, and a ragged batch for it."""
    model = copy.deepcopy(build(family)).to(device)
    model.set_attn_implementation(attention)
    return rounded(model, dtype), put(make(TINY[family], IMAGES, WORDS).inputs, device, dtype)


def cut(name: str, device: str, dtype: torch.dtype, attention: str = "sdpa") -> tuple[Any, dict[str, Any]]:
    """Two layers of a published shape at its full width, random weights, and two prompts of one length."""
    shape = architecture(name)
    config = copy.deepcopy(shape.config)
    config["text_config"]["num_hidden_layers"] = 2
    if "depth" in config["vision_config"]:
        config["vision_config"] |= {"depth": 2, "fullatt_block_indexes": [1]}
    else:
        config["vision_config"]["num_hidden_layers"] = 3
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(
            AutoConfig.for_model(shape.model_type, **config), dtype=dtype, attn_implementation=attention
        )
    return model.eval(), random_prompts(model, shape, 2, 32, 336)


def put(inputs: Mapping[str, Any], device: str, dtype: torch.dtype) -> dict[str, Any]:
    return {name: value.to(device, dtype if value.is_floating_point() else None) for name, value in inputs.items()}
