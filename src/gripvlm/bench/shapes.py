"""Real shapes with random weights, built on the device, and prompts of an exact length for them or for any model.

Time does not depend on the weights' values. The shapes in shapes.json are those of the published `config.json` files of
llava-hf/llava-1.5-7b-hf, Qwen/Qwen2.5-VL-7B-Instruct and Qwen/Qwen2-0.5B; `llava-0.5b` is LLaVA-1.5's tower (CLIP-L/14
at 336 pixels) in front of Qwen2-0.5B.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedModel

from gripvlm.api import encode
from gripvlm.budget import Budget
from gripvlm.errors import GripError
from gripvlm.eval import make_inputs, question_ids
from gripvlm.eval.downsample import downsampled
from gripvlm.grip.scorer import ModelFingerprint, Scorer, ScorerConfig
from gripvlm.models.adapter import PER_TOKEN
from gripvlm.models.smaller import raster_within
from gripvlm.models.text import visual_places
from gripvlm.pruners import Pruner, get_pruner
from gripvlm.utils.spec import did_you_mean

PREFIX = "random:"
QUESTION = "Describe the picture."


@dataclass(frozen=True)
class Architecture:
    """One model that can be built without any download.

    Attributes:
        note: one line about the shape.
        model_type: the family.
        words: token ids from 3 up to this one are plain text.
        config: arguments of its transformers config.
    """

    note: str
    model_type: str
    words: int
    config: dict[str, Any]


@cache
def _architectures() -> dict[str, Architecture]:
    shapes = json.loads(files("gripvlm.bench").joinpath("shapes.json").read_text(encoding="utf-8"))
    return {name: Architecture(**shape) for name, shape in shapes.items()}


def architecture(name: str) -> Architecture:
    """The architecture of `random:NAME` or `NAME`.

    Raises:
        GripError: an unknown one; all are listed.
    """
    known, bare = _architectures(), name.removeprefix(PREFIX)
    if bare not in known:
        hint = did_you_mean(bare, known, count=1, cutoff=0.5)
        listed = "; ".join(f"{PREFIX}{key} ({shape.note})" for key, shape in known.items())
        raise GripError(f"unknown architecture {name!r}: {hint}known are {listed}")
    return known[bare]


@torch.no_grad()
def random_model(name: str, device: torch.device, dtype: torch.dtype, attention: str | None = None) -> PreTrainedModel:
    """A model with random weights, made on `device` in `dtype`, in eval mode.

    Args:
        name: of an architecture, with or without `random:` in front.
        attention: as transformers' `attn_implementation`; by default its own choice.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText

    shape = architecture(name)
    config = AutoConfig.for_model(shape.model_type, **shape.config)
    torch.manual_seed(0)
    # made on the device: the host may not have the memory of all weights
    with device:
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation=attention)
    return model.eval()


def random_pruner(spec: str, model: PreTrainedModel) -> Pruner:
    """The pruner of a spec for a random model: one that must be trained gets an untrained scorer of the model's width.

    Only a bare name does (`grip`): a spec that names a scorer (`grip:scorer=lab`) asks for that scorer.
    """
    if spec != "grip":
        return get_pruner(spec)
    # the caller's random numbers are the same as without this call
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        width = model.get_input_embeddings().weight.shape[1]
        scorer = Scorer(ScorerConfig(width), replace(ModelFingerprint.of(model), name="random weights"))
    return get_pruner(spec, module=scorer.eval().to(model.device))


