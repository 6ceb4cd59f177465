"""Tiny random Qwen models with the real processors, and pruners and pictures for the tests of the vLLM plug-in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2TokenizerFast,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from gripvlm.pruners.base import Pruner
from gripvlm.types import Selection

MARKS = ("endoftext", "im_start", "im_end", "vision_start", "vision_end", "vision_pad", "image_pad", "video_pad")
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = {
    "vocab_size": 288,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
    "bos_token_id": None,
}
TOWER = {
    "depth": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 2,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 128,
}


def byte_tokenizer() -> Qwen2TokenizerFast:
    """A token for each byte, and Qwen's special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(f"<|{mark}|>", special=True, normalized=False) for mark in MARKS])
    ends = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": None, "bos_token": None}
    return Qwen2TokenizerFast(tokenizer_object=tokenizer, model_max_length=4096, **ends)


def save_tiny_qwen(
    folder: Path,
    family: str = "qwen2_5_vl",
    text: dict | None = None,
    tower: dict | None = None,
    weights: bool = True,
) -> Path:
    """A random model of the family and its processor, in the folder.

    Args:
        text, tower: other sizes.
        weights: False for a configuration alone, to be loaded with vLLM's load_format="dummy".
    """
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    ids = {mark: tokenizer.convert_tokens_to_ids(f"<|{mark}|>") for mark in MARKS}
    names = ("vision_start", "vision_end")
    marks = {f"{name}_token_id": ids[name] for name in names}
    marks |= {f"{name}_token_id": ids[f"{name}_pad"] for name in ("image", "video")}
    text = TEXT | {"eos_token_id": ids["im_end"], "pad_token_id": ids["endoftext"]} | (text or {})
    if family == "qwen2_5_vl":
        tower = TOWER | {"patch_size": 14, "window_size": 112, "fullatt_block_indexes": [1]} | (tower or {})
        config = Qwen2_5_VLConfig(text_config=text, vision_config=tower, tie_word_embeddings=False, **marks)
        kind = Qwen2_5_VLForConditionalGeneration
        images = Qwen2VLImageProcessor(min_pixels=56 * 56, max_pixels=28 * 28 * 256)
        make, videos = Qwen2_5_VLProcessor, Qwen2VLVideoProcessor()
    else:
        tower = (
            TOWER
            | {"patch_size": 16, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
            | (tower or {})
        )
        # transformers interleaves the sections whatever is said; vLLM reads it here, as real checkpoints have it.
        rope = text["rope_parameters"] | {"mrope_interleaved": True}
        text |= {"head_dim": 32, "rope_parameters": rope}
        config = Qwen3VLConfig(text_config=text, vision_config=tower, **marks)
        kind = Qwen3VLForConditionalGeneration
        images = Qwen2VLImageProcessor(min_pixels=64 * 64, max_pixels=32 * 32 * 256, patch_size=16)
        make, videos = Qwen3VLProcessor, Qwen3VLVideoProcessor()
    config.architectures = [kind.__name__]
    config.save_pretrained(folder)
    if weights:
        model = kind(config)
        # Spread-out logits: a wrong row or position must show in them. Biases are zero by default.
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                torch.nn.init.normal_(weight, std=0.3 if name == "lm_head.weight" else 0.08)
            elif name.endswith("bias"):
                torch.nn.init.normal_(weight, std=0.1)
        model.float().save_pretrained(folder)
    processor = make(image_processor=images, tokenizer=tokenizer, video_processor=videos, chat_template=CHAT)
    processor.save_pretrained(folder)
    return folder


def noise(height: int, width: int, seed: int) -> Image.Image:
    """A picture of random pixels."""
    pixels = np.random.RandomState(seed).randint(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


class SharedNorm(Pruner):
    """The largest rows of all pictures of a prompt together, so that some picture keeps more than its own budget."""

    name = "shared_norm"
    joint = True

    def select(self, tokens):
        return self.select_batch([tokens])[0]

    def select_batch(self, images):
        selections = []
        for sample in dict.fromkeys(tokens.sample for tokens in images):
            own = [tokens for tokens in images if tokens.sample == sample]
            # One picture counts more than another, so that the shares differ.
            norms = torch.cat([tokens.features.norm(dim=-1) * (1 + tokens.image % 2) for tokens in own])
            kept = torch.zeros(len(norms), dtype=torch.bool)
            kept[norms.topk(sum(tokens.keep for tokens in own)).indices] = True
            for part, tokens in zip(kept.split([tokens.n for tokens in own]), own, strict=True):
                selections.append(Selection(part.nonzero().flatten(), tokens.n))
        return selections
