"""Real shapes with random weights, built on the device: time does not depend on the weights' values.

The shapes are those of the published `config.json` files of llava-hf/llava-1.5-7b-hf, Qwen/Qwen2.5-VL-7B-Instruct and
Qwen/Qwen2-0.5B; `llava-0.5b` is LLaVA-1.5's tower (CLIP-L/14 at 336 pixels) in front of Qwen2-0.5B.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace
from typing import Any

import torch

from gripvlm.errors import GripError
from gripvlm.grip.scorer import ModelFingerprint, Scorer, ScorerConfig
from gripvlm.pruners import Pruner, get_pruner

__all__ = ["ARCHITECTURES", "Architecture", "architecture", "random_model", "random_pruner"]

PREFIX = "random:"


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


_CLIP_L = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
    "vocab_size": 32_000,
}
_VICUNA_7B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32_768,
    "rms_norm_eps": 1e-5,
    "vocab_size": 32_064,
}
_QWEN2_05B = {
    "model_type": "qwen2",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32_768,
    "tie_word_embeddings": True,
    "vocab_size": 151_936,
}
_QWEN25_TOWER = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
    "out_hidden_size": 3584,
    "tokens_per_second": 2,
}
_QWEN25_7B = {
    "hidden_size": 3584,
    "intermediate_size": 18_944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128_000,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0, "mrope_section": [16, 24, 24]},
    "vocab_size": 152_064,
}
_TINY_TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 3}
_TINY_TEXT = {
    "model_type": "llama",
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 99,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

ARCHITECTURES: dict[str, Architecture] = {
    "llava-0.5b": Architecture(
        "llava",
        {"vision_config": _CLIP_L, "text_config": _QWEN2_05B, "image_token_index": 151_646},
        151_000,
        "CLIP-L/14-336 and Qwen2-0.5B, 576 visual tokens",
    ),
    "llava-1.5-7b": Architecture(
        "llava",
        {"vision_config": _CLIP_L, "text_config": _VICUNA_7B, "image_token_index": 32_000},
        31_000,
        "LLaVA-1.5-7B, 576 visual tokens",
    ),
    "qwen2.5-vl-7b": Architecture(
        "qwen2_5_vl",
        {
            "vision_config": _QWEN25_TOWER,
            "text_config": _QWEN25_7B,
            "image_token_id": 151_655,
            "video_token_id": 151_656,
            "vision_start_token_id": 151_652,
            "vision_end_token_id": 151_653,
            "tie_word_embeddings": False,
        },
        151_000,
        "Qwen2.5-VL-7B, one visual token for 28 x 28 pixels",
    ),
    "tiny": Architecture(
        "llava",
        {
            "vision_config": _CLIP_L | _TINY_TOWER | {"image_size": 32, "patch_size": 8, "projection_dim": 32},
            "text_config": _TINY_TEXT,
            "image_token_index": 98,
        },
        90,
        "16 visual tokens, for tests of the command",
    ),
    "tiny-qwen": Architecture(
        "qwen2_5_vl",
        {
            "vision_config": _QWEN25_TOWER
            | {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 48}
            | {"fullatt_block_indexes": [1]},
            "text_config": _TINY_TEXT
            | {"model_type": "qwen2_5_vl_text"}
            | {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 2, 2]}},
            "image_token_id": 98,
            "video_token_id": 97,
            "vision_start_token_id": 96,
            "vision_end_token_id": 95,
        },
        90,
        "Qwen2.5-VL's layout, for tests of the command",
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
        known = "; ".join(f"{PREFIX}{key} ({one.note})" for key, one in ARCHITECTURES.items())
        raise GripError(f"unknown architecture {name!r}: {hint}known are {known}")
    return ARCHITECTURES[bare]


@torch.no_grad()
def random_model(
    name: str, device: torch.device, dtype: torch.dtype, attention: str | None = None, seed: int = 0
) -> Any:
    """A model with random weights, made on `device` in `dtype`, in eval mode.

    Args:
        name: a key of `ARCHITECTURES`, with or without `random:` in front.
        attention: as transformers' `attn_implementation`; by default its own choice.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText

    shape = architecture(name)
    config = AutoConfig.for_model(shape.model_type, **shape.config)
    torch.manual_seed(seed)
    with device:
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation=attention)
    return model.eval()


def random_pruner(spec: str, model: Any) -> Pruner:
    """The pruner of a spec for a random model: one that must be trained gets an untrained scorer of the model's width.

    Only a bare name does (`grip`): a spec that names a scorer (`grip:scorer=lab`) asks for that one.
    """
    trained = spec == "grip"
    if not trained:
        return get_pruner(spec)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        width = model.get_input_embeddings().weight.shape[1]
        scorer = Scorer(ScorerConfig(width), replace(ModelFingerprint.of(model), name="random weights"))
    return get_pruner(spec, module=scorer.eval().to(model.device))
