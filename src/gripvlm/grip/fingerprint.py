"""Which model a scorer belongs to. The comparison allows another dtype and a fine-tuned language model."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gripvlm.errors import GripError

_SKETCH = 32
"""Embedding rows, and weights, that are compared."""


class ScorerError(GripError):
    """A scorer cannot be loaded, or belongs to another base model."""


@dataclass(frozen=True)
class ModelFingerprint:
    """Which model a scorer was trained for.

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
    def of(cls, model: PreTrainedModel) -> ModelFingerprint:
        """Of a loaded transformers model."""
        embeddings = model.get_input_embeddings()
        table = _values(embeddings, "weight", embeddings.weight)
        rows = torch.arange(_SKETCH, device=table.device) * (table.shape[0] - 1) // (_SKETCH - 1)
        norms = tuple(round(float(norm), 4) for norm in table[rows].float().norm(dim=-1))
        weights = {}
        for path, weight in _compared_matrices(model).items():
            owner, _, name = path.rpartition(".")
            value = _values(model.get_submodule(owner), name, weight)
            weights[path] = (round(float(value.float().norm()), 4), round(float(value.flatten()[0]), 6))
        name = Path(getattr(model.config, "_name_or_path", "") or type(model).__name__).name
        return cls(name, model.config.model_type, table.shape[1], table.shape[0], norms, weights)

    @classmethod
    def read(cls, content: Any) -> ModelFingerprint:
        """From what `dataclasses.asdict` made of one, and JSON of that.

        Raises:
            KeyError, TypeError, ValueError: it is something else.
        """
        name, model_type = str(content["name"]), str(content["model_type"])
        sketch = tuple(float(norm) for norm in content["sketch"])
        if len(sketch) != _SKETCH:
            raise ValueError(f"base.sketch has {len(sketch)} numbers, not {_SKETCH}")
        weights = {key: (float(norm), float(first)) for key, (norm, first) in content.get("weights", {}).items()}
        return cls(name, model_type, int(content["features"]), int(content["vocabulary"]), sketch, weights)

    def check(self, model: PreTrainedModel) -> None:
        """Refuses a model that is not the scorer's own; its dtype may differ.

        Raises:
            ScorerError: another type, another width, or embeddings, tower or projector more than 2 % different
                where they are compared. Weights without a float form (quantised ones) are not.
        """
        other = ModelFingerprint.of(model)
        owner = f"this scorer was trained for {self.name} ({self.model_type}, {self.vocabulary} x {self.features})"
        advice = "load the scorer's own model, or train one with `gripvlm train --model ...`"
        if (other.model_type, other.features) != (self.model_type, self.features):
            raise ScorerError(
                f"{owner}, but the model is {other.name} ({other.model_type}, {other.vocabulary} x {other.features}): "
                f"{advice}"
            )
        # 2 %: bfloat16 rounds a number by up to 0.4 %, and other weights differ by far more.
        a, b = torch.tensor(self.sketch), torch.tensor(other.sketch)
        unlike = self.vocabulary != other.vocabulary or bool(((a - b).abs() > 0.02 * a.abs() + 1e-3).any())
        for key in self.weights.keys() & other.weights.keys():
            (norm, first), (other_norm, other_first) = self.weights[key], other.weights[key]
            unlike |= abs(norm - other_norm) > 0.02 * norm + 1e-3
            unlike |= abs(first - other_first) > 0.05 * abs(first) + 2e-3
        if unlike:
            raise ScorerError(
                f"{owner}, but the model is a {other.model_type} with other weights ({other.name}): its features have "
                f"another meaning; {advice}"
            )


def _compared_matrices(model: Any) -> dict[str, Tensor]:
    """Matrices outside the language model, evenly spaced by name."""
    language = {id(model.get_input_embeddings().weight)}
    for part in (model.get_decoder(), model.get_output_embeddings()):
        language |= {id(weight) for weight in part.parameters()} if part else set()
    # Quantised weights are of classes of their own and have no values that a norm could be taken of.
    matrices = sorted(
        (name, weight)
        for name, weight in model.named_parameters()
        if weight.ndim > 1
        and weight.is_floating_point()
        and id(weight) not in language
        and type(weight) is nn.Parameter
    )
    chosen = {i * (len(matrices) - 1) // (_SKETCH - 1) for i in range(_SKETCH)} if matrices else set()
    return dict(matrices[i] for i in sorted(chosen))


def _values(owner: nn.Module, name: str, weight: Tensor) -> Tensor:
    """A weight's values: accelerate's hooks keep those of offloaded modules beside the model."""
    hook = getattr(owner, "_hf_hook", None)
    # A module has one hook, or a sequence of them.
    for each in getattr(hook, "hooks", (hook,)):
        offloaded = getattr(each, "weights_map", None)
        if weight.device.type == "meta" and offloaded is not None:
            return offloaded[name]
    return weight
