"""A number for each image from its pixels alone: the same in any batch and on any device.

Processors pad pixels to the largest image or the largest number of tiles in the batch, so what is hashed is the
image's own part: found from the shapes, the same way for every family.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}
SAMPLES = 4096  # values of an image that are hashed: enough to tell images apart, and a short copy from a device


def content_keys(inputs: Mapping[str, Any], modality: str, count: int) -> list[int]:
    """One key for each of `count` items; zeros if the pixels cannot be divided by item."""
    pixels = inputs.get(PIXELS[modality])
    if not isinstance(pixels, Tensor):
        return [0] * count
    pieces = _pieces(inputs, modality, pixels.detach(), count)
    return [_key(piece) for piece in pieces] if len(pieces) == count else [0] * count


def _pieces(inputs: Mapping[str, Any], modality: str, pixels: Tensor, count: int) -> list[Tensor]:
    """Each item's own pixels; a list of another length than `count` if they cannot be divided."""
    if (grids := inputs.get(f"{modality}_grid_thw")) is not None:  # [patches of all items, d]
        sizes = grids.prod(-1).tolist()
        return list(pixels.split(sizes)) if sum(sizes) == pixels.shape[0] else []
    if (crops := inputs.get("image_num_crops")) is not None:  # [crops of all items, patches, d]
        return list(pixels.split(crops.tolist())) if int(crops.sum()) == pixels.shape[0] else []
    if (targets := inputs.get("target_sizes")) is not None:  # [1, 3, patch, patch x patches of all items]
        sizes = (targets.prod(-1) * pixels.shape[-2]).tolist()
        return list(pixels.split(sizes, dim=-1)) if sum(sizes) == pixels.shape[-1] else []
    if pixels.ndim == 5 and pixels.shape[0] != count:  # [samples, tiles, 3, H, W], blank tiles are padding
        return [tile for sample in pixels for tile in sample if bool(tile.any())]
    if pixels.shape[0] != count:
        return []
    sizes = inputs.get("image_sizes")
    if pixels.ndim == 4 and sizes is not None:  # [items, 3, H, W], padded on the right and below
        return [image[:, : int(h), : int(w)] for image, (h, w) in zip(pixels, sizes, strict=True)]
    if pixels.ndim == 5 and modality == "image":  # [items, tiles, 3, H, W]
        return [torch.stack([tile for tile in item if bool(tile.any())] or [item[0]]) for item in pixels]
    return list(pixels) if pixels.ndim > 2 else []


def _key(pixels: Tensor) -> int:
    # Not torch's own hash or sum: those depend on the device and on the order of additions.
    # Strided, so that all parts of an image count; float32, as numpy has no bfloat16.
    flat = pixels.reshape(-1)
    sample = flat[:: max(1, flat.numel() // SAMPLES)].float().cpu()
    return int.from_bytes(hashlib.blake2b(sample.numpy().tobytes(), digest_size=7).digest(), "little")
