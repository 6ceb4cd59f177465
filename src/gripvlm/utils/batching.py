"""Rows of several images as one operation: a loop over images would start kernels for each."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["joined", "onto", "padded", "per_entry", "rows_of", "shifted"]

_PINS = frozenset({"cuda"})
"""Devices that copy from page-locked host memory while the host goes on."""


def onto(values: Any, device: torch.device) -> Tensor:
    """Host numbers as a tensor on `device`, without waiting for what the device is doing."""
    host = torch.as_tensor(values)
    # A copy from pageable memory waits for the stream; one from page-locked memory is queued in it.
    return host.pin_memory().to(device, non_blocking=True) if device.type in _PINS else host.to(device)


def joined(parts: Sequence[Tensor]) -> Tensor:
    """All parts [n_i, ...] one after the other; a single one as it is, without a copy."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def per_entry(values: Sequence[int], parts: Sequence[Tensor]) -> Tensor:
    """[sum of m_i], on the parts' device: beside each entry of `joined(parts)`, parts [m_i], its part's value."""
    return onto(np.repeat(np.asarray(values, dtype=np.int64), [len(part) for part in parts]), parts[0].device)


def shifted(indices: Sequence[Tensor], starts: Sequence[int]) -> Tensor:
    """[K] all indices [k_i], one after the other, each plus the start of its own."""
    if len(indices) == 1:
        return indices[0] + starts[0]
    return torch.cat(list(indices)) + per_entry(starts, indices)


def rows_of(features: Sequence[Tensor], indices: Sequence[Tensor]) -> Tensor:
    """[K, d] the rows `indices` [k_i] of each of `features` [n_i, d], one after the other."""
    indices = [index.to(features[0].device) for index in indices]
    starts = itertools.accumulate((len(rows) for rows in features[:-1]), initial=0)
    return joined(features).index_select(0, shifted(indices, list(starts)))


def padded(rows: Sequence[Tensor], value: float | bool = 0.0) -> Tensor:
    """[B, n, ...] of B tensors [n_i, ...], filled up with `value`; a view of a single one."""
    if len(rows) == 1:
        return rows[0][None]
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)
