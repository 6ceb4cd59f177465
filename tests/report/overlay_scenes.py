"""Overlays of a merged-patch family, two tiled ones and a video, by real image processors and tiny random models.

In each picture one block is bright; the token that the processor's pixels light up is found, `given` keeps it
alone, the tiny model runs, and the overlay is drawn from the record. The lit cell must lie on the bright block:
tests/report/test_overlays.py measures it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from PIL import Image, ImageDraw
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import gripvlm
from gripvlm.report import Part, layout
from tiny_families import build
from tiny_families.base import BOS, END, IMAGE, START, VIDEO, modality_types

DARK, BRIGHT = (40, 60, 90), (255, 250, 220)
Box = tuple[float, float, float, float]


class Drawn(NamedTuple):
    """One scene: the original pictures (frames), the bright box, the parts, and what was kept of each."""

    pictures: list[Image.Image]
    box: Box
    parts: list[Part]
    selections: list[Any]
    lit: list[int]  # the brightest row of each visual item


def picture(size: tuple[int, int], box: Box) -> Image.Image:
    image = Image.new("RGB", size, DARK)
    pen = ImageDraw.Draw(image)
    for x in range(0, size[0], 40):  # something to orient by
        pen.line((x, 0, x, size[1]), fill=(60, 85, 120))
    for y in range(0, size[1], 40):
        pen.line((0, y, size[0], y), fill=(60, 85, 120))
    pen.rectangle(box, fill=BRIGHT)
    return image


def run(family: str, inputs: dict[str, Any], lit: list[int], sizes: list[int]) -> list[Any]:
    """The selections of one prompt when the lit row of each item is kept and nothing else."""
    scores = [[torch.zeros(n).index_fill(0, torch.tensor([row]), 1.0) for row, n in zip(lit, sizes, strict=True)]]
    model = build(family)
    with gripvlm.prune(model, gripvlm.get_pruner("given", scores=scores), keep=1) as record:
        model.generate(**inputs, max_new_tokens=1)
    return record.selections[0]


def ids_of(marks: list[int]) -> dict[str, torch.Tensor]:
    ids = torch.tensor([[BOS, 5, *marks, 7]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def merged_patches(size: tuple[int, int], box: Box) -> Drawn:
    """qwen2_5_vl: 2 x 2 patches of 4 pixels a token, any size of image."""
    image = picture(size, box)
    processor = Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 1024, "longest_edge": 4096}
    )
    made = processor(image, return_tensors="pt")
    _, h, w = made["image_grid_thw"][0].tolist()
    n = h * w // 4
    lit = [int(made["pixel_values"].unflatten(0, (n, 4)).mean((1, 2)).argmax())]
    inputs = ids_of([START, *[IMAGE] * n, END]) | dict(made)
    selections = run("qwen2_5_vl", inputs | modality_types(inputs["input_ids"]), lit, [n])
    return Drawn([image], box, layout(processor, size, [(h // 2, w // 2)]), selections, lit)


def _tile_rows(tiles: torch.Tensor) -> list[int]:
    """The brightest of 4 x 4 cells of each tile [tiles, 3, 32, 32]."""
    return [int(torch.nn.functional.avg_pool2d(tile.mean(0)[None], 8).argmax()) for tile in tiles]


def tiles_internvl(size: tuple[int, int], box: Box) -> Drawn:
    image = picture(size, box)
    processor = GotOcr2ImageProcessorPil(
        size={"height": 32, "width": 32}, crop_to_patches=True, min_patches=1, max_patches=6
    )
    pixels = processor(image, return_tensors="pt")["pixel_values"]
    lit = _tile_rows(pixels)
    inputs = ids_of([START, *[IMAGE] * (16 * len(pixels)), END]) | {"pixel_values": pixels}
    selections = run("internvl", inputs, lit, [16] * len(pixels))
    return Drawn([image], box, layout(processor, size, [(4, 4)] * len(pixels)), selections, lit)


def tiles_idefics3(size: tuple[int, int], box: Box) -> Drawn:
    image = picture(size, box)
    processor = Idefics3ImageProcessorPil(size={"longest_edge": 96}, max_image_size={"longest_edge": 32})
    pixels = processor([[image]], return_tensors="pt")["pixel_values"]
    lit = _tile_rows(pixels[0])
    count = pixels.shape[1]
    inputs = ids_of([i for _ in range(count) for i in (START, *[IMAGE] * 16, END)]) | {"pixel_values": pixels}
    selections = run("idefics3", inputs, lit, [16] * count)
    return Drawn([image], box, layout(processor, size, [(4, 4)] * count), selections, lit)


def video(size: tuple[int, int], box: Box) -> Drawn:
    """qwen2_5_vl: three steps, the block bright in the second only. Video processors need torchvision, so the frames
    go through the image processor, whose patches are laid out in the same way, and are put one behind the other."""
    frames = [picture(size, box if i == 1 else (0, 0, 0, 0)) for i in range(3)]
    processor = Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 1024, "longest_edge": 2048}
    )
    made = [processor(frame, return_tensors="pt") for frame in frames]
    _, h, w = made[0]["image_grid_thw"][0].tolist()
    pixels, n = torch.cat([one["pixel_values"] for one in made]), 3 * h * w // 4
    lit = [int(pixels.unflatten(0, (n, 4)).mean((1, 2)).argmax())]
    inputs = ids_of([START, *[VIDEO] * n, END])
    inputs |= {"pixel_values_videos": pixels, "video_grid_thw": torch.tensor([[3, h, w]])}
    selections = run("qwen2_5_vl", inputs | modality_types(inputs["input_ids"]), lit, [n])
    return Drawn(frames, box, layout(processor, size, [None], patches=(3, h, w)), selections, lit)


SCENES = {
    "merged": merged_patches,
    "internvl": tiles_internvl,
    "idefics3": tiles_idefics3,
    "video": video,
}
