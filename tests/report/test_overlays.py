"""A token that is lit lands at the right pixels: merged patches, tiles and video frames, by real processors."""

from __future__ import annotations

import numpy as np
import overlay_scenes as overlays
import pytest
import torch
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from gripvlm.eval.records import TokenMask
from gripvlm.report import GeometryError, layout, layout_of_images, overlay

PLACES = [((640, 360), (440, 195, 505, 240)), ((300, 700), (30, 560, 90, 620)), ((500, 480), (10, 20, 80, 90))]


def overlap(box, cell) -> float:
    """Pixels that a cell shares with the bright block."""
    width, height = (min(box[i + 2], cell[i + 2]) - max(box[i], cell[i]) for i in (0, 1))
    return max(0.0, width) * max(0.0, height)


@pytest.mark.parametrize(("size", "box"), PLACES, ids=["wide", "tall", "square"])
@pytest.mark.parametrize("name", overlays.SCENES)
def test_the_lit_cell_lies_on_the_bright_block(name, size, box):
    drawn = overlays.SCENES[name](size, box)
    for number, part in enumerate(drawn.parts):
        shares = [overlap(box, cell) for cell in part.geometry.boxes]
        lit = part.of(drawn.selections).mask().nonzero().flatten().tolist()
        if name == "video" and number != 1:
            assert lit == []  # the block is bright in the second frame only
            continue
        # one token was lit in each tile: of them all, one is the cell that shows most of the block, or nearly
        assert max(shares[cell] for cell in lit) >= 0.85 * max(shares) > 0
        assert len(lit) == (len(drawn.selections) - 1 if part.name == "tiles" else 1)


@pytest.mark.parametrize("name", overlays.SCENES)
def test_the_overlay_leaves_the_block_bright_and_dims_the_rest(name):
    """In the pixels that are written, not in the boxes: where it is kept the picture is as it was."""
    size, box = PLACES[0]
    drawn = overlays.SCENES[name](size, box)
    for number, part in enumerate(drawn.parts):
        image = drawn.pictures[number if len(drawn.pictures) > 1 else 0]
        shown = np.asarray(overlay(image, part.of(drawn.selections), part.geometry, caption="")).astype(int)
        plain = np.asarray(image.resize((shown.shape[1], shown.shape[0]))).astype(int)
        factor = shown.shape[0] / size[1]
        centre = [int((box[0] + box[2]) / 2 * factor), int((box[1] + box[3]) / 2 * factor)]
        middle = shown[centre[1] - 3 : centre[1] + 4, centre[0] - 3 : centre[0] + 4]
        lit = name != "video" or number == 1
        same = np.abs(shown - plain).sum(-1) < 12
        assert same.mean() < 0.35
        if lit and name != "internvl":
            assert (middle.mean() > 200) == bool(same[centre[1], centre[0]])
        if name == "video" and not lit:
            assert same.mean() < 0.02


def test_several_pictures_have_a_part_each():
    processor = CLIPImageProcessorPil(size={"height": 32, "width": 32}, do_center_crop=False)
    sizes, grids = [(64, 32), (32, 32), (96, 96)], [(2, 2), (1, 3), (3, 3)]
    parts = layout_of_images(processor, sizes, grids)
    assert [(part.name, part.rows, part.image) for part in parts] == [
        *(("picture 1", range(4), 0), ("picture 2", range(4, 7), 1), ("picture 3", range(7, 16), 2))
    ]
    assert [part.start for part in parts] == [0, 4, 7]
    assert [part.geometry.image_size for part in parts] == sizes
    assert parts[0].geometry.boxes[3] == (32, 16, 64, 32)
    masks = [TokenMask(torch.tensor(kept)) for kept in ([True] * 4, [False, True, False], [False] * 9)]
    assert parts[1].of(masks).mask().tolist() == [False, True, False]
    assert layout_of_images(processor, sizes[:1], grids[:1]) == layout(processor, sizes[0], grids[:1])
    with pytest.raises(GeometryError, match="3 images became 4 visual items"):
        layout_of_images(processor, sizes, [*grids, (1, 1)])


def test_every_token_is_in_one_part_and_tiles_cover_the_picture():
    for name in ("internvl", "idefics3"):
        drawn = overlays.SCENES[name](*PLACES[0])
        assert sum(len(part.geometry.boxes) for part in drawn.parts) == sum(s.n for s in drawn.selections)
        for part in drawn.parts:
            area = sum((right - left) * (bottom - top) for left, top, right, bottom in part.geometry.boxes)
            assert area == pytest.approx(640 * 360)


def test_layouts_that_are_not_known_are_refused():
    with pytest.raises(GeometryError, match=r"2 visual items with grids .* CLIPImageProcessorPil is not known to make"):
        layout(CLIPImageProcessorPil(), (64, 64), [(4, 4), (4, 4)])
    with pytest.raises(GeometryError, match="does not say how many patches make a token"):
        layout(CLIPImageProcessorPil(), (64, 64), [None], patches=(2, 4, 4))
    processor = overlays.GotOcr2ImageProcessorPil(crop_to_patches=True)
    with pytest.raises(GeometryError, match=r"makes \d x \d tiles of a 640 x 360 image.*but there are 6 visual items"):
        layout(processor, (640, 360), [(4, 4)] * 6)
    with pytest.raises(GeometryError, match="no plain raster"):
        layout(processor, (640, 360), [None])
