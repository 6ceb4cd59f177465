"""Which model a scorer belongs to, told by what survives a change of dtype and a fine-tuned language model."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from gripvlm.errors import GripError

__all__ = ["ModelFingerprint", "ScorerError", "compared"]

_SKETCH = 32  # embedding rows and weights that tell one base model from another


class ScorerError(GripError):
    """A scorer cannot be loaded, or belongs to another base model."""


@dataclass(frozen=True)
class ModelFingerprint:
    """Which model a scorer was trained for, told by what survives a change of dtype.

    Attributes:
        name: as it was loaded, for messages only.
        model_type: of its config.
        features, vocabulary: the shape of its embedding table.
        sketch: norms of some embedding rows, evenly spaced.
        weights: name -> (norm, first value) of some of the tower's and projector's weights.
    """

    name: str
    model_type: str
    features: int
    vocabulary: int
    sketch: tuple[float, ...]
    weights: dict[str, tuple[float, float]] = field(default_factory=dict)

    @classmethod
    @torch.no_grad()
    def of(cls, model: Any) -> ModelFingerprint:
        """Of a loaded transformers model."""
        embeddings = model.get_input_embeddings()
        table = _value(embeddings, "weight", embeddings.weight)
        rows = torch.arange(_SKETCH, device=table.device) * (table.shape[0] - 1) // (_SKETCH - 1)
        norms = [round(float(x), 4) for x in table[rows].float().norm(dim=-1)]
        name = getattr(model.config, "_name_or_path", "") or type(model).__name__
        return cls(
            Path(name).name, model.config.model_type, table.shape[1], table.shape[0], tuple(norms), _visual(model)
        )

    @classmethod
    def read(cls, said: Any) -> ModelFingerprint:
        """From what `dataclasses.asdict` made of one, and JSON of that.

        Raises:
            ScorerError: it is something else.
        """
        if not isinstance(said, dict):
            raise ScorerError("base is no object")
        base: dict[str, Any] = {"weights": {}} | said
        kinds = {"name": str, "model_type": str, "features": int, "vocabulary": int, "sketch": list, "weights": dict}
        if unlike := base.keys() ^ kinds.keys():
            raise ScorerError(f"base lacks, or should not have, {', '.join(map(repr, sorted(unlike)))}")
        if wrong := [name for name, kind in kinds.items() if type(base[name]) is not kind]:
            raise ScorerError(f"base.{wrong[0]} is no {kinds[wrong[0]].__name__}")
        if not _numbers(base["sketch"], _SKETCH):
            raise ScorerError(f"base.sketch is no list of {_SKETCH} numbers")
        if wrong := [name for name, pair in base["weights"].items() if not _numbers(pair, 2)]:
            raise ScorerError(f"base.weights has no two numbers for {wrong[0]!r}")
        pairs = {name: (float(norm), float(first)) for name, (norm, first) in base["weights"].items()}
        return cls(**base | {"sketch": tuple(base["sketch"]), "weights": pairs})

    def check(self, model: Any) -> None:
        """Passes where `model` is the scorer's own, in any dtype.

        Raises:
            ScorerError: another type, another width, or embeddings, tower or projector more than 2 % different
                where they are compared. Weights without a float form (quantised ones) are not.
        """
        other = ModelFingerprint.of(model)
        mine = f"this scorer was trained for {self.name} ({self.model_type}, {self.vocabulary} x {self.features})"
        if (other.model_type, other.features) != (self.model_type, self.features):
            raise ScorerError(
                f"{mine}, but the model is {other.name} ({other.model_type}, {other.vocabulary} x {other.features}): "
                "load the scorer's own model, or train one with `gripvlm train --model ...`"
            )
        a, b = torch.tensor(self.sketch), torch.tensor(other.sketch)
        unlike = self.vocabulary != other.vocabulary or bool(((a - b).abs() > 0.02 * a.abs() + 1e-3).any())
        for key in self.weights.keys() & other.weights.keys():
            (norm, first), (norm_there, first_there) = self.weights[key], other.weights[key]
            unlike |= abs(norm - norm_there) > 0.02 * norm + 1e-3
            unlike |= abs(first - first_there) > 0.05 * abs(first) + 2e-3
        if unlike:
            raise ScorerError(
                f"{mine}, and the model is a {other.model_type} with other weights ({other.name}): its features mean "
                "something else. Load the scorer's own model, or train one with `gripvlm train --model ...`"
            )


def _numbers(values: Any, count: int) -> bool:
    """Whether it is a list of so many finite numbers."""
    return (
        type(values) is list
        and len(values) == count
        and all(type(value) in (int, float) and math.isfinite(value) for value in values)
    )


def compared(model: Any) -> list[torch.Tensor]:
    """The weights that `ModelFingerprint.check` looks at."""
    return [model.get_input_embeddings().weight, *_some(model).values()]


def _some(model: Any) -> dict[str, torch.Tensor]:
    """Matrices outside the language model, evenly spaced by name; quantised ones, of classes of their own, have no
    values that a norm could be taken of.
    """
    text = {
        id(weight)
        for part in (model.get_decoder(), model.get_output_embeddings())
        if part
        for weight in part.parameters()
    }
    text.add(id(model.get_input_embeddings().weight))
    mine = sorted(
        (name, weight)
        for name, weight in model.named_parameters()
        if weight.ndim > 1
        and weight.is_floating_point()
        and id(weight) not in text
        and type(weight) is torch.nn.Parameter
    )
    chosen = {i * (len(mine) - 1) // (_SKETCH - 1) for i in range(_SKETCH)} if mine else set()
    return {mine[i][0]: mine[i][1] for i in sorted(chosen)}


def _value(owner: Any, name: str, weight: torch.Tensor) -> torch.Tensor:
    """A weight's values: accelerate's hooks keep those of offloaded modules beside the model."""
    hook = getattr(owner, "_hf_hook", None)
    for one in getattr(hook, "hooks", (hook,)):
        kept = getattr(one, "weights_map", None)
        if weight.device.type == "meta" and kept is not None:
            return kept[name]
    return weight


def _visual(model: Any) -> dict[str, tuple[float, float]]:
    """What `ModelFingerprint.weights` compares."""
    found = {}
    for name, weight in _some(model).items():
        owner, _, own = name.rpartition(".")
        value = _value(model.get_submodule(owner), own, weight)
        found[name] = (round(float(value.float().norm()), 4), round(float(value.flatten()[0]), 6))
    return found
