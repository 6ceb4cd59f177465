"""Prompts of an exact length: one picture of noise and so many text tokens a sample, all samples alike in size."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image

from gripvlm.bench.architectures import Architecture
from gripvlm.errors import GripError
from gripvlm.eval import make_inputs, question_ids
from gripvlm.models.adapter import PER_TOKEN
from gripvlm.models.text import visual_places

__all__ = ["random_prompts", "real_prompts"]

QUESTION = "Describe the picture."
LEAST = 4
"""Text tokens that a random model's prompt has at least: begin, two marks around the picture, one word."""


def real_prompts(model: Any, processor: Any, batch: int, prompt: int, side: int, seed: int = 0) -> dict[str, Any]:
    """Inputs of B samples, made by the model's own processor, then filled up to `prompt` text tokens.

    Args:
        batch: B.
        prompt: text tokens a sample, the chat template's included.
        side: width and height of each picture in pixels, before the processor makes of it what it will.

    Raises:
        GripError: the template and a short question are longer than `prompt`.
    """
    random = np.random.default_rng(seed)
    pictures = [Image.fromarray(random.integers(0, 256, (side, side, 3), dtype=np.uint8)) for _ in range(batch)]
    inputs = make_inputs(model, processor, [QUESTION] * batch, pictures)
    text = int((~visual_places(model, inputs["input_ids"][:1])).sum())
    if text > prompt:
        raise GripError(
            f"--prompt {prompt}: this model's template and a short question have {text} text tokens already: type "
            f"--prompt {text} or more"
        )
    words = torch.tensor(question_ids(processor, [QUESTION])[0], device=model.device)
    more = words.repeat(1 + (prompt - text) // len(words))[: prompt - text].expand(batch, -1)
    for name, fill in {**PER_TOKEN, "attention_mask": 1}.items():
        if (value := inputs.get(name)) is not None:
            tail = more if name == "input_ids" else torch.full_like(more, fill)
            inputs[name] = torch.cat((value, tail.to(value.dtype)), 1)
    return inputs


def random_prompts(
    model: Any, shape: Architecture, batch: int, prompt: int, side: int, seed: int = 0
) -> dict[str, Any]:
    """Inputs of B samples for a random model: pixels of noise, random words, `prompt` text tokens a sample.

    Raises:
        GripError: fewer than 4 text tokens, or a picture too small for one visual token.
    """
    if prompt < LEAST:
        raise GripError(f"--prompt {prompt}: a prompt has {LEAST} text tokens at least: type --prompt {LEAST} or more")
    random = torch.Generator().manual_seed(seed)
    config, vision = model.config, model.config.vision_config
    if shape.model_type == "qwen2_5_vl":
        merge, patch = vision.spatial_merge_size, vision.patch_size
        rows = round(side / (merge * patch))  # the processor rounds to whole visual tokens
        if rows < 1:
            raise GripError(f"--picture {side}: type {merge * patch} or more pixels")
        n, patches = rows * rows, rows * merge
        values = vision.in_channels * vision.temporal_patch_size * patch**2
        pixels: dict[str, Any] = {
            "pixel_values": torch.randn(batch * patches**2, values, generator=random),
            "image_grid_thw": torch.tensor([[1, patches, patches]] * batch),
        }
        marks = ([config.vision_start_token_id], [config.vision_end_token_id])
    else:
        n, marks = (vision.image_size // vision.patch_size) ** 2, ([], [])
        pixels = {"pixel_values": torch.randn(batch, 3, vision.image_size, vision.image_size, generator=random)}
    before, after = marks
    words = torch.randint(3, shape.words, (batch, prompt - 1 - len(before) - len(after)), generator=random)
    front = torch.tensor([1, *before, *[config.image_token_id] * n, *after]).expand(batch, -1)
    ids = torch.cat((front, words), 1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pixels}
    if shape.model_type == "qwen2_5_vl":
        inputs["mm_token_type_ids"] = (ids == config.image_token_id).long()
    return {
        name: value.to(model.device, model.dtype if value.is_floating_point() else None)
        for name, value in inputs.items()
    }
