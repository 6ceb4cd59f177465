"""Dropping rows between the blocks of a vision tower: each block from then on sees fewer patches.

Before the chosen block, hidden states become those of the rows that are kept, each with all of its patches; positions
that the tower adds in every block, and the bounds of windows and images, follow them. What comes out is filled up with
zeros to as many rows as before, so that all that follows finds what it expects: behind the projector where that works
row by row, else behind the last block.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gripvlm.errors import InputError, UnsupportedModelError
from gripvlm.models.content_keys import content_keys
from gripvlm.models.families import FAMILIES, Family
from gripvlm.models.hooks.attention import blocks_of, feature_block
from gripvlm.models.hooks.calls import After, Before, call_hooks
from gripvlm.models.hooks.tower_merge import refuse_checkpointing
from gripvlm.models.prompts import Prompts
from gripvlm.models.tower_rows import (
    DroppedRows,
    TowerCapture,
    TowerDropping,
    TowerItems,
    TowerRequest,
    capture_tower,
    rows_in_block,
)
from gripvlm.types import VisionRows, VisualTokens
from gripvlm.utils.batching import onto

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def checked_tower_drop(model: PreTrainedModel, family: Family, block: int) -> None:
    """Raises where rows cannot be dropped before this block of the model's vision tower."""
    if isinstance(family.drops, str):
        having = ", ".join(name for name, row in FAMILIES.items() if not isinstance(row.drops, str))
        raise UnsupportedModelError(
            f"dropping inside {family.model_type}'s vision tower is not supported, as {family.drops}; it is for "
            f"{having}: use a pruner that drops at the input"
        )
    layer = getattr(model.config, "vision_feature_layer", -1)
    if not isinstance(layer, int):
        raise UnsupportedModelError(
            f"dropping inside the vision tower needs features of one layer, but vision_feature_layer={layer} reads "
            "several, which would differ in length: use a pruner that drops at the input"
        )
    tower = model.get_encoder("image")
    count = _blocks_that_count(model)
    if block >= count:
        raise InputError(
            f"pruner 'tower' drops before block {block}, but the features of this {type(tower).__name__} come from its "
            f"blocks 0 to {count - 1}: pass block={count - 1} or less, as in tower(norm):block={count // 4}"
        )


def _blocks_that_count(model: PreTrainedModel) -> int:
    """How many of the tower's blocks the features have gone through."""
    return list(blocks_of(model.get_encoder("image"))).index(feature_block(model)) + 1


@contextmanager
def drop_in_tower(prompts: Prompts, family: Family, dropping: TowerDropping) -> Iterator[dict[str, DroppedRows]]:
    """Inside the block, the vision tower drops rows; `checked_tower_drop` checks for which models.

    Yields:
        modality -> what was dropped, filled while the tower runs.
    """
    run = _TowerRun(prompts, family, dropping)
    blocks = list(blocks_of(prompts.model.get_encoder("image")))
    first, rest = blocks[dropping.block], blocks[dropping.block + 1 :]
    before: dict[nn.Module, Before] = {blocks[0]: run.begin, **dict.fromkeys(rest, run.shorten)}
    # The first block may be the one before which rows are dropped.
    before[first] = functools.partial(run.drop, begins=first is blocks[0])
    assert not isinstance(family.drops, str)  # `checked_tower_drop`
    after: dict[nn.Module, After] = dict.fromkeys(family.drops(prompts.model), run.fill_up)
    with ExitStack() as stack:
        if "vision_attention" in dropping.needs:
            request = TowerRequest(layers=(dropping.block - 1,), given="vision_given" in dropping.needs)
            run.capture = stack.enter_context(capture_tower(prompts.model, request))
        # first: hooks that capture hidden states then see them short
        stack.enter_context(call_hooks(before, after, first=True))
        yield run.dropped


