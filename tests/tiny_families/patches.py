"""Families that get patches and `image_grid_thw`, but whose positions count tokens, without M-RoPE."""

from __future__ import annotations

import torch

from tiny_families.base import END, IMAGE, START, TEXT, VIDEO, VISION, Picture, Tiny, noise, one_of
from tiny_families.mrope import MARKS, any_size


def in_raster(generator: torch.Generator) -> Picture:
    """Images of 6 x 6, 6 x 8 or 8 x 6 patches in raster order."""
    h, w = one_of(generator, [(6, 6), (6, 8), (8, 6)])
    n = h * w // 4
    tensors = {"pixel_values": noise(generator, h * w, 3, 4, 4), "image_grid_thw": torch.tensor([[1, h, w]])}
    return Picture([START, *[IMAGE] * n, END], [n], tensors)


def pooled_over_frames(generator: torch.Generator) -> Picture:
    """Videos of 2 or 3 frames of 4 x 8 patches, whose mean makes 8 rows."""
    t = one_of(generator, [2, 3])
    tensors = {
        "pixel_values_videos": noise(generator, t * 32, 3, 4, 4),
        "video_grid_thw": torch.tensor([[t, 4, 8]]),
    }
    return Picture([START, *[VIDEO] * 8, END], [8], tensors, video=True)


PATCHES = [
    Tiny(
        "kimi_k25",
        MARKS
        | {
            "vision_config": {name: value for name, value in VISION.items() if name != "image_size"}
            | {"patch_size": 4, "pos_emb_height": 8, "pos_emb_width": 8},
            "text_config": TEXT
            | {
                "model_type": "deepseek_v3",
                "moe_intermediate_size": 32,
                "n_routed_experts": 4,
                "num_experts_per_tok": 2,
                "n_group": 1,
                "topk_group": 1,
                "first_k_dense_replace": 2,
                "num_key_value_heads": 4,
                "q_lora_rank": 16,
                "kv_lora_rank": 16,
                "qk_rope_head_dim": 8,
                "qk_nope_head_dim": 8,
                "v_head_dim": 12,
            },
            "projection_hidden_size": 32,
        },
        in_raster,
        video=pooled_over_frames,
    ),
    Tiny(
        "lfm3_vl",
        MARKS
        | {
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 64,
                "patch_size": 4,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "layer_types": ["conv", "full_attention"],
            },
            "text_config": TEXT
            | {
                "model_type": "lfm3",
                "head_dim": 12,
                "sliding_window": 256,
                "layer_types": ["conv", "full_attention", "conv", "sliding_attention"],
            },
            "projector_hidden_size": 64,
        },
        any_size,
    ),
]
