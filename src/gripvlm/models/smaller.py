"""Smaller pictures: fewer visual tokens because the vision encoder sees fewer pixels."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from PIL import Image

from gripvlm.errors import BudgetError
from gripvlm.models.compat import takes
from gripvlm.models.families import Family, family_of
from gripvlm.models.grids import from_patches, from_pixels, merged_edge

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "AS_IT_IS",
    "interpolated_positions",
    "raster_within",
    "row_pixels",
    "sets_tokens",
    "smaller_picture",
]

AS_IT_IS = {"do_resize": False, "do_center_crop": False}
"""What an image processor is told of a picture that has its final size; those that know no crop take the first only."""


def raster_within(grid: tuple[int, int], k: int) -> tuple[int, int]:
    """Height and width in tokens of the smaller picture: at most k tokens, and no side longer than before.

    The side that shrinks more is kept as long as possible, then the other. So as many of the k tokens are used as a
    raster can use: 16 x 16 becomes 5 x 6 for k = 32, 3 x 5 for k = 15; the picture is stretched that much.
    """
    h, w = grid
    fitting = [(rows, min(w, k // rows)) for rows in range(1, min(h, k) + 1)]
    fitting += [(min(h, k // columns), columns) for columns in range(1, min(w, k) + 1)]
    # Of two that are equal so far, the wider one.
    return max(fitting, key=lambda raster: (min(raster[0] / h, raster[1] / w), raster[0] * raster[1], raster[1]))


def sets_tokens(family: Family) -> bool:
    """Whether a picture's size sets how many tokens a family makes of it."""
    return family.grid in (from_pixels, from_patches)


def row_pixels(model: PreTrainedModel) -> int | None:
    """The side in pixels of the square of a picture that becomes one row; None where `sets_tokens` says no."""
    if not sets_tokens(family_of(model)):
        return None
    return int(model.config.vision_config.patch_size) * merged_edge(model)


def smaller_picture(
    model: PreTrainedModel, image_processor: Any, picture: Image.Image, raster: tuple[int, int]
) -> Image.Image:
    """The picture (what the processor would crop of it), resized so that the encoder makes a raster of tokens of it.

    Bicubic with PIL's low-pass filter, as most families' processors resize. The processor must leave it `AS_IT_IS`.

    Raises:
        BudgetError: a family whose pictures have as many tokens whatever their size.
    """
    side = row_pixels(model)
    if side is None:
        raise BudgetError(
            f"a smaller picture does not give {model.config.model_type} fewer tokens: its processor makes tiles, or as "
            "many tokens of every picture; leave downsample out"
        )
    whole = _cropped(image_processor, picture.convert("RGB"))
    return whole.resize((raster[1] * side, raster[0] * side), Image.Resampling.BICUBIC)


def _cropped(image_processor: Any, picture: Image.Image) -> Image.Image:
    """What is left of a picture whose shortest edge is resized to a length and whose centre is then cut out."""
    if not getattr(image_processor, "do_center_crop", False):
        return picture
    crop, size = image_processor.crop_size, image_processor.size
    wide, high = picture.size
    if size.get("shortest_edge"):
        across = down = min(wide, high) / size["shortest_edge"]
    else:
        across, down = wide / size["width"], high / size["height"]
    width, height = crop["width"] * across, crop["height"] * down
    left, top = (wide - width) / 2, (high - height) / 2
    return picture.crop((math.floor(left), math.floor(top), math.ceil(left + width), math.ceil(top + height)))


@contextmanager
def interpolated_positions(model: PreTrainedModel) -> Iterator[None]:
    """Inside, a tower with learnt positions interpolates them to the raster of the pixels that it gets.

    Towers that take no `interpolate_pos_encoding` have positions for every size, or fail with an error of their own.
    """
    tower = model.get_encoder("image")
    if "interpolate_pos_encoding" not in takes(tower.forward):
        yield
        return
    wanted = {"interpolate_pos_encoding": True}
    hook = tower.register_forward_pre_hook(lambda _, given, named: (given, named | wanted), with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
