"""What the second, naive implementations of several methods share: float64, one pair at a time."""

from __future__ import annotations

from torch import Tensor


def cosine(a: Tensor, b: Tensor) -> float:
    """Of two vectors [d]."""
    return float(a.double() @ b.double() / (a.double().norm() * b.double().norm()))
