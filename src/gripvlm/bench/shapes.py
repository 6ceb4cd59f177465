"""Real shapes with random weights, built on the device, and prompts of an exact length for them or for any model.

Time does not depend on the weights' values. The shapes are those of the published `config.json` files of
llava-hf/llava-1.5-7b-hf, Qwen/Qwen2.5-VL-7B-Instruct and Qwen/Qwen2-0.5B; `llava-0.5b` is LLaVA-1.5's tower (CLIP-L/14
at 336 pixels) in front of Qwen2-0.5B.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedModel

from gripvlm.errors import GripError
from gripvlm.eval import make_inputs, question_ids
from gripvlm.grip.scorer import ModelFingerprint, Scorer, ScorerConfig
from gripvlm.models.adapter import PER_TOKEN
from gripvlm.models.text import visual_places
from gripvlm.pruners import Pruner, get_pruner

__all__ = [
    "ARCHITECTURES",
    "PREFIX",
    "Architecture",
    "architecture",
    "random_model",
    "random_prompts",
    "random_pruner",
    "real_prompts",
]

PREFIX = "random:"
QUESTION = "Describe the picture."
FEWEST = 4
"""Text tokens that a random model's prompt has at least: begin, two marks around the picture, one word."""


@dataclass(frozen=True)
class Architecture:
    """One model that can be built without any download.

    Attributes:
        model_type: the family.
        config: arguments of its transformers config.
        words: token ids from 3 up to this one are plain text.
        note: what it is, one line.
    """

    model_type: str
    config: dict[str, Any]
    words: int
    note: str


def _blocks(width: int, mlp: int, layers: int, heads: int, **options: Any) -> dict[str, Any]:
    """A tower's or language model's config, in the names that most of transformers' configs use."""
    sizes = {"hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": layers, "num_attention_heads": heads}
    return sizes | options


def _clip(width: int, mlp: int, layers: int, heads: int, **options: Any) -> dict[str, Any]:
    return _blocks(width, mlp, layers, heads, model_type="clip_vision_model", **options)


def _qwen_tower(width: int, mlp: int, depth: int, heads: int, out: int, full_attention: list[int]) -> dict[str, Any]:
    sizes = {"hidden_size": width, "intermediate_size": mlp, "depth": depth, "num_heads": heads, "out_hidden_size": out}
    patches = {"patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "tokens_per_second": 2}
    return sizes | patches | {"window_size": 112, "fullatt_block_indexes": full_attention}


def _rope(theta: float, sections: list[int]) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta, "mrope_section": sections}


_CLIP_L = _clip(1024, 4096, 24, 16, image_size=336, patch_size=14, projection_dim=768)
_VICUNA_7B = _blocks(4096, 11_008, 32, 32, model_type="llama", num_key_value_heads=32, vocab_size=32_064)
_VICUNA_7B |= {"max_position_embeddings": 32_768, "rms_norm_eps": 1e-5}
_QWEN2_05B = _blocks(896, 4864, 24, 14, model_type="qwen2", num_key_value_heads=2, vocab_size=151_936)
_QWEN2_05B |= {"max_position_embeddings": 32_768, "tie_word_embeddings": True}
_QWEN25_7B = _blocks(3584, 18_944, 28, 28, num_key_value_heads=4, vocab_size=152_064)
_QWEN25_7B |= {"max_position_embeddings": 128_000, "rope_parameters": _rope(1_000_000.0, [16, 24, 24])}
_QWEN25_IDS = {"image_token_id": 151_655, "video_token_id": 151_656}
_QWEN25_IDS |= {"vision_start_token_id": 151_652, "vision_end_token_id": 151_653}
_TINY_TEXT = _blocks(48, 96, 4, 4, model_type="llama", num_key_value_heads=2, vocab_size=99)
_TINY_TEXT |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_TINY_QWEN_TEXT = _TINY_TEXT | {"model_type": "qwen2_5_vl_text", "rope_parameters": _rope(10_000.0, [2, 2, 2])}
_TINY_QWEN_IDS = {"image_token_id": 98, "video_token_id": 97, "vision_start_token_id": 96, "vision_end_token_id": 95}

