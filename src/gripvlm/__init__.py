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
    "Grip": "gripvlm.grip.pruner",
    "GripError": "gripvlm.errors",
    "LLMPruner": "gripvlm.pruners.base",
    "LLMScorePruner": "gripvlm.pruners.base",
    "LLMTokens": "gripvlm.types",
    "Merge": "gripvlm.types",
    "Pruner": "gripvlm.pruners.base",
    "Record": "gripvlm.engine.pipeline",
    "ScorePruner": "gripvlm.pruners.base",
    "Scorer": "gripvlm.grip.scorer",
    "ScorerConfig": "gripvlm.grip.scorer",
    "Selection": "gripvlm.types",
    "VisionRows": "gripvlm.types",
    "VisualTokens": "gripvlm.types",
    "encode": "gripvlm.api",
    "get_pruner": "gripvlm.pruners.registry",
    "list_pruners": "gripvlm.pruners.registry",
    "prune": "gripvlm.engine.block",
    "prune_inputs": "gripvlm.api",
    "pruned_run": "gripvlm.api",
    "pruner_names": "gripvlm.pruners.registry",
    "register_pruner": "gripvlm.pruners.registry",
    "visual_tokens": "gripvlm.api",
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
    from gripvlm.api import encode as encode
    from gripvlm.api import prune_inputs as prune_inputs
    from gripvlm.api import pruned_run as pruned_run
    from gripvlm.api import visual_tokens as visual_tokens
    from gripvlm.budget import Budget as Budget
    from gripvlm.engine.block import prune as prune
    from gripvlm.engine.pipeline import Record as Record
    from gripvlm.errors import GripError as GripError
    from gripvlm.grip.pruner import Grip as Grip
    from gripvlm.grip.scorer import Scorer as Scorer
    from gripvlm.grip.scorer import ScorerConfig as ScorerConfig
    from gripvlm.models.encoded import Encoded as Encoded
    from gripvlm.pruners.base import LLMPruner as LLMPruner
    from gripvlm.pruners.base import LLMScorePruner as LLMScorePruner
    from gripvlm.pruners.base import Pruner as Pruner
    from gripvlm.pruners.base import ScorePruner as ScorePruner
    from gripvlm.pruners.registry import get_pruner as get_pruner
    from gripvlm.pruners.registry import list_pruners as list_pruners
    from gripvlm.pruners.registry import pruner_names as pruner_names
    from gripvlm.pruners.registry import register_pruner as register_pruner
    from gripvlm.types import LLMTokens as LLMTokens
    from gripvlm.types import Merge as Merge
    from gripvlm.types import Selection as Selection
    from gripvlm.types import VisionRows as VisionRows
    from gripvlm.types import VisualTokens as VisualTokens
