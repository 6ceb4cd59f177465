"""The inputs of one call, checked before anything is computed from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from gripvlm.errors import GripError, InputError
from gripvlm.models.adapter import PER_TOKEN, encoder_arguments
from gripvlm.models.compat import cache_in
from gripvlm.models.encoded import Encoded
from gripvlm.models.families import Family
from gripvlm.models.text import placeholder
from gripvlm.models.wrapped import device_of
from gripvlm.pruners import Pruner, get_pruner

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from gripvlm.engine.request import PruneRequest

__all__ = ["checked_encoding", "checked_imageless", "checked_inputs", "has_pixels"]


def has_pixels(inputs: Mapping[str, Any]) -> bool:
    return any(inputs.get(name) is not None for name in ("pixel_values", "pixel_values_videos"))


def checked_inputs(
    model: PreTrainedModel, family: Family, inputs: Mapping[str, Any], encoded: Encoded | None
) -> dict[str, Any]:
    """The inputs as a dict without None, or an `InputError` with the reason."""
    if not isinstance(inputs, Mapping):
        raise InputError(f"inputs are a {type(inputs).__name__}: pass what the processor returns")
    given = {name: value for name, value in inputs.items() if value is not None}
    device_of(model)  # raises for a model whose weights are nowhere
    if "inputs_embeds" in given:
        raise InputError("inputs_embeds hide where the images are: pass input_ids and pixel_values")
    ids = given.get("input_ids")
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point():
        raise InputError("input_ids must be a tensor of token ids [B, L]: use return_tensors='pt'")
    if (cache := cache_in(given)) is not None and cache.get_seq_length() > 0:
        raise InputError(
            "the cache already holds tokens: pass the full prompt and no cache; tokens are selected again in each turn"
        )
    if isinstance(given.get("logits_to_keep"), Tensor):
        raise InputError(
            "logits_to_keep as a tensor names columns of the full prompt, some of which go: pass a number, counted "
            "from the end"
        )
    if encoded is None and not has_pixels(given):
        raise InputError("no image: inputs have no pixel_values; without images call the model without gripvlm")
    if "pixel_values_videos" in given and "video" not in family.modalities:
        raise InputError(
            f"videos are not supported for {family.model_type}: leave pixel_values_videos out, or pass frames as images"
        )
    _check_per_token(model, given)
    return given


def _check_per_token(model: PreTrainedModel, given: Mapping[str, Any]) -> None:
    """Inputs with one entry per prompt token: those that can be shortened, and no others."""
    shape = given["input_ids"].shape
    for name in ("attention_mask", "labels"):
        value = given.get(name)
        if value is not None and not isinstance(value, Tensor):
            hint = (
                "or none" if name == "labels" else "the model makes its own masks from that, also where layers differ"
            )
            raise InputError(
                f"{name} is a {type(value).__name__}: pass a tensor like input_ids, {tuple(shape)}; {hint}"
            )
        if value is not None and value.shape != shape:
            raise InputError(f"{name} has shape {tuple(value.shape)}, expected that of input_ids, {tuple(shape)}")
    known = {*PER_TOKEN, *encoder_arguments(model, given)}
    for name, value in given.items():
        if name not in known and isinstance(value, Tensor) and value.shape[:2] == shape:
            raise InputError(
                f"{name} has one entry a prompt token, which gripvlm does not know how to shorten: leave it out, or "
                "pass it after prune_inputs"
            )


def checked_encoding(request: PruneRequest, inputs: Mapping[str, Any], encoded: Encoded | None) -> Encoded | None:
    """The caller's encoding of the images, known to hold what the pruner reads; None where they are to be encoded."""
    pruner, needs = request.pruner, request.needs
    # A tower that merges or drops makes other rows for each budget, and one that sees no repeats other rows too.
    if needs.changes_tower:
        if not has_pixels(inputs):
            where = f"{pruner.name!r} works inside" if needs.repeats is None else "'repeats' merges ahead of"
            raise InputError(
                f"pruner {where} the vision tower, so an encoding of all rows does not serve it: leave the pixels in "
                "the inputs"
            )
        return None
    if encoded is None:
        return None
    if encoded.model_type != request.family.model_type:
        raise InputError(f"encoded by a {encoded.model_type} model, but this one is {request.family.model_type}")
    has = encoded.tower_request
    lacking = {*needs.layers} - {*has.layers}
    if lacking or needs.patches > has.patches or needs.given > has.given or needs.keys > has.keys:
        raise InputError(
            f"images were encoded without what pruner {pruner.name!r} reads of the vision tower: use "
            f"gripvlm.encode(model, inputs, pruners=[{_as_argument(pruner)}])"
        )
    return encoded


def _as_argument(pruner: Pruner) -> str:
    """How the error names a pruner in a call: by its name where that makes it, else as the object at hand."""
    try:
        get_pruner(pruner.name)
    except GripError:
        return "pruner"
    return repr(pruner.name)


def checked_imageless(model: PreTrainedModel, given: Mapping[str, Any]) -> None:
    """Raises where a call without pixels has images all the same, and would run unpruned or wrong."""
    for name in ("mm_encoder_outputs", "inputs_embeds"):
        if given.get(name) is not None:
            raise InputError(
                f"{name} do not say where images are, so this call would run unpruned: pass input_ids and "
                "pixel_values, or leave the gripvlm.prune block"
            )
    ids, cache = given.get("input_ids"), cache_in(given)
    if not isinstance(ids, Tensor) or (cache is not None and cache.get_seq_length() > 0):
        return
    for modality in ("image", "video"):
        if getattr(model.config, f"{modality}_token_id", None) is None:
            continue
        if count := int((ids == placeholder(model, modality)).sum()):
            # transformers would take the placeholders for words, and answer.
            raise InputError(
                f"the prompts have {count} {modality} placeholder tokens, but the call has no pixels: pass everything "
                "the processor returns"
            )