ARCHITECTURES: dict[str, Architecture] = {
    "llava-0.5b": Architecture(
        "llava",
        {"vision_config": _CLIP_L, "text_config": _QWEN2_05B, "image_token_index": 151_646},
        words=151_000,
        note="CLIP-L/14-336 and Qwen2-0.5B, 576 visual tokens",
    ),
    "llava-1.5-7b": Architecture(
        "llava",
        {"vision_config": _CLIP_L, "text_config": _VICUNA_7B, "image_token_index": 32_000},
        words=31_000,
        note="LLaVA-1.5-7B, 576 visual tokens",
    ),
    "qwen2.5-vl-7b": Architecture(
        "qwen2_5_vl",
        {
            "vision_config": _qwen_tower(1280, 3420, 32, 16, out=3584, full_attention=[7, 15, 23, 31]),
            "text_config": _QWEN25_7B,
            "tie_word_embeddings": False,
            **_QWEN25_IDS,
        },
        words=151_000,
        note="Qwen2.5-VL-7B, one visual token for 28 x 28 pixels",
    ),
    "tiny": Architecture(
        "llava",
        {
            "vision_config": _clip(32, 64, 3, 2, image_size=32, patch_size=8, projection_dim=32),
            "text_config": _TINY_TEXT,
            "image_token_index": 98,
        },
        words=90,
        note="16 visual tokens, for tests of the command",
    ),
    "tiny-qwen": Architecture(
        "qwen2_5_vl",
        {
            "vision_config": _qwen_tower(32, 64, 2, 2, out=48, full_attention=[1]),
            "text_config": _TINY_QWEN_TEXT,
            **_TINY_QWEN_IDS,
        },
        words=90,
        note="Qwen2.5-VL's layout, for tests of the command",
    ),
}


def architecture(name: str) -> Architecture:
    """The architecture of `random:NAME` or `NAME`.

    Raises:
        GripError: an unknown one; all are listed.
    """
    bare = name.removeprefix(PREFIX)
    if bare not in ARCHITECTURES:
        near = difflib.get_close_matches(bare, ARCHITECTURES, n=1, cutoff=0.5)
        hint = f"did you mean {PREFIX}{near[0]}? " if near else ""
        known = "; ".join(f"{PREFIX}{key} ({shape.note})" for key, shape in ARCHITECTURES.items())
        raise GripError(f"unknown architecture {name!r}: {hint}known are {known}")
    return ARCHITECTURES[bare]


@torch.no_grad()
def random_model(
    name: str, device: torch.device, dtype: torch.dtype, attention: str | None = None, seed: int = 0
) -> PreTrainedModel:
    """A model with random weights, made on `device` in `dtype`, in eval mode.

    Args:
        name: a key of `ARCHITECTURES`, with or without `random:` in front.
        attention: as transformers' `attn_implementation`; by default its own choice.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText

    shape = architecture(name)
    config = AutoConfig.for_model(shape.model_type, **shape.config)
    torch.manual_seed(seed)
    # made on the device: the host may not have the memory of all weights
    with device:
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation=attention)
    return model.eval()


def random_pruner(spec: str, model: Any) -> Pruner:
    """The pruner of a spec for a random model: one that must be trained gets an untrained scorer of the model's width.

    Only a bare name does (`grip`): a spec that names a scorer (`grip:scorer=lab`) asks for that scorer.
    """
    if spec != "grip":
        return get_pruner(spec)
    # the caller's random numbers are what they would be without us
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        width = model.get_input_embeddings().weight.shape[1]
        scorer = Scorer(ScorerConfig(width), replace(ModelFingerprint.of(model), name="random weights"))
    return get_pruner(spec, module=scorer.eval().to(model.device))


def real_prompts(model: Any, processor: Any, batch: int, prompt: int, side: int, seed: int = 0) -> dict[str, Any]:
    """Inputs of B samples with pictures of noise, made by the model's own processor, then filled up with words.

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
    # words at the end, after the chat template: nothing in front of the image moves
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
    if prompt < FEWEST:
        raise GripError(
            f"--prompt {prompt}: a prompt has {FEWEST} text tokens at least: type --prompt {FEWEST} or more"
        )
    random = torch.Generator().manual_seed(seed)
    config, vision = model.config, model.config.vision_config
    before: list[int] = []
    after: list[int] = []
    pixels: dict[str, Any]
    if shape.model_type == "qwen2_5_vl":
        merge, patch = vision.spatial_merge_size, vision.patch_size
        rows = round(side / (merge * patch))  # the processor rounds to whole visual tokens
        if rows < 1:
            raise GripError(f"--picture {side}: type {merge * patch} or more pixels")
        n, patches = rows * rows, rows * merge
        values = vision.in_channels * vision.temporal_patch_size * patch**2
        pixels = {"pixel_values": torch.randn(batch * patches**2, values, generator=random)}
        pixels["image_grid_thw"] = torch.tensor([[1, patches, patches]] * batch)
        before, after = [config.vision_start_token_id], [config.vision_end_token_id]
    else:
        n = (vision.image_size // vision.patch_size) ** 2
        pixels = {"pixel_values": torch.randn(batch, 3, vision.image_size, vision.image_size, generator=random)}
    words = torch.randint(3, shape.words, (batch, prompt - 1 - len(before) - len(after)), generator=random)
    start = torch.tensor([1, *before, *[config.image_token_id] * n, *after]).expand(batch, -1)
    ids = torch.cat((start, words), 1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pixels}
    if shape.model_type == "qwen2_5_vl":
        inputs["mm_token_type_ids"] = (ids == config.image_token_id).long()
    dtypes = {name: model.dtype if value.is_floating_point() else None for name, value in inputs.items()}
    return {name: value.to(model.device, dtypes[name]) for name, value in inputs.items()}