def real_prompts(
    model: PreTrainedModel,
    processor: Any,
    batch: int,
    prompt: int,
    side: int,
    images: int = 1,
    keep: Budget | None = None,
) -> dict[str, Any]:
    """Inputs of B samples with pictures of noise, made by the model's own processor, then filled up with words.

    Args:
        batch: B.
        prompt: text tokens a sample, the chat template's included.
        side: width and height of each picture in pixels, before the processor makes of it what it will.
        images: pictures a sample.
        keep: makes the pictures smaller, to this budget; by default they are as the processor makes them.

    Raises:
        BudgetError: smaller pictures do not have fewer tokens.
        GripError: the template and a short question are longer than `prompt`.
    """
    random = np.random.default_rng(0)
    noise = random.integers(0, 256, (batch, images, side, side, 3), dtype=np.uint8)
    pictures = [[Image.fromarray(one) for one in sample] for sample in noise]
    questions = [QUESTION] * batch
    inputs = make_inputs(model, processor, questions, pictures)
    if keep is not None:
        inputs, _ = downsampled(model, processor, questions, pictures, encode(model, inputs), keep)
    text = int((~visual_places(model, inputs["input_ids"][:1])).sum())
    if text > prompt:
        raise GripError(
            f"--prompt {prompt}: this model's template and a short question have {text} text tokens already: type "
            f"--prompt {text} or more"
        )
    words = torch.tensor(question_ids(processor, [QUESTION])[0], device=model.device)
    # words at the end, after the chat template: nothing in front of the images moves
    more = words.repeat(1 + (prompt - text) // len(words))[: prompt - text].expand(batch, -1)
    for name, fill in {**PER_TOKEN, "attention_mask": 1}.items():
        if (value := inputs.get(name)) is not None:
            tail = more if name == "input_ids" else torch.full_like(more, fill)
            inputs[name] = torch.cat((value, tail.to(value.dtype)), 1)
    return inputs


def random_prompts(
    model: PreTrainedModel,
    shape: Architecture,
    batch: int,
    prompt: int,
    side: int,
    images: int = 1,
    keep: Budget | None = None,
) -> dict[str, torch.Tensor]:
    """Inputs of B samples for a random model: pixels of noise, random words, `prompt` text tokens a sample.

    Args:
        side, images, keep: as for `real_prompts`.

    Raises:
        GripError: too few text tokens, or a picture too small for one visual token.
    """
    fewest = 2 + 2 * images  # begin, two marks around each picture, one word
    if prompt < fewest:
        raise GripError(
            f"--prompt {prompt}: a prompt has {fewest} text tokens at least: type --prompt {fewest} or more"
        )

    def smaller(rows: int) -> tuple[int, int]:
        """The raster of a square picture of so many rows."""
        return (rows, rows) if keep is None else raster_within((rows, rows), keep.count(rows * rows, "each image"))

    random = torch.Generator().manual_seed(0)
    config, vision = model.config, model.config.vision_config
    before: list[int] = []
    after: list[int] = []
    if shape.model_type == "qwen2_5_vl":
        merge, patch = vision.spatial_merge_size, vision.patch_size
        rows = round(side / (merge * patch))  # the processor rounds to whole visual tokens
        if rows < 1:
            raise GripError(f"--picture {side}: type {merge * patch} or more pixels")
        high, wide = smaller(rows)
        values = vision.in_channels * vision.temporal_patch_size * patch**2
        patches = (high * merge, wide * merge)
        inputs = {"pixel_values": torch.randn(batch * images * math.prod(patches), values, generator=random)}
        inputs["image_grid_thw"] = torch.tensor([[1, *patches]] * (batch * images))
        before, after = [config.vision_start_token_id], [config.vision_end_token_id]
    else:
        high, wide = smaller(vision.image_size // vision.patch_size)
        pixels = (batch * images, 3, high * vision.patch_size, wide * vision.patch_size)
        inputs = {"pixel_values": torch.randn(pixels, generator=random)}
    picture = [*before, *[config.image_token_id] * (high * wide), *after]
    words = torch.randint(3, shape.words, (batch, prompt - 1 - images * len(before + after)), generator=random)
    start = torch.tensor([1, *picture * images]).expand(batch, -1)
    ids = torch.cat((start, words), 1)
    inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if shape.model_type == "qwen2_5_vl":
        inputs["mm_token_type_ids"] = (ids == config.image_token_id).long()
    dtypes = {name: model.dtype if value.is_floating_point() else None for name, value in inputs.items()}
    return {name: value.to(model.device, dtypes[name]) for name, value in inputs.items()}
