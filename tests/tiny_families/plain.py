"""Families with ordinary positions whose rows follow from the image's size."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tiny_families.base import BREAK, END, IMAGE, START, TEXT, VISION, Picture, Samples, Tiny, joined, noise, one_of

LLAMA = TEXT | {"model_type": "llama"}
CLIP = VISION | {"model_type": "clip_vision_model", "patch_size": 8, "projection_dim": 32}


def squares(rows: int, start: tuple[int, ...] = (), end: tuple[int, ...] = ()):
    """Pictures of 32 x 32 pixels and a fixed number of rows, between markers."""

    def picture(generator: torch.Generator) -> Picture:
        return Picture([*start, *[IMAGE] * rows, *end], [rows], {"pixel_values": noise(generator, 1, 3, 32, 32)})

    return picture


def in_tiles(generator: torch.Generator) -> Picture:
    """A base tile and 2, 2 or 4 further ones, of 2 x 2 rows each, with a newline row behind each row."""
    height, width = one_of(generator, [(16, 32), (32, 16), (32, 32)])
    tiles = 1 + height * width // 256
    n = 4 + (height // 8) * (width // 8 + 1)
    sizes = torch.tensor([[height, width]])
    return Picture([IMAGE] * n, [n], {"pixel_values": noise(generator, 1, tiles, 3, 16, 16), "image_sizes": sizes})


def padded_tiles(samples: Samples) -> dict[str, Tensor]:
    """Blank tiles behind each image's own, as processors add them."""
    pictures = [picture for sample in samples for picture in sample]
    most = max(picture.tensors["pixel_values"].shape[1] for picture in pictures)
    pixels = torch.zeros(len(pictures), most, 3, 16, 16)
    for blank, picture in zip(pixels, pictures, strict=True):
        tiles = picture.tensors["pixel_values"][0]
        blank[: len(tiles)] = tiles
    return {"pixel_values": pixels, "image_sizes": torch.cat([p.tensors["image_sizes"] for p in pictures])}


def with_breaks(generator: torch.Generator) -> Picture:
    """Any height and width; each row of tokens ends with a break, the last with an end."""
    height, width = one_of(generator, [(24, 24), (24, 32), (32, 24)])
    h, w = height // 8, width // 8
    ids = [i for _ in range(h) for i in (*[IMAGE] * w, BREAK)]
    ids[-1] = END
    pixels = noise(generator, 1, 3, height, width)
    return Picture(ids, [h * w], {"pixel_values": pixels, "image_sizes": torch.tensor([[height, width]])})


def unbroken(generator: torch.Generator) -> Picture:
    """The same without breaks."""
    picture = with_breaks(generator)
    return replace(picture, ids=[IMAGE] * picture.sizes[0])


def padded_below(samples: Samples) -> dict[str, Tensor]:
    """Pixels padded on the right and below to the largest image of the batch."""
    sizes = torch.cat([picture.tensors["image_sizes"] for sample in samples for picture in sample])
    high, wide = sizes.amax(0).tolist()
    padded = [
        [
            Picture(p.ids, p.sizes, {"pixel_values": torch.nn.functional.pad(p.tensors["pixel_values"], room)})
            for p in sample
            for room in [(0, wide - p.tensors["pixel_values"].shape[-1], 0, high - p.tensors["pixel_values"].shape[-2])]
        ]
        for sample in samples
    ]
    return joined(padded) | {"image_sizes": sizes}


_ANYRES = {"image_grid_pinpoints": [[16, 32], [32, 16], [32, 32]], "text_config": LLAMA, "image_token_index": IMAGE}


def _intern(name: str, tower: str, text: dict) -> Tiny:
    vision = {"model_type": tower, "image_size": [32, 32], "patch_size": [4, 4], "num_hidden_layers": 3}
    config = {"vision_config": VISION | vision, "text_config": text, "image_token_id": IMAGE, "downsample_ratio": 0.5}
    return Tiny(name, config, squares(16, (START,), (END,)))


PLAIN = [
    Tiny(
        "llava",
        {"vision_config": CLIP | {"num_hidden_layers": 3}, "text_config": LLAMA, "image_token_index": IMAGE},
        squares(16),
    ),
    _intern("internvl", "internvl_vision", LLAMA),
    _intern("qianfan_ocr", "qianfan_ocr_vision", TEXT | {"model_type": "qwen3", "head_dim": 12}),
    Tiny(
        "llava_next",
        _ANYRES | {"vision_config": CLIP | {"num_hidden_layers": 3, "image_size": 16}},
        in_tiles,
        padded_tiles,
    ),
    Tiny(
        "llava_onevision",
        _ANYRES
        | {
            "vision_config": VISION | {"model_type": "siglip_vision_model", "patch_size": 8, "image_size": 16},
            "video_token_index": 97,
            "vision_feature_layer": -1,
        },
        in_tiles,
        padded_tiles,
    ),
    Tiny(
        "mistral3",
        {
            "vision_config": VISION | {"model_type": "pixtral", "patch_size": 4, "head_dim": 16},
            "text_config": TEXT | {"model_type": "mistral", "head_dim": 12, "sliding_window": None},
            "image_token_index": IMAGE,
            "spatial_merge_size": 2,
            "vision_feature_layer": -1,
        },
        with_breaks,
        padded_below,
    ),
    Tiny(
        "lighton_ocr",
        {
            "vision_config": VISION | {"model_type": "pixtral", "patch_size": 4, "head_dim": 16},
            "text_config": TEXT | {"model_type": "qwen3", "head_dim": 12},
            "image_token_id": IMAGE,
            "spatial_merge_size": 2,
        },
        unbroken,
        padded_below,
    ),
]
