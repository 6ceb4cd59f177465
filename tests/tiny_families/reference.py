"""What pruned runs are compared with: the full model with keys masked, and one teacher-forced forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gripvlm.types import Selection
from tiny_families.base import IMAGE, VIDEO

Selections = list[list[Selection]]


def full_positions(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Position ids of the whole prompt, as the model makes them: [B, L] or [4, B, L]."""
    return model._prepare_position_ids_for_generation(inputs["input_ids"], dict(inputs))


def places_of(ids: Tensor, sample: list[Selection]) -> list[Tensor]:
    """Where the rows [n] of each item of one prompt [L] are; rows behind an item's own, such as separators, are not."""
    places = ((ids == IMAGE) | (ids == VIDEO)).nonzero().flatten()
    counts = [selection.n for selection in sample]
    tail = (len(places) - sum(counts)) // max(1, len(counts))
    return [part[: len(part) - tail] for part in places.split([n + tail for n in counts])] if counts else []


def kept(ids: Tensor, mask: Tensor, selections: Selections) -> Tensor:
    """[B, L] bool: real tokens that are text or a selected row."""
    keep = mask.bool()
    for row, left, sample in zip(ids, keep, selections, strict=True):
        for selection, places in zip(sample, places_of(row, sample), strict=True):
            left[places] = selection.mask()
    return keep


def masked(model: Any, inputs: dict[str, Tensor], selections: Selections) -> dict[str, Tensor]:
    """The full inputs with the dropped placeholders hidden, everything at its own position."""
    mask = kept(inputs["input_ids"], inputs["attention_mask"], selections).long()
    return inputs | {"position_ids": full_positions(model, inputs), "attention_mask": mask}


def extended(arguments: dict[str, Any], new: Tensor) -> dict[str, Any]:
    """Arguments of a prompt and the `new` [B, t] tokens that follow it."""
    count = new.shape[1]
    ones, zeros = torch.ones_like(new), torch.zeros_like(new)
    positions = arguments["position_ids"]
    after = positions[..., -1:] + torch.arange(1, count + 1)
    longer = dict(arguments)
    longer["input_ids"] = torch.cat((arguments["input_ids"], new), -1)
    longer["attention_mask"] = torch.cat((arguments["attention_mask"], ones), -1)
    longer["position_ids"] = torch.cat((positions, after), -1)
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in arguments:
            longer[name] = torch.cat((arguments[name], zeros), -1)
    return longer


def teacher_forced(model: Any, arguments: dict[str, Any], new: Tensor) -> list[Tensor]:
    """Logits [B, V] before each of the `new` [B, t] tokens, from one forward over prompt and answer.

    Args:
        arguments: what `prune_inputs` returned.
        new: tokens that follow the prompt.
    """
    with torch.no_grad():
        logits = model(**extended(arguments, new)).logits
    start = arguments["input_ids"].shape[1] - 1
    return list(logits[:, start : start + new.shape[1]].unbind(1))
