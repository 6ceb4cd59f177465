"""Reports: where each token lies in the picture, proved on real image processors; overlays, tables, plots."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from gripvlm.errors import GripError
from gripvlm.report import GeometryError, geometry, overlay, table
from gripvlm.types import Merge, Selection
from tiny_lab import lab_processor

SQUARE = {"height": 336, "width": 336}
PROCESSORS = {
    "llava-1.5": (CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size=SQUARE), (24, 24)),
    "lab": (lab_processor(), (16, 16)),
    "padded to a square": (
        LlavaImageProcessorPil(size={"shortest_edge": 336}, crop_size=SQUARE, do_pad=True),
        (24, 24),
    ),
    "wide crop": (
        CLIPImageProcessorPil(size={"shortest_edge": 300}, crop_size={"height": 224, "width": 280}),
        (16, 20),
    ),
    "stretched": (CLIPImageProcessorPil(size={"height": 224, "width": 336}, do_center_crop=False), (16, 24)),
    "crop larger than the image": (
        CLIPImageProcessorPil(size={"shortest_edge": 168}, crop_size={"height": 224, "width": 224}),
        (16, 16),
    ),
}
SIZES = {"wide": (900, 320), "tall": (310, 800), "square": (512, 512), "small": (60, 47)}


def lit_patch(processor, image, grid):
    """(cell that is brightest after real processing, how much brighter than the median cell)."""
    images = getattr(processor, "image_processor", processor)
    pixels = torch.as_tensor(np.asarray(images(image, return_tensors="np")["pixel_values"]))[0]
    mean = torch.tensor(images.image_mean).view(3, 1, 1)
    spread = torch.tensor(images.image_std).view(3, 1, 1)
    grey = (pixels * spread + mean).mean(0)
    (h, w), (height, width) = grid, grey.shape
    cells = grey.reshape(h, height // h, w, width // w).mean((1, 3)).flatten()
    return int(cells.argmax()), float(cells.max() - cells.median())


def visible_cells(cells):
    """Cells that lie in the image as a whole."""
    width, height = cells.image_size
    return [
        i
        for i, (left, top, right, bottom) in enumerate(cells.boxes)
        if left >= -1e-6 and top >= -1e-6 and right <= width + 1e-6 and bottom <= height + 1e-6
    ]


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("name", PROCESSORS)
def test_a_bright_block_lights_up_the_cell_whose_box_holds_it(name, size):
    processor, grid = PROCESSORS[name]
    cells = geometry(processor, size, grid)
    visible = visible_cells(cells)
    assert len(visible) >= 0.2 * len(cells.boxes)
    for cell in {visible[0], visible[len(visible) // 3], visible[len(visible) // 2 + 3], visible[-1]}:
        left, top, right, bottom = (round(edge) for edge in cells.boxes[cell])
        image = Image.new("RGB", size, (30, 30, 30))
        image.paste((255, 255, 255), (left, top, max(right, left + 1), max(bottom, top + 1)))
        found, contrast = lit_patch(processor, image, grid)
        assert found == cell
        assert contrast > 0.2


@pytest.mark.parametrize("size", [(900, 320), (310, 800)], ids=["wide", "tall"])
def test_what_lies_outside_the_seen_part_lights_up_nothing(size):
    processor, grid = PROCESSORS["llava-1.5"]
    left, top, right, bottom = geometry(processor, size, grid).seen
    image = Image.new("RGB", size, (255, 255, 255))
    image.paste((30, 30, 30), (int(left) - 3, int(top) - 3, int(right) + 4, int(bottom) + 4))
    assert (right - left) * (bottom - top) < 0.6 * size[0] * size[1]
    assert lit_patch(processor, image, grid)[1] < 0.01


def test_boxes_tile_the_seen_part():
    for processor, grid in PROCESSORS.values():
        cells = geometry(processor, (640, 480), grid)
        assert len(cells.boxes) == grid[0] * grid[1]
        for i in range(len(cells.boxes) - 1):
            if (i + 1) % grid[1]:
                assert cells.boxes[i][2] == pytest.approx(cells.boxes[i + 1][0])


def test_layouts_that_are_not_known_are_refused():
    clip = CLIPImageProcessorPil()
    with pytest.raises(GeometryError, match="no plain raster"):
        geometry(clip, (10, 10), None)
    for change in ({"image_grid_pinpoints": [[336, 672]]}, {"do_image_splitting": True}, {"crop_to_patches": True}):
        tiled = CLIPImageProcessorPil()
        for key, value in change.items():
            setattr(tiled, key, value)
        with pytest.raises(GeometryError, match="tiles"):
            geometry(tiled, (10, 10), (4, 4))
    odd = CLIPImageProcessorPil()
    odd.do_pad, odd.pad_size = True, None
    with pytest.raises(GeometryError, match="depends on the batch"):
        geometry(odd, (10, 10), (4, 4))


def test_towers_of_any_size_see_the_whole_image():
    class AnySize:
        patch_size, merge_size, do_resize = 14, 2, True
        size = {"shortest_edge": 3136, "longest_edge": 12845056}  # noqa: RUF012  counts of pixels, not edges

    cells = geometry(AnySize(), (300, 100), (2, 6))
    assert cells.seen == (0, 0, 300, 100)
    assert cells.boxes[7] == (50, 50, 100, 100)


# --- overlay --------------------------------------------------------------------------------------


def chosen(indices, n):
    return Selection(torch.tensor(indices), n)


def test_kept_cells_stay_as_they_are_and_dropped_ones_darken():
    image = Image.new("RGB", (128, 128), (200, 120, 40))
    cells = geometry(lab_processor(), image.size, (16, 16))
    drawn = overlay(image, chosen([0, 17], 256), cells, caption="")
    factor = drawn.width // 128
    assert drawn.size == (128 * factor, 128 * factor)
    assert factor >= 4
    centre = [
        drawn.getpixel((int((c % 16 + 0.5) * 8 * factor), int((c // 16 + 0.5) * 8 * factor))) for c in (0, 17, 1, 255)
    ]
    assert centre[0] == centre[1] == (200, 120, 40)
    assert all(sum(pixel) < 0.6 * 360 for pixel in centre[2:])


@pytest.mark.parametrize("size", [(900, 300), (300, 900)], ids=["wide", "tall"])
def test_cropped_borders_look_unlike_dropped_cells(size):
    image = Image.new("RGB", size, (200, 200, 200))
    processor, grid = PROCESSORS["llava-1.5"]
    cells = geometry(processor, size, grid)
    drawn = np.asarray(overlay(image, chosen(list(range(576)), 576), cells, caption=""))
    left, top, right, bottom = map(int, cells.seen)
    seen = drawn[top + 5 : bottom - 5, left + 5 : right - 5]
    assert (seen == 200).all()
    border = drawn[: size[1], : left - 2] if size[0] > size[1] else drawn[: top - 2, : size[0]]
    assert border.max() < 160
    assert border.std() > 10


def test_an_overlay_is_written_with_its_caption(tmp_path):
    image = Image.new("RGB", (128, 96), (90, 160, 90))
    cells = geometry(lab_processor(), image.size, (16, 16))
    bare = overlay(image, chosen([3], 256), cells, caption="")
    path = tmp_path / "new" / "kept.png"
    words = "what is written next to the fish? " * 5 + "unbreakable" * 30 + "\n1 of 256 tokens: yes"
    drawn = overlay(image, chosen([3], 256), cells, path, words)
    assert Image.open(path).size == drawn.size
    assert drawn.width == bare.width
    assert drawn.height > bare.height + 100
    assert overlay(image, chosen([3], 256), cells).height > bare.height  # k of n by default


def test_an_overlay_says_what_a_picture_cannot():
    image = Image.new("RGB", (300, 900))
    processor, grid = PROCESSORS["padded to a square"]
    cells = geometry(processor, image.size, grid)
    plain = overlay(image, chosen([12], 576), cells, caption="a")
    padding = overlay(image, chosen([0], 576), cells, caption="a")
    none = torch.zeros(0, dtype=torch.long)
    merged = overlay(
        image, Selection(torch.tensor([12]), 576, merge=Merge(none, none, none.float())), cells, caption="a"
    )
    assert padding.height > plain.height
    assert merged.height > plain.height


def test_the_wrong_image_or_selection_is_refused():
    cells = geometry(lab_processor(), (128, 128), (16, 16))
    with pytest.raises(GeometryError, match="geometry is for"):
        overlay(Image.new("RGB", (128, 64)), chosen([0], 256), cells)
    with pytest.raises(GeometryError, match="576 tokens"):
        overlay(Image.new("RGB", (128, 128)), chosen([0], 576), cells)


# --- tables and plots -----------------------------------------------------------------------------


def rows(pruners=("full", "random", "grid", "mine|odd"), tasks=("lab/reading", "lab/text")):
    made = []
    for t, task in enumerate(tasks):
        for p, pruner in enumerate(pruners):
            for keep in (1.0,) if pruner == "full" else (0.1, 64):
                score = 0.9 if pruner == "full" else 0.3 + 0.1 * p + 0.05 * t
                made.append(
                    {
                        "model": "m",
                        "task": task,
                        "pruner": pruner,
                        "keep": keep,
                        "n": 20,
                        "blind": 0.2,
                        "majority": 0.25,
                    }
                    | {"keep_fraction": keep if keep != 64 else 0.25, "tokens": 26.0 if keep == 0.1 else 64.0}
                    | {"score": score, "ci_low": score - 0.1, "ci_high": score + 0.1, "extras": {}}
                    | {
                        f"seconds_{name}": 0.0123
                        for name in ("vision", "pruner", "overhead", "prefill", "decode", "total")
                    }
                )
    return made


def printed(thing, width=140):
    with open(os.devnull, "w") as nowhere:
        console = Console(width=width, record=True, file=nowhere)
        console.print(thing)
        return console.export_text()


def test_the_table_has_scores_intervals_and_times():
    text = printed(table(rows(tasks=("lab/reading", "mean"))))
    assert "reading" in text
    assert "mean" in text
    assert "no image" in text
    assert "90.0" in text
    assert "80-100" in text
    assert "12.3" in text
    assert "10%" in text


def test_six_families_and_their_mean_fit_into_80_columns():
    names = ("existence", "perception", "science", "diagram", "reading", "text")
    made = rows(tasks=[*(f"lab/{name}" for name in names), "mean"])
    text = printed(table(made), 80)
    assert "…" not in text
    assert "perception" in text


def test_no_rows_is_an_error():
    with pytest.raises(GripError, match="no rows"):
        table([])
