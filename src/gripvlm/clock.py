"""The one clock that times are read from."""

from __future__ import annotations

import time

import torch

__all__ = ["device_time"]


def device_time(device: torch.device) -> float:
    """Seconds on a steady clock, after the device has done all it was asked."""
    if device.type not in ("cpu", "meta"):
        getattr(torch, device.type).synchronize(device)
    return time.perf_counter()
