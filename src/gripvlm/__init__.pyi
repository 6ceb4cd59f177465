# The public names. __init__.py reads this file, so that there is one list for type checkers and for Python.

from gripvlm.api import Record as Record
from gripvlm.api import encode as encode
from gripvlm.api import prune as prune
from gripvlm.api import prune_inputs as prune_inputs
from gripvlm.api import pruned_run as pruned_run
from gripvlm.api import visual_tokens as visual_tokens
from gripvlm.budget import Budget as Budget
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

__version__: str
