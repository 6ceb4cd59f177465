"""Pruning methods, on tensors only. `registry.py` finds them by name; `base.py` says what a method implements.

All methods: exactly k tokens are kept, in raster order; numbers are float32 whatever the model's dtype; ties go to the
lower index, on every device. The attention of the CLS token is, in vision towers without one, the mean attention that
each token receives. Blocks and layers are counted from 0. Inside the language model `keep` is the average over layers,
each image has its own budget, and kept tokens stay at their positions. Where a method departs from its paper or from
its authors' code in more than this, its docstring says so, by number.
"""

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
