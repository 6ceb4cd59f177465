"""Grip: the learned pruner, a trained scorer's k highest tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from gripvlm.errors import PrunerError
from gripvlm.pruners.base import ScorePruner, VisualTokens
from gripvlm.scorer import Scorer, coordinates

__all__ = ["SHIPPED", "Grip"]

SHIPPED = Path(__file__).parents[1] / "lab" / "data" / "grip"
"""Scorers for the lab VLM that come with the package, one folder each: `question` and `blind`."""


@dataclass(frozen=True, eq=False)
class Grip(ScorePruner):
    """score = scorer(features, place, question, k / n): Huang et al., "GRIP-VLM", arXiv 2605.13375.

        grip = gripvlm.Grip.from_pretrained("folder-or-hub-id")
        with gripvlm.prune(model, grip, keep=0.1): ...

    Inference takes the mode of the policy that was trained, the k highest logits. The paper publishes an abstract
    only; scorer and training are ours (`gripvlm.scorer`, `gripvlm.train`).

    Attributes:
        scorer: a name for `Scorer.from_pretrained`, or `lab` and `lab-blind`, the two that come with the package
            for its lab VLM (with the question and without).
        weights: a short hash of the scorer's weights, for results files.
    """

    name: ClassVar[str] = "grip"
    source: ClassVar[str] = "Huang et al. 2026, arXiv 2605.13375"
    trained: ClassVar[bool] = True

    scorer: str = "lab"
    module: Scorer | None = field(default=None, repr=False)
    weights: str = field(default="", init=False)

    def __post_init__(self) -> None:
        if self.module is None:
            shipped = {"lab": SHIPPED / "question", "lab-blind": SHIPPED / "blind"}
            object.__setattr__(self, "module", Scorer.from_pretrained(shipped.get(self.scorer, self.scorer)))
        object.__setattr__(self, "weights", self._scorer.digest())

    @classmethod
    def from_pretrained(cls, name: str | Path, **hub: Any) -> Grip:
        """A trained scorer from a folder or the hub; arguments as for `Scorer.from_pretrained`."""
        return cls(str(name), Scorer.from_pretrained(name, **hub))

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({"features", "question"} if self._scorer.config.question else {"features"})

    @property
    def _scorer(self) -> Scorer:
        assert self.module is not None
        return self.module

    def check(self, model: Any) -> None:
        """Refuses a model that the scorer was not trained for, and moves the scorer to the model's device."""
        if self._scorer.base is None:
            raise PrunerError("this Grip's scorer was never trained: train one with `gripvlm train`")
        self._scorer.base.check(model)
        self._scorer.to(model.device)

    @torch.no_grad()
    def score(self, tokens: VisualTokens) -> Tensor:
        dtype = next(self._scorer.parameters()).dtype
        question = tokens.question
        return self._scorer(
            tokens.features[None].to(dtype),
            coordinates(tokens.n, tokens.grid, tokens.features.device)[None].to(dtype),
            torch.tensor([tokens.keep / tokens.n], device=tokens.features.device),
            question=None if question is None else question[None].to(dtype),
        )[0]
