"""A picture that changes in one place changes the tokens there and no other: tiled families, real image processors.

The models' towers do not attend here, so that a token depends on its own patches alone. A block well inside one cell of
the overlay's layout is changed: the row that the layout has for this cell must change, and no other of that view.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from PIL import Image, ImageDraw
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.ovis2.image_processing_pil_ovis2 import Ovis2ImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

import gripvlm
from gripvlm.eval.records import TokenMask
from gripvlm.report import GeometryError, layout, layout_of_images
from tiny_families import TINY
from tiny_families.base import BOS, IMAGE, _copied

SIZES = [(640, 360), (300, 700), (500, 480)]
SIDE = 32  # pixels of a tile
GREY = (90, 100, 110)
Box = tuple[float, float, float, float]


def anyres(kind: Any, *canvases: tuple[int, int]) -> Any:
    """Tiles of 32 pixels in canvases of so many (rows, columns) of them."""
    pinpoints = [[SIDE * rows, SIDE * columns] for rows, columns in canvases]
    edge = {"height": SIDE, "width": SIDE}
    return kind(size=edge, crop_size=edge, image_grid_pinpoints=pinpoints)


class Scene(NamedTuple):
    """A family with the image processor of its tiles; `blur`: rows around the right one that may change as well."""

    family: str
    processor: Any
    blur: int = 0


RESIZED_TWICE = {
    "size": {"longest_edge": 96},
    "max_image_size": {"longest_edge": SIDE},
    "resample": Image.Resampling.BILINEAR,  # Lanczos, the default, would reach beyond a cell
}
CANVASES = [(1, 2), (2, 1), (2, 2), (1, 3), (3, 1)]
SCENES = {
    "llava_next": Scene("llava_next", anyres(LlavaNextImageProcessorPil, *CANVASES)),
    "llava_onevision": Scene("llava_onevision", anyres(LlavaOnevisionImageProcessorPil, (1, 1), *CANVASES)),
    # More than nine tiles: the model shrinks their rows, each a mean of its neighbours.
    "shrunk": Scene("llava_onevision", anyres(LlavaOnevisionImageProcessorPil, (4, 4)), blur=1),
    "ovis2": Scene(
        "ovis2", Ovis2ImageProcessorPil(size={"height": SIDE, "width": SIDE}, crop_to_patches=True, max_patches=6)
    ),
    "ovis2_canvas": Scene(
        "ovis2",
        Ovis2ImageProcessorPil(
            size={"height": SIDE, "width": SIDE}, crop_to_patches=True, max_patches=6, use_covering_area_grid=False
        ),
    ),
    "internvl": Scene(
        "internvl", GotOcr2ImageProcessorPil(size={"height": SIDE, "width": SIDE}, crop_to_patches=True, max_patches=6)
    ),
    "idefics3": Scene("idefics3", Idefics3ImageProcessorPil(**RESIZED_TWICE)),
    "smolvlm": Scene("smolvlm", SmolVLMImageProcessorPil(**RESIZED_TWICE)),
}
SCENES = {name: scene for name, scene in SCENES.items() if scene.family in TINY}


@cache
def model_of(name: str) -> Any:
    """Four by four tokens a tile, of a tower that does not attend."""
    torch.manual_seed(0)
    family, settings = SCENES[name].family, _copied(TINY[SCENES[name].family].config)
    if "image_grid_pinpoints" in settings:
        settings["image_grid_pinpoints"] = SCENES[name].processor.image_grid_pinpoints
    settings["vision_config"]["image_size"] = [SIDE, SIDE] if family == "internvl" else SIDE
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(family, **settings)).eval()
    for name, module in model.get_encoder("image").named_modules():
        if name.endswith(("out_proj", "projection_layer")):
            torch.nn.init.zeros_(module.weight)
    return model


def encoded(name: str, images: list[Image.Image]) -> list[Any]:
    """The visual items of a prompt with these images."""
    model = model_of(name)
    made = SCENES[name].processor([images], return_tensors="pt")
    made = {name: value for name, value in made.items() if name not in ("grids", "rows", "cols")}
    with torch.no_grad():
        rows = model.base_model.get_image_features(**made).pooler_output
    ids = torch.tensor([[BOS, 5, *[IMAGE] * sum(part.reshape(-1, part.shape[-1]).shape[0] for part in rows), 7]])
    (items,) = gripvlm.encode(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), **made}).samples
    return list(items)


def reach(part: Any) -> tuple[float, float]:
    """How far around a pixel a resize to this part's cells, 8 pixels each, reads: bicubic, two pixels of the result."""
    left, top, right, bottom = part.geometry.boxes[0]
    return (right - left) / 8 * 2 + 1, (bottom - top) / 8 * 2 + 1


def inside(part: Any, cell: int) -> Box | None:
    """A box in the picture that changes nothing but this cell of the part; None where a cell is mostly padding."""
    (x, y), (width, height) = reach(part), part.geometry.image_size
    left, top, right, bottom = part.geometry.boxes[cell]
    box = (max(left, 0) + x, max(top, 0) + y, min(right, width) - x, min(bottom, height) - y)
    return box if box[0] + 1 < box[2] and box[1] + 1 < box[3] else None


