"""Families that see an image twice, as a whole and in crops, and join the rows of both into one item."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tiny_families.base import BREAK, END, IMAGE, START, TEXT, VISION, Picture, Samples, Tiny, joined, noise, one_of

QUERIES = 6  # rows of each view of the tiny DeepSeek-OCR-2


def separated(generator: torch.Generator) -> Picture:
    """The whole image behind no or two crops of it, and a row that ends the views."""
    crops = one_of(generator, [0, 2])
    n = QUERIES * (crops + 1)
    tensors = {"pixel_values": noise(generator, 1, 3, 64, 64), "num_local_patches": torch.tensor([crops])}
    if crops:
        tensors["pixel_values_local"] = noise(generator, crops, 3, 64, 64)
    return Picture([IMAGE] * (n + 1), [n], tensors)


def fewer_queries(model: Any) -> None:
    """The number of learned queries, 144 and 256, is no argument of the config."""
    tower = model.model.vision_tower
    width = tower.config.encoder_config.hidden_size
    tower.query_768_resolution = tower.query_1024_resolution = nn.Embedding(QUERIES, width)


def cropped(generator: torch.Generator) -> Picture:
    """The whole image, 2 x 2 rows, and one or two crops, 2 x 2 or 2 x 4 rows; each row pools up to 2 x 2 patches."""
    crops = one_of(generator, [1, 2])
    n = 4 + 4 * crops
    ids = [START, *[IMAGE] * 4, END, START]
    for _ in range(2):
        ids += [*[IMAGE] * 2 * crops, BREAK]
    # 4 x 4 patches a crop; the first row's pooling has a place without a patch.
    blocks = torch.arange(16).view(2, 2, 2, 2).transpose(1, 2).reshape(4, 4)
    views = [blocks + 16 * view for view in range(1 + crops)]
    crop_rows = torch.cat([view.view(2, 2, 4) for view in views[1:]], dim=1).flatten(0, 1)
    pooling = torch.cat((views[0], crop_rows))
    pooling[0, -1] = -1
    tensors = {
        "pixel_values": noise(generator, 1 + crops, 16, 48),
        "image_token_pooling": pooling,
        "image_grids": torch.tensor([[2, 2, 2, 2 * crops]]),
        "image_num_crops": torch.tensor([1 + crops]),
    }
    return Picture([*ids, END], [n], tensors)


def counted_on(samples: Samples) -> dict[str, Tensor]:
    """Pooling counts the patches of all images of a batch."""
    together = joined(samples)
    pictures = [picture for sample in samples for picture in sample]
    start, parts = 0, []
    for picture in pictures:
        places = picture.tensors["image_token_pooling"]
        parts.append(torch.where(places >= 0, places + start, places))
        start += picture.tensors["pixel_values"].shape[:2].numel()
    return together | {"image_token_pooling": torch.cat(parts)}


def with_markers(ids: Tensor) -> dict[str, Tensor]:
    """Molmo2's markers are part of the image."""
    return {"mm_token_type_ids": ((ids == IMAGE) | (ids == START) | (ids == END) | (ids == BREAK)).long()}


HEADS = {"num_key_value_heads": 2, "head_dim": 16}

VIEWS = [
    Tiny(
        "deepseek_ocr2",
        {
            "vision_config": {
                "sam_config": {
                    "hidden_size": 32,
                    "output_channels": 16,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 2,
                    "image_size": 64,
                    "patch_size": 4,
                    "window_size": 8,
                    "global_attn_indexes": [1],
                    "downsample_channels": [24, 32],
                },
                "encoder_config": {
                    "hidden_size": 32,
                    "intermediate_size": 64,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 2,
                    "num_key_value_heads": 2,
                },
            },
            "text_config": TEXT
            | {
                "n_routed_experts": 4,
                "n_shared_experts": 1,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 32,
                "mlp_layer_types": ["dense", "dense", "sparse", "sparse"],
            },
            "image_token_id": IMAGE,
        },
        separated,
        changed=fewer_queries,
    ),
    Tiny(
        "molmo2",
        {
            "vision_config": VISION | HEADS | {"image_size": [16, 16], "patch_size": 4},
            "adapter_config": HEADS
            | {
                "vision_feature_layer": [1, 0],
                "hidden_size": 32,
                "num_attention_heads": 2,
                "intermediate_size": 64,
                "text_hidden_size": 48,
            },
            "text_config": {name: value for name, value in TEXT.items() if not name.endswith("token_id")}
            | {"head_dim": 12, "additional_vocab_size": 0},
            "image_patch_id": IMAGE,
            "image_start_token_id": START,
            "image_end_token_id": END,
        },
        cropped,
        counted_on,
        types=with_markers,
    ),
]