class _TowerRun:
    """The tower's runs over one batch: over its images, then over its videos."""

    def __init__(self, prompts: Prompts, family: Family, dropping: TowerDropping) -> None:
        self.prompts, self.family, self.dropping = prompts, family, dropping
        host = prompts.host
        self.waiting = [m for m, name in (("image", "pixel_values"), ("video", "pixel_values_videos")) if name in host]
        self.dropped: dict[str, DroppedRows] = {}
        self.now: DroppedRows | None = None  # of the present run, once it has dropped
        self.rows = torch.empty(0)  # [b, k'] rows that are left, numbered as the tower has them
        self.total = 0  # rows of a sequence before
        self.shorter: dict[int, tuple[Any, Any]] = {}  # id of an argument -> it, and what it is now
        self.capture: TowerCapture | None = None
        # Read before the tower starts: later it would wait for the device.
        self.keys = {m: content_keys(host, m, _count(host, m)) for m in self.waiting if "key" in dropping.needs}

    def begin(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the first block."""
        refuse_checkpointing(block, "drops")
        self.now = None

    def drop(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, begins: bool) -> Any:
        """Before the block that sees fewer."""
        if begins:
            self.begin(block, args, kwargs)
        hidden = args[0] if args else kwargs["hidden_states"]
        states = hidden if hidden.ndim == 3 else hidden[None]
        modality = self.waiting.pop(0)
        items = self._items(modality, states.shape[0])
        length = states.shape[1]
        assert self.family.vision is not None
        places = [onto(table, hidden.device) for table in self.family.vision.places(items, length)]
        kept = self.dropping.select(self._tokens(items, states, places))
        where = [table[rows].flatten() for table, rows in zip(places, kept, strict=True)]
        self.total, patches = places[0].shape[0] if hidden.ndim == 3 else sum(items.counts), places[0].shape[1]
        # Ascending, so that windows and images stay in one piece.
        left = (torch.stack(where) if hidden.ndim == 3 else torch.cat(where)[None]).sort(-1).values
        special = int(self.family.vision.has_cls(items, length)) if hidden.ndim == 3 else 0
        self.rows = (left[:, ::patches] - special) // patches
        if special:
            left = torch.cat((torch.zeros_like(left[:, :1]), left), 1)
        self.now = self.dropped[modality] = DroppedRows(self.dropping.block, length, left, kept)
        self.shorter = {}
        if left.shape[1] == length:  # nothing was dropped: the tower stays its own, bit for bit
            self.now = None
            return None
        short = states.gather(1, left[..., None].expand(-1, -1, states.shape[2]))
        short = short if hidden.ndim == 3 else short[0]
        args, kwargs = self.shorten(block, args, kwargs)
        return ((short, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": short})

    def _items(self, modality: str, sequences: int) -> TowerItems:
        """The items of a run, their sizes known from the prompts."""
        host, model = self.prompts.host, self.prompts.model
        grids = host.get(f"{modality}_grid_thw")
        if grids is not None:
            merged = model.get_encoder("image").spatial_merge_size ** 2
            return TowerItems(model, host, modality, (grids.prod(-1) // merged).tolist())
        total = sum(len(columns) for columns in self.prompts.placeholders[modality])
        if total % sequences or not total:
            raise InputError(
                f"the prompts have {total} {modality} placeholder tokens for {sequences} {modality}s: make the inputs "
                "with the model's own processor"
            )
        return TowerItems(model, host, modality, [total // sequences] * sequences)

    def _tokens(self, items: TowerItems, states: Tensor, places: list[Tensor]) -> list[VisualTokens]:
        """What the pruner inside the tower gets, an image each; places: [n, m] of each."""
        counts = items.counts
        vision: list[Mapping[int, VisionRows]] = [{} for _ in counts]
        if self.capture is not None:
            self.capture.convert()
            assert self.family.vision is not None
            seen = rows_in_block(self.family.vision, self.capture, items, self.dropping.block - 1)
            vision = [_AnyLayer(rows) for rows in seen]
        grids = self.family.grid(items.model, self.prompts.host, items.modality, counts)
        keys = self.keys.get(items.modality, [0] * len(counts))
        return [
            VisualTokens(
                features=states[i % len(states)].detach()[places[i]].mean(1),
                keep=self.dropping.count(n),
                grid=grids[i],
                sample=sample,
                image=image,
                key=keys[i],
                vision=vision[i],
            )
            for i, (n, (sample, image)) in enumerate(zip(counts, self._owners(items), strict=True))
        ]

    def _owners(self, items: TowerItems) -> list[tuple[int, int]]:
        """(prompt, which of its images or videos) of each item."""
        owners: list[tuple[int, int]] = []
        for sample, columns in enumerate(self.prompts.placeholders[items.modality]):
            rows = image = 0
            while rows < len(columns) and len(owners) < len(items.counts):
                rows += items.counts[len(owners)]
                owners.append((sample, image))
                image += 1
        # Placeholders that do not fit are refused where prompts and items meet.
        return owners + [(0, 0)] * (len(items.counts) - len(owners))

    def shorten(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before every later block: what comes with the hidden states."""
        if self.now is None:
            return None
        if any(value is not None for value in (*args[1:], kwargs.get("attention_mask"))):
            raise InputError(
                f"a {type(block).__name__} got more than hidden states that gripvlm does not know how to shorten: use "
                "a pruner that drops at the input"
            )
        changed = {n: self._short(n, kwargs[n]) for n in ("position_embeddings", "cu_seqlens") if n in kwargs}
        return args, kwargs | changed

    def _short(self, name: str, value: Any) -> Any:
        """An argument as it is for the tokens that are left; the same object for the same one."""
        assert self.now is not None
        if value is None:
            return None
        # Blocks share their arguments, so each is shortened once. It is held, so that its id stays its own.
        if id(value) not in self.shorter:
            places = self.now.places[0]
            if name == "position_embeddings":
                short: Any = tuple(part[places.to(part.device)] for part in value)
            else:
                left = torch.zeros(self.now.length + 1, dtype=value.dtype, device=value.device)
                # Bounds count the tokens ahead of them.
                left = left.index_fill(0, places.to(value.device) + 1, 1).cumsum(0, dtype=value.dtype)
                short = left[value.long()]
                # A window that lost all of its own is empty, which flash attention takes. Elsewhere transformers calls
                # attention once a window, for which it waits for the device itself, and empty calls fail.
                if "flash" not in str(self.prompts.model.get_encoder("image").config._attn_implementation):
                    short = short.unique_consecutive()
            self.shorter[id(value)] = (value, short)
        return self.shorter[id(value)][1]

    def fill_up(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """After what gives rows, or the tower's last states: zeros where something was dropped."""
        if self.now is None:  # it reads a block ahead of those that see fewer
            return None
        values = output[0] if isinstance(output, tuple) else output
        states = values if values.ndim == 3 else values[None]
        whole, places = (self.total, self.rows) if states.shape[1] == self.rows.shape[1] else (0, self.now.places)
        places = places.to(states.device)[..., None].expand_as(states)
        full = states.new_zeros(states.shape[0], whole or self.now.length, states.shape[2]).scatter(1, places, states)
        full = full if values.ndim == 3 else full[0]
        return (full, *output[1:]) if isinstance(output, tuple) else full


def _count(host: Mapping[str, Any], modality: str) -> int:
    """Images or videos in a batch."""
    grids = host.get(f"{modality}_grid_thw")
    return len(host["pixel_values"] if grids is None else grids)


class _AnyLayer(dict[int, VisionRows]):
    """Every block's attention is that of one."""

    def __init__(self, rows: VisionRows) -> None:
        self.rows = rows

    def __missing__(self, layer: int) -> VisionRows:
        return self.rows
