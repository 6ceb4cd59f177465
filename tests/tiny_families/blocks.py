"""Families whose image tokens see each other in both directions: the Gemmas."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tiny_families.base import END, IMAGE, START, TEXT, VIDEO, VISION, Picture, Tiny, modality_types, one_of
from tiny_families.plain import squares

SIGLIP = VISION | {"model_type": "siglip_vision_model", "vision_use_head": False}


def image_blocks(ids: Tensor) -> dict[str, Tensor]:
    return {"token_type_ids": (ids == IMAGE).long()}


def prefix(ids: Tensor) -> dict[str, Tensor]:
    """Everything in the prompt is 0, the prefix; what follows is 1."""
    return {"token_type_ids": torch.zeros_like(ids)}


def patches(generator: torch.Generator) -> Picture:
    """Images of 6 x 6, 6 x 8 or 8 x 6 patches with their (x, y), padded to 48 patches; 2 x 2 pooled."""
    h, w = one_of(generator, [(6, 6), (6, 8), (8, 6)])
    pixels, places = torch.zeros(1, 48, 48), torch.full((1, 48, 2), -1)
    pixels[0, : h * w] = torch.rand(h * w, 48, generator=generator)
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    places[0, : h * w] = torch.stack((x.flatten(), y.flatten()), -1)
    n = h * w // 4
    ids = [START, *[IMAGE] * n, END]
    return Picture(ids, [n], {"pixel_values": pixels, "image_position_ids": places})


def merged_patches(generator: torch.Generator) -> Picture:
    """The same images as 2 x 2 patches merged beforehand, with the (x, y) of each, padded to 12."""
    (n,) = (picture := patches(generator)).sizes
    pixels, places = torch.zeros(1, 12, 192), torch.full((1, 12, 2), -1)
    w = int(picture.tensors["image_position_ids"][0, :, 0].max() + 1) // 2
    pixels[0, :n] = torch.rand(n, 192, generator=generator)
    places[0, :n] = torch.stack((torch.arange(n) % w, torch.arange(n) // w), -1)
    return replace(picture, tensors={"pixel_values": pixels, "image_position_ids": places})


GEMMA = TEXT | {"head_dim": 12, "query_pre_attn_scalar": 12}
MIXED = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]

GEMMA4_TEXT = {name: value for name, value in TEXT.items() if name != "max_position_embeddings"} | {
    "head_dim": 12,
    "global_head_dim": 12,
    "sliding_window": 256,
    "layer_types": MIXED,
    "use_bidirectional_attention": "vision",
}
GEMMA4_MARKS = {
    "audio_config": None,
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "audio_token_id": 96,
    "boi_token_id": START,
    "eoi_token_id": END,
}

BLOCKS = [
    Tiny(
        "gemma3",
        {
            "vision_config": SIGLIP | {"patch_size": 4},
            "text_config": GEMMA | {"model_type": "gemma3_text", "sliding_window": 256, "layer_types": MIXED},
            "mm_tokens_per_image": 16,
            "boi_token_index": START,
            "eoi_token_index": END,
            "image_token_index": IMAGE,
        },
        squares(16, (START,), (END,)),
        types=image_blocks,
        embedding=0.15,
    ),
    Tiny(
        "gemma4",
        {
            "vision_config": {name: VISION[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers")}
            | {
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "head_dim": 16,
                "patch_size": 4,
                "pooling_kernel_size": 2,
                "position_embedding_size": 64,
            },
            "text_config": GEMMA4_TEXT
            | {"model_type": "gemma4_text", "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 99},
        }
        | GEMMA4_MARKS,
        patches,
        types=modality_types,
        embedding=0.15,
    ),
    Tiny(
        "gemma4_unified",
        {
            "vision_config": {
                "patch_size": 4,
                "pooling_kernel_size": 2,
                "mm_embed_dim": 32,
                "mm_posemb_size": 64,
                "output_proj_dims": 32,
            },
            "text_config": GEMMA4_TEXT | {"model_type": "gemma4_unified_text"},
        }
        | GEMMA4_MARKS,
        merged_patches,
        types=modality_types,
        embedding=0.15,
    ),
    Tiny(
        "paligemma",
        {
            "vision_config": SIGLIP | {"patch_size": 8, "projection_dim": 48},
            "text_config": TEXT | {"model_type": "gemma", "head_dim": 12},
            "image_token_index": IMAGE,
            "projection_dim": 48,
        },
        squares(16),
        types=prefix,
        embedding=0.15,
    ),
]
