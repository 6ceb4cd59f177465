"""Position ids of prompts, before and after visual tokens are dropped. M-RoPE is known here and nowhere else.

Shapes: [B, L] for most models. For M-RoPE [axes, B, L], where the axes are those that the model rotates by, such as
t, h, w, or a row that only counts tokens and then those. A single position of each prompt is [B] or [axes, B].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gripvlm.errors import InputError
from gripvlm.models.encoded import Span
from gripvlm.models.prompts import Prompts
from gripvlm.models.text import full_mask
from gripvlm.utils.batching import onto

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "SECONDS",
    "counting_rows",
    "full_positions",
    "grids_of",
    "next_positions",
    "positions_ahead",
    "shortened_positions",
]

SECONDS = "second_per_grid_ts"
"""Qwen2.5-VL: seconds between two temporal patches of each video, from which its positions are made."""


def grids_of(model: PreTrainedModel, inputs: Mapping[str, Any], modality: str) -> Tensor | None:
    """[items, 3] (t, h, w) or [items, 2] (h, w) in patches, where positions are made from them, else None."""
    if not hasattr(model.base_model, "get_rope_index"):  # no M-RoPE
        return None
    grids = inputs.get(f"{modality}_grid_thw")
    return inputs.get("target_sizes") if grids is None and modality == "image" else grids


def full_positions(prompts: Prompts, spans: Sequence[Sequence[Span]], device: torch.device) -> Tensor:
    """Position ids of the full prompts, as the model itself would make them."""
    model, inputs = prompts.model, dict(prompts.host)
    inputs["attention_mask"] = full_mask(model, inputs)
    # M-RoPE reads the images' grids. Those of the encoding, not of the inputs: one encoding serves many prompts.
    grids: dict[str, list[Any]] = {}
    for item in (span.item for images in spans for span in images):
        if item.patch_grid is not None:
            name = f"{item.modality}_grid_thw" if len(item.patch_grid) == 3 else "target_sizes"
            grids.setdefault(name, []).append(item.patch_grid)
        if item.seconds is not None:
            grids.setdefault(SECONDS, []).append(item.seconds)
    if grids and inputs.get("mm_token_type_ids") is None:
        raise InputError(
            "mm_token_type_ids are missing, without which this model's positions are wrong: pass everything the "
            "processor returns"
        )
    inputs |= {name: torch.tensor(values) for name, values in grids.items()}
    # On the host, from the host's copies: on an accelerator this helper would wait many times.
    positions: Tensor = model._prepare_position_ids_for_generation(inputs["input_ids"], inputs)
    deltas = getattr(model.base_model, "rope_deltas", None)
    if isinstance(deltas, Tensor):  # the helper has just left them on the host
        model.base_model.rope_deltas = onto(deltas, device)
    return onto(positions, device)


def next_positions(model: PreTrainedModel, positions: Tensor, mask: Tensor) -> Tensor:
    """The position of the first token after prompts with these positions and this mask [B, L]."""
    after = positions.masked_fill(mask == 0, -1).amax(-1) + 1
    if after.ndim == 2:  # text follows the largest coordinate, the same on all axes
        counting = counting_rows(model, positions)
        after = torch.cat((after[:counting], after[counting:].amax(0).expand(after.shape[0] - counting, -1)))
    return after


def shortened_positions(
    model: PreTrainedModel, positions: Tensor, mask: Tensor, following: Tensor, renumbered: bool
) -> tuple[Tensor, Tensor]:
    """The shortened prompts' position ids, and the position of the first token after them.

    Args:
        positions: of the columns that are left, in the full prompts.
        mask: [B, l] of the shortened prompts.
        following: the position of the first token after the full prompts.
        renumbered: number the remaining tokens from the start, as if the dropped ones had never been there.
    """
    if positions.ndim == 2 and not renumbered:
        return positions, following
    mask = mask.long()
    counted, lengths = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0), mask.sum(-1)
    if positions.ndim == 2:
        return counted, lengths
    if renumbered:
        raise InputError(
            "positions='renumbered' is not defined for models with M-RoPE, whose positions are coordinates in the "
            "image: leave positions='original'"
        )
    if hasattr(model.base_model, "rope_deltas"):  # what a caller's own decoding loop adds to the tokens it counts
        model.base_model.rope_deltas = (following[-1] - lengths)[:, None]
    if counting_rows(model, positions):
        return torch.cat((counted[None], positions[1:])), torch.cat((lengths[None], following[1:]))
    return positions, following


def positions_ahead(model: PreTrainedModel, full: Tensor, shortened: Tensor) -> Tensor:
    """By how much the last position of full prompts is ahead of the shortened ones'."""
    ahead = full[..., -1] - shortened[..., -1]
    if ahead.ndim == 2:
        counting = counting_rows(model, full)
        ahead = torch.cat((torch.zeros_like(ahead[:counting]), ahead[counting:]))
    return ahead


def counting_rows(model: PreTrainedModel, positions: Tensor) -> int:
    """1 where the first row of M-RoPE positions only counts tokens and is no axis of the rotation, else 0."""
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    # HunYuan-VL rotates by four axes and has no such row.
    return positions.shape[0] - len(rope.get("mrope_section") or "thw")
