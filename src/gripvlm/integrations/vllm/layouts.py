"""Which model families vLLM serves pruned, and by which class; knows nothing of vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from gripvlm.engine.pruner_checks import checked_needs
from gripvlm.errors import PrunerError, UnsupportedModelError
from gripvlm.models.families import FAMILIES, not_supported
from gripvlm.pruners import Pruner
from gripvlm.pruners.base import Wrapper

__all__ = ["BACKEND", "CLASSES", "SERVED", "architecture", "reads_tower"]

_HERE = "gripvlm.integrations.vllm"
BACKEND = "GripTransformers"
CLASSES = {
    BACKEND: f"{_HERE}.transformers_backend:GripTransformers",
    "GripQwen2_5_VL": f"{_HERE}.qwen2_5_vl:GripQwen2_5_VL",
    "GripQwen3_VL": f"{_HERE}.qwen3_vl:GripQwen3_VL",
}
"""Architecture, as vLLM calls it -> where its class is."""


class Layout(NamedTuple):
    """How vLLM serves a family whose pictures are one run of placeholders each.

    Attributes:
        native: our class over vLLM's own for it, if there is one.
        backend: whether vLLM's Transformers backend can serve it.
        mrope: whether positions are coordinates in the image.
    """

    native: str = ""
    backend: bool = True
    mrope: bool = False


SERVED = {
    "llava": Layout(),
    "qwen2_5_vl": Layout("GripQwen2_5_VL", mrope=True),
    # The Transformers backend does not pass DeepStack's planes on.
    "qwen3_vl": Layout("GripQwen3_VL", backend=False, mrope=True),
}

_INTERLEAVED = "text stands between the visual tokens of a picture, and vLLM must know before it encodes where"
_TILED = "its budget counts per tile, and vLLM knows whole pictures"
_BOTH_WAYS = "its image tokens attend in both directions, which has not been tried in vLLM"
_REASONS = {
    "gemma3": _BOTH_WAYS,
    "gemma4": _BOTH_WAYS,
    "gemma4_unified": _BOTH_WAYS,
    "idefics3": _INTERLEAVED,
    "internvl": _TILED,
    "lfm2_vl": _TILED,
    "minicpmv4_6": _TILED,
    "minicpmv4_7": _TILED,
    "mistral3": _INTERLEAVED,
    "ovis2": _TILED,
    "paligemma": _BOTH_WAYS,
    "smolvlm": _INTERLEAVED,
}


def architecture(config: Any, pruners: Sequence[Pruner]) -> str:
    """The class that serves a model with these pruners.

    Raises:
        GripError: the family, or a pruner, cannot be served; it says why.
    """
    name = config.model_type
    if name not in FAMILIES:
        raise not_supported(config)
    if name not in SERVED:
        why = _REASONS.get(name, "it has not been tried there")
        raise UnsupportedModelError(
            f"{name} cannot be pruned inside vLLM, because {why}: served are {', '.join(SERVED)}. `gripvlm serve` "
            "serves it without vLLM"
        )
    for pruner in pruners:
        _check_stage(pruner)
    checked_needs(FAMILIES[name], pruners)
    layout, readers = SERVED[name], [pruner.name for pruner in pruners if reads_tower(pruner)]
    if readers and not layout.backend:
        raise PrunerError(
            f"pruner {readers[0]!r} reads the vision tower, which vLLM's own class of {name} does not show: choose one "
            "that reads features only, such as divprune"
        )
    return BACKEND if readers or not layout.native else layout.native


def reads_tower(pruner: Pruner) -> bool:
    """Whether the pruner reads more of the vision tower than its output."""
    return bool(pruner.needs & {"vision_attention", "patches"})


def _check_stage(pruner: Pruner) -> None:
    places = {
        "llm": "inside the language model, but in vLLM all layers of a request have one length",
        "pixels": "ahead of the vision tower, which in vLLM runs as it is",
        "vision": "inside the vision tower, which in vLLM runs as it is",
    }
    if pruner.stage in places:
        raise PrunerError(
            f"pruner {pruner.name!r} drops tokens {places[pruner.stage]}: choose one that drops them in front of the "
            "language model, such as divprune, or `gripvlm serve`"
        )
    if _moves_budget(pruner):
        raise PrunerError(
            f"pruner {pruner.name!r} moves budget between the tiles of a prompt once they are encoded, but vLLM must "
            "know before how many tokens each picture has: choose another, such as divprune, or `gripvlm serve`"
        )
    if "first_layer" in pruner.needs:
        raise PrunerError(
            f"pruner {pruner.name!r} reads queries and keys of the language model's first layer, whose weights vLLM "
            "keeps in another form: choose one that reads features only, such as divprune, or `gripvlm serve`"
        )


def _moves_budget(pruner: Pruner) -> bool:
    """Whether it, or one that it wraps, has an `allocate_budget` of its own."""
    inners: tuple[Pruner, ...] = getattr(pruner, "inners", ())
    # A wrapper's asks those inside.
    own = type(pruner).allocate_budget not in (Pruner.allocate_budget, Wrapper.allocate_budget)
    return own or any(map(_moves_budget, inners))
