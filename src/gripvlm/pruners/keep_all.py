"""Keep every visual token: the reference that all others are measured against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from gripvlm.pruners.base import Pruner, Selection, VisualTokens

__all__ = ["KeepAll"]


@dataclass(frozen=True)
class KeepAll(Pruner):
    """Keeps all n rows; the logits are those of the untouched model, bit for bit.

    `keep` can be left away. Any budget below n is refused, since it could not be met.
    """

    name: ClassVar[str] = "keep_all"
    needs: ClassVar[frozenset[str]] = frozenset()
    source: ClassVar[str] = "no pruning"
    default_keep: ClassVar[float | None] = 1.0

    def select(self, tokens: VisualTokens) -> Selection:
        return Selection(torch.arange(tokens.n, device=tokens.features.device), tokens.n)
