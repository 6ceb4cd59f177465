"""Pruning methods: one file a method, tensors only, found by name through the registry."""

from gripvlm.pruners.base import LLMPruner, LLMScorePruner, Pruner, ScorePruner, TowerPruner, top_k
from gripvlm.pruners.registry import get_pruner, list_pruners, pruner_names, register_pruner
from gripvlm.types import LLMTokens, Merge, Selection, VisionRows, VisualTokens, sizes_after

__all__ = [
    "LLMPruner",
    "LLMScorePruner",
    "LLMTokens",
    "Merge",
    "Pruner",
    "ScorePruner",
    "Selection",
    "TowerPruner",
    "VisionRows",
    "VisualTokens",
    "get_pruner",
    "list_pruners",
    "pruner_names",
    "register_pruner",
    "sizes_after",
    "top_k",
]
