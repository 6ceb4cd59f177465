"""Tiny random models, one builder a family, made from configs: no downloads, a second each.

Every model has at least 4 decoder layers, a vocabulary of 99, and weights large enough that logits
spread over several units, so that a wrong position or a wrong row shows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    CLIPVisionConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from gripvlm.types import Selection

PAD, BOS, EOS, IMAGE = 0, 1, 2, 98
VOCABULARY = 99
SHORT = {"max_new_tokens": 4, "do_sample": False}
TOWER = {"hidden_size": 32, "intermediate_size": 64}


class TinyTowerConfig(CLIPVisionConfig):
    """A vision tower of our own, known to transformers only through AutoConfig."""

    model_type = "gripvlm_tiny_tower"
    base_config_key = "vision_config"


class TinyTower(PreTrainedModel):
    """One convolution and a CLS row: [b, 3, H, W] to hidden states [b, 1 + n, d]."""

    config_class = TinyTowerConfig
    main_input_name = "pixel_values"
    _supports_sdpa = True

    def __init__(self, config: TinyTowerConfig):
        super().__init__(config)
        self.patches = torch.nn.Conv2d(3, config.hidden_size, config.patch_size, config.patch_size)
        self.post_init()

    def forward(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        rows = self.patches(pixel_values).flatten(2).transpose(1, 2)
        hidden = torch.cat((rows.mean(1, keepdim=True), rows), dim=1)
        return BaseModelOutputWithPooling(last_hidden_state=hidden, hidden_states=(hidden, hidden, hidden))


AutoConfig.register(TinyTowerConfig.model_type, TinyTowerConfig, exist_ok=True)
AutoModel.register(TinyTowerConfig, TinyTower, exist_ok=True)


def tiny_llava(attention: str = "sdpa", seed: int = 0, tower: type[CLIPVisionConfig] = CLIPVisionConfig) -> Any:
    """LLaVA with 4 x 4 visual tokens an image and 4 decoder layers."""
    torch.manual_seed(seed)
    vision = tower(
        **TOWER,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        projection_dim=32,
    )
    config = LlavaConfig(vision_config=vision, text_config=tiny_llama(), image_token_index=IMAGE)
    config.pad_token_id = PAD
    return _ready(LlavaForConditionalGeneration(config), attention, seed)


def tiny_llava_own_tower(attention: str = "sdpa", seed: int = 0) -> Any:
    """LLaVA whose tower is a class of our own, as in gripvlm's lab model."""
    return tiny_llava(attention, seed, TinyTowerConfig)


def tiny_internvl(attention: str = "sdpa", seed: int = 0) -> Any:
    """InternVL: 8 x 8 patches shuffled to 4 x 4 visual tokens, features in one tensor, not a list."""
    torch.manual_seed(seed)
    vision = InternVLVisionConfig(
        **TOWER,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=[32, 32],
        patch_size=[4, 4],
    )
    config = InternVLConfig(vision_config=vision, text_config=tiny_llama(), image_token_id=IMAGE, downsample_ratio=0.5)
    config.pad_token_id = PAD
    return _ready(InternVLForConditionalGeneration(config), attention, seed)


def tiny_llama() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )


def _ready(model: Any, attention: str, seed: int) -> Any:
    """Weights at a scale that gives logits of several units, float32, on the CPU, in eval mode."""
    generator = torch.Generator().manual_seed(7 + seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim >= 2:
                scale = 1.0 if "embed" in name else 0.4 if "lm_head" in name else 1.6 / weight.shape[-1] ** 0.5
                weight.copy_(torch.randn(weight.shape, generator=generator) * scale)
    model.set_attn_implementation(attention)
    model.generation_config.eos_token_id = None  # always the asked number of tokens
    model.generation_config.pad_token_id = PAD
    model.generation_config.suppress_tokens = [PAD, BOS, EOS, IMAGE]  # words only
    return model.eval()


def llava_inputs(images: list[int], words: list[int], seed: int = 1, side: str = "left") -> dict:
    """A batch: sample b has `images[b]` images of 16 tokens and `words[b]` text tokens.

    Text surrounds the images. The same (seed, b) gives the same prompt and pixels in any batch.
    """
    rows, pixels = [], []
    for sample, (count, length) in enumerate(zip(images, words, strict=True)):
        generator = torch.Generator().manual_seed(1000 * seed + sample)
        text = torch.randint(3, 90, (length,), generator=generator).tolist()
        row = [BOS]
        for _ in range(count):
            row += [text.pop(), *[IMAGE] * 16]
            pixels.append(torch.randn(3, 32, 32, generator=generator))
        rows.append(row + text)
    batch = pad(rows, side)
    if pixels:
        batch["pixel_values"] = torch.stack(pixels)
    return batch


def pad(rows: list[list[int]], side: str = "left") -> dict[str, torch.Tensor]:
    """input_ids and attention_mask of ragged rows."""
    length = max(map(len, rows))
    ids, mask = [], []
    for row in rows:
        blank = [PAD] * (length - len(row))
        none, one = [0] * len(blank), [1] * len(row)
        ids.append(blank + row if side == "left" else row + blank)
        mask.append(none + one if side == "left" else one + none)
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


BUILDERS: dict[str, tuple[Callable[..., Any], Callable[..., dict]]] = {
    "internvl": (tiny_internvl, llava_inputs),
    "llava": (tiny_llava, llava_inputs),
    "llava_own_tower": (tiny_llava_own_tower, llava_inputs),
}
"""name -> how to build its model (attention, seed) and its inputs (images, words, seed, side)."""


@lru_cache
def build(family: str, attention: str = "sdpa", seed: int = 0):
    return BUILDERS[family][0](attention, seed)


def make(family: str, images: list[int], words: list[int], **options) -> dict:
    return BUILDERS[family][1](images, words, **options)


def single(inputs: dict, images: list[int], sample: int) -> dict:
    """One sample of a batch as a batch of its own, without padding."""
    real = inputs["attention_mask"][sample].bool()
    start, stop = sum(images[:sample]), sum(images[: sample + 1])
    alone = {name: inputs[name][sample : sample + 1, real] for name in ("input_ids", "attention_mask")}
    return alone | ({"pixel_values": inputs["pixel_values"][start:stop]} if stop > start else {})


def hidden_from(model, inputs: dict, selections: list[list[Selection]]) -> dict:
    """The same inputs with the dropped placeholders masked, at their original positions."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"].clone()
    for row, kept, sample in zip(ids, mask, selections, strict=True):
        places = (row == model.config.image_token_id).nonzero().flatten()
        if sample:
            kept[places] = torch.cat([selection.mask() for selection in sample]).long()
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    return inputs | {"attention_mask": mask, "position_ids": positions}
