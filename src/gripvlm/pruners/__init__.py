"""Pruning methods: one file a method, tensors only, found by name through the registry."""

from gripvlm.pruners.base import Merge, Pruner, ScorePruner, Selection, VisualTokens, top_k
from gripvlm.pruners.registry import get_pruner, list_pruners, pruner_names, register_pruner

__all__ = [
    "Merge",
    "Pruner",
    "ScorePruner",
    "Selection",
    "VisualTokens",
    "get_pruner",
    "list_pruners",
    "pruner_names",
    "register_pruner",
    "top_k",
]
