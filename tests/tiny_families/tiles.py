"""Families that cut an image into tiles, each a visual item of its own with markers in between."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tiny_families.base import (
    BREAK,
    END,
    IMAGE,
    START,
    TEXT,
    VIDEO,
    VISION,
    Picture,
    Samples,
    Tiny,
    modality_types,
    no_types,
    noise,
    one_of,
)
from tiny_families.mrope import HYBRID
from tiny_families.plain import LLAMA


def tiled(generator: torch.Generator) -> Picture:
    """One tile, or two and a break between them; 16 rows each."""
    tiles = one_of(generator, [1, 2])
    ids = [i for _ in range(tiles) for i in (*[IMAGE] * 16, BREAK)]
    ids[-1] = END
    return Picture([START, *ids], [16] * tiles, {"pixel_values": noise(generator, tiles, 3, 32, 32)})


def by_sample(samples: Samples) -> dict[str, Tensor]:
    """[B, tiles, 3, H, W]: each sample's tiles of all its images, then blank ones."""
    own = [[picture.tensors["pixel_values"] for picture in sample] for sample in samples]
    pixels = torch.zeros(len(samples), max(sum(map(len, tiles)) for tiles in own), 3, 32, 32)
    for blank, tiles in zip(pixels, own, strict=True):
        if tiles:
            blank[: sum(map(len, tiles))] = torch.cat(tiles)
    return {"pixel_values": pixels}


def flat(generator: torch.Generator) -> Picture:
    """One tile of 6 x 6, 6 x 8 or 8 x 6 patches, flattened and padded to 48 of them."""
    h, w = one_of(generator, [(6, 6), (6, 8), (8, 6)])
    pixels, mask = torch.zeros(1, 48, 48), torch.zeros(1, 48, dtype=torch.long)
    pixels[0, : h * w], mask[0, : h * w] = noise(generator, h * w, 48), 1
    n = h * w // 4
    tensors = {"pixel_values": pixels, "pixel_attention_mask": mask, "spatial_shapes": torch.tensor([[h, w]])}
    return Picture([START, *[IMAGE] * n, END], [n], tensors)


def sliced(generator: torch.Generator) -> Picture:
    """An overview, or one and two slices side by side, of 12 x 12, 12 x 16 or 16 x 12 patches, 4 x 4 of them a row."""
    h, w = one_of(generator, [(12, 12), (12, 16), (16, 12)])
    n, crops = h * w // 16, one_of(generator, [1, 3])
    ids = [START, *[IMAGE] * n, END]
    for _ in range(crops - 1):
        ids += [BREAK, *[IMAGE] * n, 94]
    pixels = noise(generator, 1, 3, 2, 2 * h * w * crops)
    return Picture(ids, [n] * crops, {"pixel_values": pixels, "target_sizes": torch.tensor([[h, w]] * crops)})


def side_by_side(samples: Samples) -> dict[str, Tensor]:
    """All patches of a batch along the last axis."""
    pictures = [picture.tensors for sample in samples for picture in sample]
    pixels = torch.cat([tensors["pixel_values"] for tensors in pictures], -1)
    return {"pixel_values": pixels, "target_sizes": torch.cat([tensors["target_sizes"] for tensors in pictures])}


def _smol(name: str) -> Tiny:
    tower = VISION | {"model_type": f"{name}_vision", "patch_size": 4}
    return Tiny(
        name,
        {"vision_config": tower, "text_config": LLAMA, "image_token_id": IMAGE, "scale_factor": 2},
        tiled,
        by_sample,
    )


def _mini(name: str, types: Callable[[Tensor], dict[str, Tensor]] = no_types, **marks: int) -> Tiny:
    config = {
        "vision_config": VISION | {"image_size": 16, "patch_size": 2},
        "text_config": TEXT | HYBRID | {"model_type": "qwen3_5_text"},
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "insert_layer_id": 0,
    }
    return Tiny(name, config | marks, sliced, side_by_side, types=types, tolerance=3e-4)


TILES = [
    _smol("idefics3"),
    _smol("smolvlm"),
    Tiny(
        "ovis2",
        {
            "vision_config": VISION
            | {"patch_size": 4, "hidden_stride": 2, "vocab_size": 40, "num_visual_indicator_tokens": 5},
            "text_config": TEXT | {"model_type": "qwen2"},
            "image_token_id": IMAGE,
            "visual_indicator_token_ids": [START, END, BREAK, 94, 95],
            "hidden_size": 48,
            "vocab_size": 99,
            "tie_word_embeddings": False,
        },
        tiled,
    ),
    Tiny(
        "lfm2_vl",
        {
            "vision_config": {name: value for name, value in VISION.items() if name != "image_size"}
            | {"model_type": "siglip2_vision_model", "patch_size": 4, "num_patches": 64, "vision_use_head": False},
            "text_config": TEXT
            | {
                "model_type": "lfm2",
                "layer_types": ["conv", "full_attention", "conv", "full_attention"],
                "block_auto_adjust_ff_dim": False,
            },
            "image_token_id": IMAGE,
            "projector_hidden_size": 64,
        },
        flat,
    ),
    _mini("minicpmv4_6"),
    _mini(
        "minicpmv4_7",
        modality_types,
        image_start_id=START,
        image_end_id=END,
        slice_start_id=BREAK,
        slice_end_id=94,
        newline_id=95,
    ),
]
