"""Relaxed: a scorer that followed a gradient through a soft mask, the baselines that Grip is compared with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from gripvlm.errors import PrunerError
from gripvlm.grip.pruner import Learned

__all__ = ["Relaxed"]


@dataclass(eq=False)
class Relaxed(Learned):
    """The k highest of a scorer's logits, as Grip's, trained by `gripvlm train relaxed`.

    The same network as Grip's on the same questions; only how it was trained differs, and `relaxation` says how:
    soft_topk, straight_through, perturbed, dynamicvit (arXiv 2106.02034) or diffprune. Equations and departures
    are in `gripvlm.grip.train.relaxed`, `.dynamicvit` and `.diffprune`.

    Attributes:
        scorer: a name for `Scorer.from_pretrained`, such as the folder of the run.
        weights: a short hash of the scorer's weights, for results files.
        relaxation: what the scorer was trained through, read from the scorer itself, for results files.

    Raises:
        PrunerError: a scorer that was trained in another way.
    """

    name: ClassVar[str] = "relaxed"
    source: ClassVar[str] = "gradient baselines: soft top-k, DynamicViT (arXiv 2106.02034), DiffPrune"

    relaxation: str = field(default="", init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        notes = self._loaded.scorer.notes
        if notes.get("stage") != "relaxed":
            raise PrunerError(
                f"pruner 'relaxed' takes a scorer of `gripvlm train relaxed`, but {self.scorer} was trained by "
                f"{notes.get('stage', 'nothing')}: type grip:scorer={self.scorer}, or name another folder"
            )
        self.relaxation = notes["config"]["relaxation"]
