"""Which patches of a family's vision tower become which row: one rule each.

A rule takes maps, one value a patch in each of c channels (heads, key dimensions or hidden dimensions), and gives maps
with one value a row; a row of several patches gets their mean. So one rule serves attention, keys and hidden states.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from gripvlm.errors import InputError
from gripvlm.models.compat import takes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from gripvlm.models.grids import GridRule


class TowerItems(NamedTuple):
    """The items of one modality in a batch, as input of a vision rule; counts: the rows of each item."""

    model: PreTrainedModel
    inputs: Mapping[str, Any]
    modality: str
    counts: list[int]


class VisionRule:
    """How a tower lays out the patches of its items."""

    def rows(self, items: TowerItems, maps: list[Tensor]) -> list[Tensor]:
        """Maps [c, n] of each item from the maps [b, c, L] of each call of a block."""
        raise NotImplementedError

    def has_cls(self, items: TowerItems, length: int) -> bool:
        """Whether the tower's sequence of `length` begins with a CLS token."""
        return False

    def places(self, items: TowerItems, length: int) -> list[Tensor]:
        """[n, m] for each item, on the host: where in its sequence of `length` the m patches of each row are.

        Only of rules whose families may drop patches inside the tower.
        """
        raise NotImplementedError

    def rescale(self, received: list[Tensor], counts: list[int]) -> list[Tensor]:
        """Received attention as the mean over the queries of one item."""
        return received


