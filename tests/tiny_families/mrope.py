"""Families whose positions are coordinates in the image (M-RoPE), with 2 x 2 patches merged into a row."""

from __future__ import annotations

from dataclasses import replace

import torch

from tiny_families.base import END, IMAGE, START, TEXT, VIDEO, VISION, Picture, Tiny, modality_types, noise, one_of

ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2]}
TOWER = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 48,
}
PATCH = 3 * 2 * 4 * 4  # values of one patch
MARKS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}


def any_size(generator: torch.Generator) -> Picture:
    """Images of 6 x 6, 6 x 8 or 8 x 6 patches."""
    h, w = one_of(generator, [(6, 6), (6, 8), (8, 6)])
    n = h * w // 4
    tensors = {"pixel_values": noise(generator, h * w, PATCH), "image_grid_thw": torch.tensor([[1, h, w]])}
    return Picture([START, *[IMAGE] * n, END], [n], tensors)


def in_raster(generator: torch.Generator) -> Picture:
    """The same images with their patches in raster order."""
    picture = any_size(generator)
    pixels = noise(generator, picture.tensors["pixel_values"].shape[0], 3, 4, 4)
    return replace(picture, tensors=picture.tensors | {"pixel_values": pixels})


def in_lines(generator: torch.Generator) -> Picture:
    """The same images; a newline row ends each line of rows, and one row is in front and one behind."""
    picture = any_size(generator)
    ((_, h, w),) = picture.tensors["image_grid_thw"].tolist()
    n = (h // 2) * (w // 2 + 1) + 2
    tensors = picture.tensors | {"pixel_values": noise(generator, h * w, PATCH // 2)}  # no temporal axis
    return Picture([START, *[IMAGE] * n, END], [n], tensors)


def clip_of(frames_apart: bool):
    """Videos of 2 or 3 frames of 4 x 6 patches, in one block or with a time stamp before each frame."""

    def video(generator: torch.Generator) -> Picture:
        t = one_of(generator, [2, 3])
        stamps = torch.randint(3, 90, (t,), generator=generator).tolist()
        frame = [VIDEO] * 6
        ids = [START, *frame * t, END]
        if frames_apart:
            ids = [i for stamp in stamps for i in (stamp, START, *frame, END)]
        tensors = {
            "pixel_values_videos": noise(generator, t * 24, PATCH),
            "video_grid_thw": torch.tensor([[t, 4, 6]]),
        }
        return Picture(ids, [6 * t], tensors, video=True)

    return video


def tiny(
    name: str, tower: dict, text: dict, frames_apart: bool | None = None, tolerance: float = 3e-5, **options
) -> Tiny:
    video = None if frames_apart is None else clip_of(frames_apart)
    config = MARKS | {"vision_config": tower, "text_config": TEXT | {"rope_parameters": ROPE} | text}
    return Tiny(name, config | options, any_size, types=modality_types, video=video, tolerance=tolerance)


QWEN2 = {name: value for name, value in TOWER.items() if name not in ("intermediate_size", "out_hidden_size")}
QWEN3 = TOWER | {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
NORMED = {"head_dim": 12}
HYBRID = {
    "head_dim": 12,
    "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "rope_parameters": ROPE | {"partial_rotary_factor": 1.0},
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
GLM_MARKS = {
    "image_start_token_id": START,
    "image_end_token_id": END,
    "video_start_token_id": 94,
    "video_end_token_id": 95,
}

MROPE = [
    tiny("qwen2_vl", QWEN2 | {"embed_dim": 32, "hidden_size": 48, "mlp_ratio": 2}, {}, frames_apart=False),
    tiny(
        "qwen2_5_vl",
        TOWER | {"window_size": 16, "fullatt_block_indexes": [1]},
        {},
        frames_apart=False,
    ),
    tiny("qwen3_vl", QWEN3, NORMED, frames_apart=True),
    tiny(
        "qwen3_vl_moe",
        QWEN3,
        NORMED | EXPERTS,
        frames_apart=True,
    ),
    tiny("glm4v", TOWER | {"image_size": 32}, {}, **GLM_MARKS),
    tiny("glm46v", TOWER | {"image_size": 32}, {}, **GLM_MARKS),
    tiny("glmga", TOWER | {"image_size": 32}, {}, **GLM_MARKS),
    tiny(
        "glm4v_moe",
        TOWER | {"image_size": 32},
        NORMED
        | {
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "moe_intermediate_size": 32,
            "first_k_dense_replace": 2,
            "rope_parameters": ROPE | {"partial_rotary_factor": 1.0},
        },
        tolerance=1e-4,  # its router and norms compute in float32 whatever the dtype, and small differences grow
        **GLM_MARKS,
    ),
    tiny("glm_ocr", TOWER, NORMED, **GLM_MARKS),
    Tiny(
        "paddleocr_vl",
        MARKS
        | {
            "vision_config": VISION | {"patch_size": 4, "spatial_merge_size": 2},
            "text_config": TEXT | {"rope_parameters": ROPE, "head_dim": 12},
        },
        in_raster,
        types=modality_types,
    ),
    # Four axes, the last of which counts images: in transformers over the whole batch, so that no prompt equals itself
    # alone. Here that axis rotates nothing; `test_families.py` has a test in which it does.
    Tiny(
        "hunyuan_vl",
        {
            "vision_config": VISION
            | {"patch_size": 4, "spatial_merge_size": 2, "max_image_size": 32, "out_hidden_size": 48},
            "text_config": TEXT | {"head_dim": 12, "rope_parameters": ROPE | {"mrope_section": [2, 2, 2, 0]}},
            "image_token_id": IMAGE,
            "im_start_id": START,
            "im_end_id": END,
        },
        in_lines,
        types=modality_types,
        uneven="after_rms.weight",
    ),
    # its recurrence adds up in another order in prefill (chunks of 64) than in decoding
    tiny("qwen3_5", TOWER | {"num_position_embeddings": 64}, HYBRID, tolerance=3e-4),
    tiny(
        "qwen3_5_moe",
        TOWER | {"num_position_embeddings": 64},
        HYBRID | EXPERTS | {"shared_expert_intermediate_size": 32},
        tolerance=3e-4,
    ),
]
