"""Pruning methods: one file a method, tensors only, found by name through the registry."""

from gripvlm.pruners.base import Merge, Pruner, ScorePruner, Selection, VisionRows, VisualTokens, sizes_after, top_k
from gripvlm.pruners.layered import LayerPruner, LayerTokens
from gripvlm.pruners.registry import get_pruner, list_pruners, pruner_names, register_pruner
from gripvlm.pruners.tower import TowerPruner

__all__ = [
    "LayerPruner",
    "LayerTokens",
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