class _ByTile(VisionRule):
    """Towers that see each item, an image or a tile, by itself: [items, c, (CLS +) patches].

    Rows are the patches themselves or square blocks of a square raster (pixel shuffle, average pooling).
    """

    def rows(self, items: TowerItems, maps: list[Tensor]) -> list[Tensor]:
        tiles = _single_call(maps)
        if tiles.shape[0] != len(items.counts):
            raise InputError(
                f"the vision tower saw {tiles.shape[0]} {items.modality}s or tiles, but {len(items.counts)} came out "
                "of it: make the inputs with the model's own processor"
            )
        if self.has_cls(items, tiles.shape[-1]):
            tiles = tiles[..., 1:]  # the CLS token has no row
        return [_square_blocks(tile, n) for tile, n in zip(tiles, items.counts, strict=True)]

    def has_cls(self, items: TowerItems, length: int) -> bool:
        # Without one, a row is made of a square block of patches.
        return not any(length == items.counts[0] * step * step for step in range(1, length + 1))

    def places(self, items: TowerItems, length: int) -> list[Tensor]:
        n, first = items.counts[0], int(self.has_cls(items, length))
        height, side = math.isqrt(n), math.isqrt(length - first)
        patches = torch.arange(first, length)
        if length - first == n:
            rows = patches[:, None]
        else:
            rows = patches.view(height, side // height, height, -1).transpose(1, 2).reshape(n, -1)
        return [rows] * len(items.counts)


class _ByGrid(VisionRule):
    """Towers that get `<modality>_grid_thw`, attend by image, frame or window, and merge square blocks."""

    def rows(self, items: TowerItems, maps: list[Tensor]) -> list[Tensor]:
        return merged_rows(items.model.get_encoder("image"), maps, items.inputs[f"{items.modality}_grid_thw"])

    def places(self, items: TowerItems, length: int) -> list[Tensor]:
        tower, grids = items.model.get_encoder("image"), items.inputs[f"{items.modality}_grid_thw"]
        block = tower.spatial_merge_size**2
        rows = torch.arange(sum(items.counts))
        if hasattr(tower, "window_size"):
            rows = torch.argsort(_window_order(tower, grids).cpu())
        return list((block * rows[:, None] + torch.arange(block)).split(items.counts))


class _ByRaster(VisionRule):
    """Towers that see each item by itself, in raster order, and merge square blocks between or behind their blocks.

    A video's rows are the mean over its frames.
    Where `marked`, each line of rows ends with a newline row, and one row stands before and one behind the item. These
    have no patch behind them and get zeros.
    """

    def __init__(self, grid: GridRule, marked: bool = False) -> None:
        self.grid, self.marked = grid, marked

    def rows(self, items: TowerItems, maps: list[Tensor]) -> list[Tensor]:
        patches = torch.cat([call[0] for call in maps], dim=-1)  # [c, patches of all items]
        grids = [grid for grid in self.grid(items.model, items.inputs, items.modality, items.counts) if grid]
        thw = items.inputs.get(f"{items.modality}_grid_thw")
        frames = [1] * len(grids) if thw is None else [int(t) for t in thw[:, 0]]
        # A map is from before a merger or from behind it: the edge of the block that is a row's.
        rows = sum(t * h * w for t, (h, w) in zip(frames, grids, strict=False))
        side = math.isqrt(patches.shape[-1] // max(1, rows))
        if len(grids) != len(items.counts) or patches.shape[-1] != side * side * rows:
            raise InputError(
                f"{patches.shape[-1]} patches were captured, which do not make the {rows} rows of the items' grids in "
                "square blocks: make the inputs with the model's own processor"
            )
        images = patches.split([side * side * t * h * w for t, (h, w) in zip(frames, grids, strict=True)], dim=-1)
        rasters = [
            nn.functional.avg_pool2d(image.unflatten(-1, (t, h * side, w * side)).mean(1), side)
            for image, t, (h, w) in zip(images, frames, grids, strict=True)
        ]
        if not self.marked:
            return [raster.flatten(1) for raster in rasters]
        return [nn.functional.pad(nn.functional.pad(raster, (0, 1)).flatten(1), (1, 1)) for raster in rasters]


class _InOneRow(VisionRule):
    """Towers that put the patches of all images behind one another, and merge square blocks of each image."""

    def rows(self, items: TowerItems, maps: list[Tensor]) -> list[Tensor]:
        config = items.model.config
        patch, pool = config.vision_config.patch_size, nn.functional.avg_pool2d
        shapes = [(int(h) // patch, int(w) // patch) for h, w in items.inputs["image_sizes"]]
        images = _single_call(maps)[0].split([h * w for h, w in shapes], dim=-1)
        return [
            pool(image.unflatten(-1, shape), config.spatial_merge_size).flatten(1)
            for image, shape in zip(images, shapes, strict=True)
        ]

    def rescale(self, received: list[Tensor], counts: list[int]) -> list[Tensor]:
        # The mean was over the queries of all images, which do not see each other.
        return [image * (sum(counts) / n) for image, n in zip(received, counts, strict=True)]


class _Packed(VisionRule):
    """Towers whose tiles the model packs, unpads and breaks into lines: the same method of the model packs the maps.

    Newline rows, which have no patch behind them, get zeros.
    """

    def rows(self, items: TowerItems, maps: list[Tensor]) -> list[Tensor]:
        tiles, vision = _single_call(maps), items.model.config.vision_config
        counts = self.tiles_of_images(items)
        if sum(counts) != tiles.shape[0]:
            raise InputError(
                f"the vision tower saw {tiles.shape[0]} tiles, but the image sizes make {sum(counts)}: make the inputs "
                "with the model's own processor"
            )
        # From the end: a CLS token, where there is one, is in front.
        patches = (vision.image_size // vision.patch_size) ** 2
        features = list(tiles[..., -patches:].transpose(1, 2).split(counts))  # [tiles, patches, c] of each image
        return [image.T for image in self.pack(items, features)]

    def pack(self, items: TowerItems, features: list[Tensor]) -> list[Tensor]:
        """[n, c] rows of each image from its tiles [tiles, patches, c], with zeros at newline rows."""
        base, config = items.model.base_model, items.model.config
        # Zeros in place of the learnt newline row, which belongs to no patch.
        options: dict[str, Any] = {"image_newline": features[0].new_zeros(features[0].shape[-1])}
        taken = takes(base.pack_image_features)
        # LLaVA-NeXT's method needs the strategy to count patches, LLaVA-OneVision's does not take it.
        if "vision_feature_select_strategy" in taken:
            options["vision_feature_select_strategy"] = "default"
        # LLaVA-OneVision's shrinks the rows of many tiles, to a number that this says.
        if "vision_aspect_ratio" in taken:
            options["vision_aspect_ratio"] = config.vision_aspect_ratio
        rows, _ = base.pack_image_features(features, items.inputs["image_sizes"], **options)
        return list(rows)

    def has_cls(self, items: TowerItems, length: int) -> bool:
        vision = items.model.config.vision_config
        return length == (vision.image_size // vision.patch_size) ** 2 + 1

    def tiles_of_images(self, items: TowerItems) -> list[int]:
        """How many tiles each image is cut into, its whole view among them."""
        config = items.model.config
        # The function is private to each model's module, under the same name in all of them.
        count = sys.modules[type(items.model.base_model).__module__].image_size_to_num_patches
        sizes = [[int(edge) for edge in size] for size in items.inputs["image_sizes"]]
        pinpoints, side = config.image_grid_pinpoints, config.vision_config.image_size
        counts = [int(count(image_size=size, grid_pinpoints=pinpoints, patch_size=side)) for size in sizes]
        images = items.inputs.get("batch_num_images")
        if images is None:
            return counts
        # LLaVA-OneVision does not cut the images of a prompt that has several.
        alone = [int(n) == 1 for n in images for _ in range(int(n))]
        return [n if cut else 1 for n, cut in zip(counts, alone, strict=True)]


class _Pooled(VisionRule):
    """Towers that see crops by themselves, where `<modality>_token_pooling` has the patches of each row, or -1."""

    def rows(self, items: TowerItems, maps: list[Tensor]) -> list[Tensor]:
        patches = _single_call(maps).transpose(0, 1).flatten(1)  # [c, crops x patches]
        places = items.inputs[f"{items.modality}_token_pooling"].to(patches.device)
        real = (places >= 0).any(-1)
        weight = (places >= 0)[real].to(patches.dtype)
        pooled = (patches[:, places[real].clamp(min=0)] * weight).sum(-1) / weight.sum(-1)
        return list(pooled.split(items.counts, dim=-1))


by_tile, by_grid, in_one_row, packed, pooled = _ByTile(), _ByGrid(), _InOneRow(), _Packed(), _Pooled()
by_raster = _ByRaster


def merged_rows(tower: PreTrainedModel, calls: Sequence[Tensor], grids: Tensor) -> list[Tensor]:
    """Maps of a tower with `<modality>_grid_thw`, for each row of each of its items.

    Args:
        tower: the vision tower, which merges square blocks of patches and may attend by window, in an order of its
            own.
        calls: maps [1, c, patches of one window or image] of each attention call of a block.
        grids: [items, 3] (t, h, w) in patches.

    Returns:
        A list (items) of [c, n]: the mean over a row's patches, in the order of the item's rows. Attention received
        in one call (a window, an image) sums to 1 over its patches before that mean.
    """
    block = tower.spatial_merge_size**2
    patches = torch.cat([call[0] for call in calls], dim=-1)  # [c, patches]
    counts = grids.prod(-1)
    if patches.shape[-1] != (expected := int(counts.sum())):
        raise InputError(f"{patches.shape[-1]} patches were captured, but grids have {expected}: one run each")
    # Processors put the patches of one block side by side, so a row's patches follow one another.
    rows = patches.unflatten(-1, (-1, block)).mean(-1)
    if hasattr(tower, "window_size"):
        # The tower sorts rows by window before its first block; features are put back, maps are not yet.
        rows = rows[:, torch.argsort(_window_order(tower, grids).to(rows.device))]
    return list(rows.split((counts // block).tolist(), dim=-1))


def _window_order(tower: PreTrainedModel, grids: Tensor) -> Tensor:
    """[rows] the row at each place of the tower's order; in older transformers this is a method."""
    if hasattr(tower, "get_window_index"):
        return torch.as_tensor(tower.get_window_index(grids)[0])
    from transformers.vision_utils import get_vision_window_index

    return get_vision_window_index(grids, tower.spatial_merge_size, tower.window_size, tower.patch_size)[0]


def _single_call(maps: list[Tensor]) -> Tensor:
    if len(maps) != 1:
        raise InputError(f"attention ran {len(maps)} times in one block of the vision tower, expected 1: one run each")
    return maps[0]


def _square_blocks(tile: Tensor, n: int) -> Tensor:
    """[c, n] means over square blocks of a square raster; the map itself where n is its length."""
    length = tile.shape[-1]
    if length == n:
        return tile
    side, rows = math.isqrt(length), math.isqrt(n)
    if side * side != length or rows * rows != n or side % rows:
        raise InputError(f"{length} patches do not make {n} rows in square blocks: use a pruner of features only")
    return nn.functional.avg_pool2d(tile.unflatten(-1, (side, side)), side // rows).flatten(1)
