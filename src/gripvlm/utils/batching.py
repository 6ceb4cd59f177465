"""Rows of several images as one operation: no loop over them on the device, no copy of what is not used."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["in_one_storage", "onto", "padded", "rows_of", "shifted"]


_PINS = frozenset({"cuda"})
"""Kinds of devices whose copies from page-locked memory of the host are waited for by nobody."""


def onto(values: Any, device: torch.device) -> Tensor:
    """Numbers of the host as a tensor on `device`, without waiting for what the device is doing."""
    host = torch.as_tensor(values)
    return host.pin_memory().to(device, non_blocking=True) if device.type in _PINS else host.to(device)


def in_one_storage(rows: Sequence[Tensor]) -> tuple[Tensor, list[int]] | None:
    """Tensors [n_i, d] as slices of one [N, d], without a copy: that one, and the row that each begins at.

    Slices may leave gaps, overlap and repeat. None where they are of several storages, or where gradients flow
    into them, which views of a storage do not carry.
    """
    first = rows[0]
    width = first.shape[1]
    storage = first.untyped_storage()
    for one in rows:
        if one.requires_grad and torch.is_grad_enabled():
            return None
        if one.shape[1:] != (width,) or one.dtype != first.dtype:
            return None
        if one.stride(1) != 1 or (len(one) > 1 and one.stride(0) != width):
            return None
        if one.untyped_storage()._cdata != storage._cdata:
            return None
    low = min(int(one.storage_offset()) for one in rows)
    starts = [int(one.storage_offset()) - low for one in rows]
    if width == 0 or any(start % width for start in starts):
        return None
    starts = [start // width for start in starts]
    count = max(start + len(one) for start, one in zip(starts, rows, strict=True))
    return first.detach().as_strided((count, width), (width, 1), low), starts


def rows_of(features: Sequence[Tensor], indices: Sequence[Tensor]) -> Tensor:
    """[K, d] the rows `indices` [k_i] of each of `features` [n_i, d], one after the other."""
    device = features[0].device
    indices = [one.to(device) for one in indices]
    if len(features) == 1:
        return features[0].index_select(0, indices[0])
    if (found := in_one_storage(features)) is None:
        return torch.cat([rows.index_select(0, one) for rows, one in zip(features, indices, strict=True)])
    whole, starts = found
    return whole.index_select(0, shifted(indices, starts))


def shifted(indices: Sequence[Tensor], starts: Sequence[int]) -> Tensor:
    """[K] all indices [k_i], each plus the start of its own."""
    if len(indices) == 1:
        return indices[0] + starts[0]
    steps = np.repeat(np.asarray(starts, dtype=np.int64), [len(one) for one in indices])
    return torch.cat(list(indices)) + onto(steps, indices[0].device)


def padded(rows: Sequence[Tensor], value: float | bool = 0.0) -> Tensor:
    """[B, n, ...] of B tensors [n_i, ...], filled up with `value`; a view where they lie evenly in one storage."""
    if len(rows) == 1:
        return rows[0][None]
    first = rows[0]
    if first.ndim == 2 and all(one.shape == first.shape for one in rows):
        found = in_one_storage(rows)
        if found is not None:
            whole, starts = found
            step = starts[1] - starts[0]
            if step > 0 and all(b - a == step for a, b in itertools.pairwise(starts)):
                width = first.shape[1]
                size = (len(rows), len(first), width)
                return whole.as_strided(size, (step * width, width, 1), whole.storage_offset())
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)
