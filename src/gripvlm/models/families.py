"""What differs between model families, as data: one row each.

To add a family: write its row here, add a tiny random model to `tests/tiny_models.py`, and run
`pytest tests/test_seam.py`, which tries every row. Nothing else in gripvlm names a model.
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gripvlm.errors import UnsupportedModelError

__all__ = ["FAMILIES", "Family", "family_of"]

Grid = tuple[int, int] | None
GridRule = Callable[[Any, Mapping[str, Any], list[int]], list[Grid]]


def from_pixels(model: Any, inputs: Mapping[str, Any], sizes: list[int]) -> list[Grid]:
    """Grids of towers that see each image whole: h / w is the image's own height / width.

    Needs no patch size, so it serves any tower whose rows are one square patch each. None where n
    does not factor so (a CLS row kept in front, for instance).
    """
    pixels = inputs["pixel_values"]
    shapes = inputs.get("image_sizes")
    if shapes is None:
        shapes = [pixels.shape[-2:]] * len(sizes)
    return [_factor(n, int(shape[0]), int(shape[1])) for n, shape in zip(sizes, shapes, strict=True)]


def from_patches(model: Any, inputs: Mapping[str, Any], sizes: list[int]) -> list[Grid]:
    """Grids of towers that are told them, `image_grid_thw` in patches before merging."""
    merge = model.config.vision_config.spatial_merge_size
    grids = inputs["image_grid_thw"].tolist()
    return [(h // merge, w // merge) if t == 1 else None for t, h, w in grids]


def square(model: Any, inputs: Mapping[str, Any], sizes: list[int]) -> list[Grid]:
    """Grids of towers whose tiles are square: n = h * h."""
    return [_factor(n, 1, 1) for n in sizes]


def unknown(model: Any, inputs: Mapping[str, Any], sizes: list[int]) -> list[Grid]:
    """No grid: rows are no plain raster (tiles joined, newline rows in between)."""
    return [None] * len(sizes)


def _factor(n: int, height: int, width: int) -> Grid:
    """(h, w) with h * w == n and h / w within a tenth of height / width, or None."""
    h = max(1, round(math.sqrt(n * height / width)))
    w = n // h
    return (h, w) if h * w == n and abs(math.log(h * width / (w * height))) < 0.1 else None


@dataclass(frozen=True)
class Family:
    """How gripvlm handles one `config.model_type`.

    Attributes:
        model_type: as in the model's `config.json`.
        grid: the rule for (h, w) of each visual item.
        item: what one entry of the encoder's output is, for error messages and docs.
        modalities: what its encoders take; `config.<modality>_token_id` is the placeholder.
        note: what a user should know, one line.
    """

    model_type: str
    grid: GridRule
    item: str = "image"
    modalities: tuple[str, ...] = ("image",)
    note: str = ""


_ROWS = (
    Family("internvl", square, item="tile", note="a budget counts per tile, mostly of 256 tokens"),
    Family("llava", from_pixels, note="LLaVA-1.5, BakLLaVA, and gripvlm's own lab model"),
)
FAMILIES: dict[str, Family] = {row.model_type: row for row in _ROWS}


def family_of(model: Any) -> Family:
    """The row of this model.

    Raises:
        UnsupportedModelError: no row for its `config.model_type`, or a transformers too old to take
            visual features that are encoded beforehand.
    """
    config: Any = getattr(model, "config", None)
    if not callable(getattr(model, "generate", None)) or not hasattr(config, "model_type"):
        raise UnsupportedModelError(
            f"got a {type(model).__name__}: pass a transformers model that generates, as from "
            "AutoModelForImageTextToText.from_pretrained(...)"
        )
    name = config.model_type
    if name not in FAMILIES:
        near = difflib.get_close_matches(name, FAMILIES, n=2, cutoff=0.5)
        hint = f" (the nearest is {' or '.join(near)})" if near else ""
        kind = "" if hasattr(config, "vision_config") else ", which looks like a text-only model,"
        raise UnsupportedModelError(
            f"model type {name!r}{kind} is not supported: supported are "
            f"{', '.join(sorted(FAMILIES))}{hint}. "
            "Adding one is a row in gripvlm/models/families.py; its docstring says how"
        )
    if "mm_encoder_outputs" not in inspect.signature(model.forward).parameters:
        raise UnsupportedModelError(
            f"this {type(model).__name__} takes no mm_encoder_outputs: gripvlm needs "
            "transformers>=5.19 (pip install -U transformers)"
        )
    return FAMILIES[name]
