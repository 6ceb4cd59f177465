"""Merging equal cells ahead of a vision tower: all of its blocks see fewer.

A tower that takes packed patches (Qwen2-VL's and later ones, GLM-4V's) gets the patches of all images as one sequence,
and computes from their grids where each patch is and which patches attend to one another. transformers lets a caller
pass all of this (`vision_utils.py`: `position_ids`, `cu_seqlens`, ...), so the tower runs unchanged on the cells that
are left, each at its own place.

A plain ViT (CLIP's, SigLIP's) sees images one by one, and adds places to patches. Here the patches that are left are
taken out behind that, before the first block; images of which fewer are left are padded.

A cell that stands for m is attended to as m equal ones at its place: log m is added to the scores of its keys (ToMe,
arXiv 2210.09461, eq. 1). docs/design.md says where that is exact.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from gripvlm.errors import InputError, UnsupportedModelError
from gripvlm.models.families import FAMILIES, Family
from gripvlm.models.hooks.attention import blocks_of, modules_of
from gripvlm.models.hooks.calls import AttentionCall, call_hooks
from gripvlm.models.hooks.proportional import add_sizes
from gripvlm.models.hooks.tower_merge import refuse_checkpointing
from gripvlm.models.repeats import Array, Distinct, RepeatRule
from gripvlm.utils.batching import onto

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["checked_repeats", "merge_repeats"]


def checked_repeats(model: PreTrainedModel, family: Family, rule: RepeatRule) -> None:
    """Raises an UnsupportedModelError where cells cannot be merged ahead of this model's vision tower."""
    if not (family.takes_grids or family.merges):
        having = ", ".join(name for name, row in FAMILIES.items() if row.takes_grids or row.merges)
        raise UnsupportedModelError(
            f"repeats cannot be merged ahead of {family.model_type}'s vision tower: it needs one that takes packed "
            "patches with grids, or a plain ViT of single images with a projector that works token by token, but here "
            f"rows are made of tiles or of blocks of patches; it is for {having}"
        )
    tower = model.get_encoder("image")
    if not family.takes_grids and _special_rows(model):
        raise UnsupportedModelError(
            "repeats cannot be merged where the CLS token is one of the image's rows "
            "(vision_feature_select_strategy='full'): use a pruner that drops at the input"
        )
    stem = next((module for module in tower.modules() if isinstance(module, nn.Conv2d)), None)
    if not family.takes_grids and (stem is None or stem.stride != stem.kernel_size):
        raise UnsupportedModelError(
            f"repeats are equal patches, but a {type(tower).__name__} makes each patch from its neighbours' pixels "
            "too: use a pruner that drops at the input"
        )
    attention = tower.config._attn_implementation
    # Images of a plain ViT are padded, which takes a bias too.
    if (rule.counted or not family.takes_grids) and attention not in ("sdpa", "eager"):
        other = ", or merge without counting, 'repeats(full):counted=False'" if family.takes_grids else ""
        raise UnsupportedModelError(
            f"repeats are counted by a bias on each key, which attn_implementation={attention!r} of the vision tower "
            f"takes none of: load the model with 'sdpa'{other}"
        )


def _special_rows(model: PreTrainedModel) -> bool:
    """Whether a plain ViT's rows begin with that of its CLS token."""
    return getattr(model.config, "vision_feature_select_strategy", "default") == "full" and any(
        name.endswith("class_embedding") for name, _ in model.get_encoder("image").named_parameters()
    )


@contextmanager
def merge_repeats(
    model: PreTrainedModel, host: Mapping[str, Any], found: Mapping[str, Sequence[Distinct]], counted: bool
) -> Iterator[None]:
    """Inside the block, the vision tower runs on the cells that are left.

    Args:
        host: the inputs, with grids on the host.
        found: modality -> the cells that are left of each of its items (`find_repeats`).
        counted: whether cells count as those that were merged into them.

    What comes out has all n rows of each image again, as the model expects: each row is that of the cell which stands
    for it.
    """
    merge = _merge_packed if any(f"{modality}_grid_thw" in host for modality in found) else _merge_plain
    with merge(model, host, found, counted):
        yield


# --- plain ViTs -------------------------------------------------------------------------------------------------------