def touches(box: Box, part: Any, cell: int, blur: int) -> bool:
    """Whether a box lies so near to a cell that its change may be seen there."""
    (x, y), (left, top, right, bottom) = reach(part), part.geometry.boxes[cell]
    x, y = x + blur * (right - left), y + blur * (bottom - top)
    return left - x < box[2] and box[0] < right + x and top - y < box[3] and box[1] < bottom + y


def changed(before: list[Any], after: list[Any]) -> list[int]:
    """The rows of the prompt, items one after the other, that differ."""
    pairs = zip(before, after, strict=True)
    return torch.cat([(a.features != b.features).any(1) for a, b in pairs]).nonzero().flatten().tolist()


@pytest.mark.parametrize("size", SIZES, ids=["wide", "tall", "square"])
@pytest.mark.parametrize("name", SCENES)
def test_only_the_token_of_the_place_changes(name, size):
    scene, plain, tried = SCENES[name], Image.new("RGB", size, GREY), 0
    before = encoded(name, [plain])
    parts = layout(scene.processor, size, [item.grid or item.rasters for item in before])
    assert {part.name for part in parts} == {"tiles", "whole"}
    for part in parts:
        width = part_width(part)
        for cell in sorted({*range(0, len(part.rows), max(1, len(part.rows) // 5)), len(part.rows) - 1}):
            if (box := inside(part, cell)) is None:
                continue
            picture = plain.copy()
            ImageDraw.Draw(picture).rectangle(box, fill=(250, 240, 30))
            rows = changed(before, encoded(name, [picture]))
            own = [part.rows.index(row) for row in rows if row in part.rows]
            assert cell in own
            for c in own:
                assert abs(c // width - cell // width) <= scene.blur
                assert abs(c % width - cell % width) <= scene.blur
            (other,) = (one for one in parts if one is not part)
            others = [other.rows.index(row) for row in rows if row in other.rows]
            assert len(own) + len(others) == len(rows)  # a newline never changes
            assert all(touches(box, other, c, scene.blur) for c in others)
            tried += 1
    assert tried >= 8


def part_width(part: Any) -> int:
    """Cells a line: of the whole part where tokens come line by line, of a tile where they come tile by tile."""
    top = part.geometry.boxes[0][1]
    return next((i for i, box in enumerate(part.geometry.boxes) if box[1] != top), len(part.rows))


@pytest.mark.parametrize("name", [name for name in SCENES if SCENES[name].family.startswith("llava")])
def test_newlines_are_the_rows_of_no_raster_and_all_alike(name):
    (item,) = encoded(name, [Image.new("RGB", SIZES[0], GREY)])
    whole, lines = item.rasters
    free = set(range(item.features.shape[0])) - {*whole.rows().tolist(), *lines.rows().tolist()}
    assert len(free) == lines.height
    newline = model_of(name).base_model.image_newline
    assert all(torch.equal(item.features[row], newline) for row in free)


@pytest.mark.parametrize("name", SCENES)
def test_each_of_several_pictures_has_its_own_places(name):
    """One bright cell in the second picture: its own part shows it, and no part of the first picture does."""
    scene, plain = SCENES[name], [Image.new("RGB", size, GREY) for size in SIZES[:2]]
    before = encoded(name, plain)
    grids, tokens = [item.grid or item.rasters for item in before], [item.features.shape[0] for item in before]
    parts = layout_of_images(scene.processor, SIZES[:2], grids, tokens)
    assert {part.image for part in parts} == {0, 1}
    for part in (part for part in parts if part.image == 1):
        middle = len(part.rows) // 2
        cell, box = next((c, box) for c in range(middle, len(part.rows)) if (box := inside(part, c)))
        picture = plain[1].copy()
        ImageDraw.Draw(picture).rectangle(box, fill=(250, 240, 30))
        after = encoded(name, [plain[0], picture])
        marks = [TokenMask((a.features != b.features).any(1)) for a, b in zip(before, after, strict=True)]
        shown = part.of(marks).mask().nonzero().flatten().tolist()
        assert cell in shown
        assert all(touches(box, part, other, scene.blur) for other in shown)
        assert not any(other.of(marks).mask().any() for other in parts if other.image == 0)


def test_a_processor_that_did_not_make_the_inputs_is_refused():
    (item,) = encoded("llava_next", [Image.new("RGB", (640, 360), GREY)])
    tiles, whole = layout(SCENES["llava_next"].processor, (640, 360), [item.rasters])
    assert whole.start == 0
    with pytest.raises(GeometryError, match="of 'tiles' are not one run"):
        tiles.start  # noqa: B018
    with pytest.raises(
        GeometryError, match="makes 2 x 4 tokens of the tiles of a 640 x 360 image, but there are 4 x 8"
    ):
        layout(anyres(LlavaNextImageProcessorPil, (1, 1)), (640, 360), [item.rasters])
    with pytest.raises(GeometryError, match="item of 2 rasters, which GotOcr2ImageProcessorPil is not known to make"):
        layout(SCENES["internvl"].processor, (640, 360), [item.rasters])
