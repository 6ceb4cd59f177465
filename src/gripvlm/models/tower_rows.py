"""What the vision tower says about each visual row: attention, keys and hidden states, patch by patch or merged.

A rule says which patches of a family's tower become which row. All of them take maps, one value a patch
in each of c channels (heads, key dimensions, hidden dimensions), and give maps with one value a row; a
row of several patches gets their mean. So one rule serves attention, keys and hidden states alike.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor, nn

from gripvlm.errors import InputError
from gripvlm.models.hooks.attention import blocks_of, merged_rows, watch_attention
from gripvlm.models.hooks.calls import hooked
from gripvlm.types import VisionRows

__all__ = [
    "NOTHING",
    "Asked",
    "Merging",
    "VisionRule",
    "by_grid",
    "by_tile",
    "in_one_row",
    "packed",
    "share_out",
    "watch_tower",
]

VisionRule: TypeAlias = Callable[[Any, Mapping[str, Any], str, list[int], list[Tensor]], list[Tensor]]
"""(model, inputs, modality, rows of each item, maps [b, c, L] of each call) -> maps [c, n] of each item."""


class Merging(NamedTuple):
    """How tokens are to be merged between the blocks of the tower (see `models/hooks/tower_merge.py`).

    Attributes:
        count: rows there are -> rows to leave.
        plan: (tokens, tokens to leave, blocks, special tokens ahead) -> how many each block merges away.
        match: (keys [b, t, d_h], merges, special tokens ahead) -> (source, destination), both [b, merges].
        proportional: whether merged tokens are attended to by their size.
    """

    count: Callable[[int], int]
    plan: Callable[[int, int, int, int], list[int]]
    match: Callable[[Tensor, int, int], tuple[Tensor, Tensor]]
    proportional: bool


class Asked(NamedTuple):
    """What is wanted of the tower: attention and keys in these blocks (negative ones from the last), patch states.

    And, with `given`, what patches give to one another; with `merging`, that it merges tokens; with `keys`, a
    number from the pixels of each image.
    """

    layers: tuple[int, ...] = ()
    patches: bool = False
    given: bool = False
    merging: Merging | None = None
    keys: bool = False


NOTHING = Asked()


class _Notes(NamedTuple):
    """What was seen: block -> maps [b, c, L] of each call, by kind; the blocks there are."""

    received: dict[int, list[Tensor]]
    cls: dict[int, list[Tensor]]
    keys: dict[int, list[Tensor]]
    states: list[Tensor]
    blocks: int
    given: dict[int, list[Tensor]]


# --- rules: patches of a tower -> rows of items -----------------------------------------------------


def by_tile(model: Any, inputs: Mapping[str, Any], modality: str, sizes: list[int], maps: list[Tensor]) -> list[Tensor]:
    """Towers that see each item, an image or a tile, by itself: [items, c, (CLS +) patches].

    Rows are the patches themselves or square blocks of a square raster (pixel shuffle, average pooling).
    """
    (one,) = _expected(maps, 1)
    if one.shape[0] != len(sizes):
        raise InputError(f"the vision tower saw {one.shape[0]} {modality}s or tiles, but {len(sizes)} came out of it")
    return [_blocks(_patches(item, n), n) for item, n in zip(one, sizes, strict=True)]


def by_grid(model: Any, inputs: Mapping[str, Any], modality: str, sizes: list[int], maps: list[Tensor]) -> list[Tensor]:
    """Towers that are told `<modality>_grid_thw`, attend by image, frame or window, and merge square blocks."""
    grids = inputs[f"{modality}_grid_thw"]
    return merged_rows(model.get_encoder("image"), maps, grids)


def in_one_row(
    model: Any, inputs: Mapping[str, Any], modality: str, sizes: list[int], maps: list[Tensor]
) -> list[Tensor]:
    """Towers that put the patches of all images behind one another, and merge square blocks of each image."""
    (one,) = _expected(maps, 1)
    patch, block = model.config.vision_config.patch_size, model.config.spatial_merge_size
    shapes = [(int(h) // patch, int(w) // patch) for h, w in inputs["image_sizes"]]
    items = one[0].split([h * w for h, w in shapes], dim=-1)
    pool = nn.functional.avg_pool2d
    return [pool(item.unflatten(-1, shape), block).flatten(1) for item, shape in zip(items, shapes, strict=True)]


def packed(model: Any, inputs: Mapping[str, Any], modality: str, sizes: list[int], maps: list[Tensor]) -> list[Tensor]:
    """Towers whose tiles the model itself packs, unpads and breaks into lines: it packs the maps too.

    Newline rows, which have no patch behind them, get zeros.
    """
    (one,) = _expected(maps, 1)
    base = model.base_model
    tiles = one.shape[0]
    count = sys.modules[type(base).__module__].image_size_to_num_patches
    side = model.config.vision_config.image_size
    whole = [
        int(count(image_size=s, grid_pinpoints=model.config.image_grid_pinpoints, patch_size=side))
        for s in _sizes(inputs)
    ]
    if (together := inputs.get("batch_num_images")) is not None:  # several images a prompt are not cut
        cut = [int(n) == 1 for n in together for _ in range(int(n))]
        whole = [n if c else 1 for n, c in zip(whole, cut, strict=True)]
    if sum(whole) != tiles:
        raise InputError(f"the vision tower saw {tiles} tiles, but the image sizes make {sum(whole)}")
    patches = (side // model.config.vision_config.patch_size) ** 2
    features = one[..., -patches:].transpose(1, 2).split(whole)  # [tiles, patches, c] each
    told = {"vision_feature_select_strategy": "default"}
    known = inspect.signature(base.pack_image_features).parameters
    rows, _ = base.pack_image_features(
        list(features),
        inputs["image_sizes"],
        image_newline=one.new_zeros(one.shape[1]),
        **{name: value for name, value in told.items() if name in known},
    )
    return [item.T for item in rows]


def _sizes(inputs: Mapping[str, Any]) -> list[list[int]]:
    return [[int(edge) for edge in size] for size in inputs["image_sizes"]]


def _expected(maps: list[Tensor], calls: int) -> list[Tensor]:
    if len(maps) != calls:
        raise InputError(f"attention ran {len(maps)} times in one block of the vision tower, expected {calls}")
    return maps


def _patches(one: Tensor, n: int) -> Tensor:
    """[c, patches] of [c, (CLS +) patches], where n rows are made of them."""
    length = one.shape[-1]
    return one if _fits(length, n) else one[:, 1:]


def _blocks(one: Tensor, n: int) -> Tensor:
    """[c, n] means over square blocks of a square raster; the map itself where n is its length."""
    length = one.shape[-1]
    if length == n:
        return one
    side, rows = math.isqrt(length), math.isqrt(n)
    if side * side != length or rows * rows != n or side % rows:
        raise InputError(f"{length} patches do not make {n} rows in square blocks")
    return nn.functional.avg_pool2d(one.unflatten(-1, (side, side)), side // rows).flatten(1)


# --- watching ---------------------------------------------------------------------------------------


@contextmanager
def watch_tower(model: Any, asked: Asked) -> Iterator[_Notes]:
    """Inside the block, the vision tower's attention, keys and states are noted as maps [b, c, L].

    Args:
        model: a supported model.
        asked: which blocks, and whether patch states: the output of the block that features are made from.
    """
    tower = model.get_encoder("image")
    notes = _Notes({}, {}, {}, [], len(blocks_of(tower)), {})
    with ExitStack() as stack:
        seen: dict[str, dict[int, list[Tensor]]] = {}
        if asked.layers:
            kinds: dict[str, Any] = {"received": "received", "cls": [0], "keys": "keys"}
            for kind, queries in (kinds | ({"to_first": "to_first"} if asked.given else {})).items():
                seen[kind] = stack.enter_context(watch_attention(tower, asked.layers, queries))
        if asked.patches:
            number = getattr(model.config, "vision_feature_layer", None)
            number = number if isinstance(number, int) else -1
            block = blocks_of(tower)[number if number < 0 else number - 1]  # states count the embeddings as 0

            def note(block: Any, args: Any, kwargs: Any, output: Any) -> None:
                notes.states.append(_state(output))

            stack.enter_context(hooked(after={block: note}))
        yield notes
    for layer, pieces in seen.get("received", {}).items():
        notes.received[layer] = pieces
        notes.cls[layer] = [piece[:, :, 0] for piece in seen["cls"][layer]]
        notes.keys[layer] = [piece.transpose(1, 2) for piece in seen["keys"][layer]]
        if asked.given:
            notes.given[layer] = [(1 - piece) / (piece.shape[-1] - 1) for piece in seen["to_first"][layer]]


def _state(output: Any) -> Tensor:
    hidden = output[0] if isinstance(output, tuple) else output
    hidden = hidden.detach()
    return (hidden if hidden.ndim == 3 else hidden[None]).transpose(1, 2)  # [b, d, L]


def share_out(
    model: Any,
    rule: VisionRule | None,
    inputs: Mapping[str, Any],
    sizes: Mapping[str, list[int]],
    asked: Asked,
    notes: _Notes,
) -> dict[str, list[tuple[dict[int, VisionRows], Tensor | None]]]:
    """modality -> for each item its {layer as asked: `VisionRows`} and its patch states [n, d_v] or None."""
    assert rule is not None  # `checked_needs` has seen to it
    taken: dict[int, int] = {}

    def maps(pieces: list[Tensor], modality: str) -> list[Tensor]:
        start = taken.get(id(pieces), 0)
        mine = _own(pieces[start:], inputs.get(f"{modality}_grid_thw"))
        taken[id(pieces)] = start + len(mine)
        return rule(model, inputs, modality, sizes[modality], mine)

    found: dict[str, list[tuple[dict[int, VisionRows], Tensor | None]]] = {}
    for modality, counts in sizes.items():
        layers: list[dict[int, VisionRows]] = [{} for _ in counts]
        blocks: dict[int, list[VisionRows]] = {}
        for layer in asked.layers:
            at = layer % notes.blocks
            if at not in notes.received:
                tower = type(model.get_encoder("image")).__name__
                raise InputError(
                    f"the attention of block {layer} of the vision tower, a {tower}, cannot be read: it does "
                    "not go through transformers' attention functions"
                )
            if at not in blocks:
                received, keys = maps(notes.received[at], modality), maps(notes.keys[at], modality)
                if rule is in_one_row:  # the mean was over the queries of all items, which do not see each other
                    received = [one * (sum(counts) / n) for one, n in zip(received, counts, strict=True)]
                cls: Sequence[Tensor | None] = [None] * len(counts)
                if _starts_with_cls(model, rule, notes.received[at][0].shape[-1], counts):
                    cls = maps(notes.cls[at], modality)
                blocks[at] = [VisionRows(*rows) for rows in zip(received, cls, (one.T for one in keys), strict=True)]
                if asked.given and cls[0] is not None:
                    given, length = maps(notes.given[at], modality), notes.received[at][0].shape[-1]
                    blocks[at] = [_among(*pair, length) for pair in zip(blocks[at], given, strict=True)]
            for mine, rows in zip(layers, blocks[at], strict=True):
                mine[layer] = rows
        states: Sequence[Tensor | None] = [None] * len(counts)
        if asked.patches:
            states = [one.T for one in maps(notes.states, modality)]
        found[modality] = list(zip(layers, states, strict=True))
    return found


def _among(rows: VisionRows, given: Tensor, length: int) -> VisionRows:
    """With attention among the length - 1 patches alone: received is the mean over all queries less the CLS token's."""
    assert rows.cls is not None
    return replace(rows, patch_received=(length * rows.received - rows.cls) / (length - 1), given=given)


def _own(pieces: list[Tensor], grids: Tensor | None) -> list[Tensor]:
    """The calls for the items of one modality: all, or as many as their patches fill (images run before videos)."""
    if grids is None:
        return pieces
    left, mine = int(grids.prod(-1).sum()), []
    for piece in pieces:
        if left <= 0:
            break
        mine.append(piece)
        left -= piece.shape[-1]
    return mine


def _starts_with_cls(model: Any, rule: VisionRule, length: int, sizes: list[int]) -> bool:
    """Whether a tower's sequence of `length` begins with a CLS token."""
    if rule is packed:
        vision = model.config.vision_config
        return length == (vision.image_size // vision.patch_size) ** 2 + 1
    return rule is by_tile and not _fits(length, sizes[0])


def _fits(length: int, n: int) -> bool:
    """Whether n rows are made of so many patches, in square blocks."""
    return any(length == n * step * step for step in range(1, length + 1))