@contextmanager
def _merge_plain(
    model: PreTrainedModel, host: Mapping[str, Any], found: Mapping[str, Sequence[Distinct]], counted: bool
) -> Iterator[None]:
    tower, items = model.get_encoder("image"), found["image"]
    left = max(len(item.rows) for item in items)
    padding = [left - len(item.rows) for item in items]
    rows = np.stack([np.pad(item.rows, (0, more), "edge") for item, more in zip(items, padding, strict=True)])
    slot = np.stack([item.slot for item in items])
    sizes = np.stack([np.pad(item.sizes, (0, more)) for item, more in zip(items, padding, strict=True)])
    biased = counted or any(padding)

    def shorten(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        refuse_checkpointing(block, "merges")
        hidden = args[0] if args else kwargs.pop("hidden_states")
        special = hidden.shape[1] - slot.shape[1]  # a CLS token in front
        return (hidden.gather(1, _in_front(special, rows, hidden)), *args[1:]), kwargs

    def refill(projector: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        return output.gather(1, _in_front(0, slot, output))

    def count(call: AttentionCall) -> None:
        special = call.key.shape[2] - left
        all_sizes = onto(np.pad(sizes, ((0, 0), (special, 0)), constant_values=1).astype(np.float32), call.key.device)
        call.mask = (all_sizes > 0)[:, None, None]
        add_sizes(call, all_sizes if counted else torch.ones_like(all_sizes))

    hooks = dict.fromkeys(modules_of(tower), count) if biased else {}
    after = {model.base_model.multi_modal_projector: refill}
    # first: hooks that capture attention then see it with sizes
    with call_hooks({blocks_of(tower)[0]: shorten}, after, hooks, first=True):
        yield


def _in_front(special: int, rows: Array, states: Tensor) -> Tensor:
    """[b, special + m, d] indices for `gather`: the special tokens in front, then the rows [b, m] behind them."""
    ahead = np.broadcast_to(np.arange(special), (len(rows), special))
    index = onto(np.concatenate((ahead, rows + special), axis=1), states.device)
    return index[..., None].expand(-1, -1, states.shape[2])


# --- towers that take packed patches ----------------------------------------------------------------------------------


@contextmanager
def _merge_packed(
    model: PreTrainedModel, host: Mapping[str, Any], found: Mapping[str, Sequence[Distinct]], counted: bool
) -> Iterator[None]:
    tower = model.get_encoder("image")
    # The tower runs images before videos.
    runs = iter([_Layout(tower, host[f"{modality}_grid_thw"], found[modality]) for modality in found])
    current: list[_Layout] = []
    sizes: dict[nn.Module, Iterator[Tensor | None]] = {}
    full = getattr(tower, "fullatt_block_indexes", range(len(blocks_of(tower))))
    attention = modules_of(tower)

    def shorten(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        refuse_checkpointing(blocks_of(module)[0], "merges")
        if (layout := next(runs, None)) is None:
            raise InputError(f"the vision tower ran more often than there are modalities ({len(found)}): one run each")
        current[:] = [layout]
        pixels = args[0] if args else kwargs.pop("hidden_states")
        device = pixels.device
        by_segment = {kind: layout.segment_sizes(kind, device) if counted else [] for kind in ("full", "window")}
        sizes.clear()
        for inner, block in attention.items():
            sizes[inner] = iter(by_segment["full" if block in full else "window"])
        return (layout.kept_patches(pixels), *args[1:]), kwargs | layout.arguments(device)

    def refill(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        slot = onto(current[0].slot, output.pooler_output.device)
        output.pooler_output = output.pooler_output.index_select(0, slot)
        if (planes := getattr(output, "deepstack_features", None)) is not None:
            output.deepstack_features = [plane.index_select(0, slot.to(plane.device)) for plane in planes]
        return output

    def count(call: AttentionCall) -> None:
        if (size := next(sizes[call.module], None)) is not None:
            add_sizes(call, size[None])

    hooks = dict.fromkeys(attention, count) if counted else {}
    # first: hooks that capture attention then see it with sizes
    with call_hooks({tower: shorten}, {tower: refill}, hooks, first=True):
        yield


@dataclass(eq=False)
class _Layout:
    """One run of a tower over items of which only some cells are left; everything on the host.

    Args:
        grids: [items, 3] (t, h, w) in patches.
    """

    tower: PreTrainedModel
    grids: Tensor
    items: Sequence[Distinct]

    def __post_init__(self) -> None:
        starts = np.cumsum([0, *(len(item.slot) for item in self.items)])
        left = np.cumsum([0, *(len(item.rows) for item in self.items)])
        pairs = list(zip(self.items, starts, left, strict=False))
        self.block = self.tower.spatial_merge_size**2
        self.rows = np.concatenate([item.rows + start for item, start, _ in pairs])  # of all cells, those that are left
        self.slot = np.concatenate([item.slot + start for item, _, start in pairs])  # [all cells] which of these
        frames = np.repeat((self.grids[:, 1] * self.grids[:, 2] // self.block).numpy(), self.grids[:, 0].numpy())
        frame = np.repeat(np.arange(len(frames)), frames)  # of each cell
        self.segments = {"full": frame}
        self.order = np.arange(len(self.rows))  # the cells that are left, as the blocks see them
        if hasattr(self.tower, "window_size"):
            window = self._windows()
            self.segments["window"] = window
            self.order = np.argsort(window[self.rows], kind="stable")

    def _windows(self) -> Array:
        """[cells] the window that each cell is in, numbered in the order in which the tower has them."""
        from transformers.vision_utils import get_vision_window_index

        tower = self.tower
        index, ends = get_vision_window_index(self.grids, tower.spatial_merge_size, tower.window_size, tower.patch_size)
        window = np.empty(len(index), dtype=np.int64)
        lengths = np.diff(ends.numpy()) // self.block
        window[index.numpy()] = np.repeat(np.arange(len(lengths)), lengths)
        return window

    @property
    def patches(self) -> Array:
        """The patches of the cells that are left."""
        return (self.rows[:, None] * self.block + np.arange(self.block)).ravel()

    def kept_patches(self, pixels: Tensor) -> Tensor:
        return pixels.index_select(0, onto(self.patches, pixels.device))

    def arguments(self, device: torch.device) -> dict[str, Tensor]:
        """What the tower would compute from the grids, for the cells that are left."""
        from transformers import vision_utils

        patches, merge = torch.from_numpy(self.patches), self.tower.spatial_merge_size
        made = {"position_ids": vision_utils.get_vision_position_ids(self.grids, merge)[patches]}
        made["cu_seqlens"] = self._ends("full")
        if "window" in self.segments:
            made["window_index"] = torch.from_numpy(self.order)
            made["cu_window_seqlens"] = self._ends("window")
        if hasattr(self.tower, "num_grid_per_side"):
            indices, weights = vision_utils.get_vision_interpolation_indices_and_weights(
                self.grids,
                num_grid_per_side=self.tower.num_grid_per_side,
                mode=self.tower.interpolation_mode,
                align_corners=self.tower.interpolation_align_corners,
                spatial_merge_size=merge,
            )
            made |= {"interp_indices": indices[patches], "interp_weights": weights[patches]}
        return {name: onto(value, device) for name, value in made.items()}

    def _ends(self, kind: str) -> Tensor:
        """Where each call of attention ends in the sequence of patches, from 0 on; int32."""
        counts = np.bincount(self.segments[kind][self.rows])
        return torch.from_numpy(np.cumsum([0, *counts[counts > 0]]) * self.block).to(torch.int32)

    def segment_sizes(self, kind: str, device: torch.device) -> list[Tensor | None]:
        """For each call of attention [L], how many patches each one stands for; None where each is just itself."""
        if kind not in self.segments:
            return []
        segment = self.segments[kind]
        # Only those in the same frame or window: it has attention for no others.
        own = segment == segment[self.rows[self.slot]]
        sizes = np.bincount(self.slot[own], minlength=len(self.rows))[self.order]
        lengths = np.diff(self._ends(kind).numpy())
        each = onto(np.repeat(sizes, self.block).astype(np.float32), device).split(lengths.tolist())
        several = np.split(sizes > 1, np.cumsum(lengths // self.block)[:-1])
        return [size if any(merged) else None for size, merged in zip(each, several, strict=True)]
