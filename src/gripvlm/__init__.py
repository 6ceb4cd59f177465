"""gripvlm: prune the visual tokens of Hugging Face vision-language models.

    import gripvlm
    with gripvlm.prune(model, "divprune", keep=64):
        model.generate(**inputs, max_new_tokens=32)

Names are imported when first used, so `import gripvlm` costs nothing and changes nothing.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "Budget": "gripvlm.budget",
    "Encoded": "gripvlm.models.encoded",
    "Grip": "gripvlm.pruners.grip",
    "GripError": "gripvlm.errors",
    "LayerPruner": "gripvlm.pruners.layered",
    "LayerTokens": "gripvlm.pruners.layered",
    "Merge": "gripvlm.pruners.base",
    "Pruner": "gripvlm.pruners.base",
    "Record": "gripvlm.path",
    "ScorePruner": "gripvlm.pruners.base",
    "Scorer": "gripvlm.scorer",
    "ScorerConfig": "gripvlm.scorer",
    "Selection": "gripvlm.pruners.base",
    "VisionRows": "gripvlm.pruners.base",
    "VisualTokens": "gripvlm.pruners.base",
    "encode": "gripvlm.prune",
    "get_pruner": "gripvlm.pruners.registry",
    "list_pruners": "gripvlm.pruners.registry",
    "prune": "gripvlm.block",
    "prune_inputs": "gripvlm.prune",
    "pruned_run": "gripvlm.prune",
    "pruner_names": "gripvlm.pruners.registry",
    "register_pruner": "gripvlm.pruners.registry",
    "visual_tokens": "gripvlm.prune",
}
__all__ = ["__version__", *_HOME]


class _Package(ModuleType):
    """Keeps `gripvlm.prune` the function: importing prune.py would put the module there."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})


if TYPE_CHECKING:
    from gripvlm.block import prune as prune
    from gripvlm.budget import Budget as Budget
    from gripvlm.errors import GripError as GripError
    from gripvlm.models.encoded import Encoded as Encoded
    from gripvlm.path import Record as Record
    from gripvlm.prune import encode as encode
    from gripvlm.prune import prune_inputs as prune_inputs
    from gripvlm.prune import pruned_run as pruned_run
    from gripvlm.prune import visual_tokens as visual_tokens
    from gripvlm.pruners.base import Merge as Merge
    from gripvlm.pruners.base import Pruner as Pruner
    from gripvlm.pruners.base import ScorePruner as ScorePruner
    from gripvlm.pruners.base import Selection as Selection
    from gripvlm.pruners.base import VisionRows as VisionRows
    from gripvlm.pruners.base import VisualTokens as VisualTokens
    from gripvlm.pruners.grip import Grip as Grip
    from gripvlm.pruners.layered import LayerPruner as LayerPruner
    from gripvlm.pruners.layered import LayerTokens as LayerTokens
    from gripvlm.pruners.registry import get_pruner as get_pruner
    from gripvlm.pruners.registry import list_pruners as list_pruners
    from gripvlm.pruners.registry import pruner_names as pruner_names
    from gripvlm.pruners.registry import register_pruner as register_pruner
    from gripvlm.scorer import Scorer as Scorer
    from gripvlm.scorer import ScorerConfig as ScorerConfig
