"""What a caller hands in, checked here and nowhere else: a `PruneRequest` once, and the inputs of each call."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, TypedDict

from torch import Tensor

from gripvlm.budget import Budget, Keep
from gripvlm.engine.pruner_checks import checked_needs, checked_pair, checked_pruner
from gripvlm.errors import BudgetError, GripError, InputError
from gripvlm.models.adapter import PER_TOKEN, DropOptions, encoder_arguments
from gripvlm.models.compat import cache_in
from gripvlm.models.encoded import Encoded
from gripvlm.models.families import Family, family_of
from gripvlm.models.hooks.proportional import checked_sizes
from gripvlm.models.hooks.tower_merge import checked_tower
from gripvlm.models.text import Question, placeholder
from gripvlm.models.tower_rows import TowerMerging, TowerRequest
from gripvlm.models.wrapped import device_of, unwrapped
from gripvlm.pruners import Pruner, TowerPruner, get_pruner

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from typing_extensions import Unpack

__all__ = [
    "Keeps",
    "PruneRequest",
    "checked_budget",
    "checked_encoding",
    "checked_imageless",
    "checked_inputs",
    "checked_needs",
    "checked_positions",
    "checked_pruner",
    "has_pixels",
]

Keeps: TypeAlias = Keep | Sequence[Keep | Sequence[Keep]] | None
"""One budget, one for each sample, or one list for each sample with one for each image."""

_NOT_IDS = ("mm_encoder_outputs", "inputs_embeds")
_PIXELS = ("pixel_values", "pixel_values_videos")


class PruneOptions(TypedDict, total=False):
    """The options of a `PruneRequest`, as in `gripvlm.prune`."""

    positions: str
    question: Question
    proportional_attention: bool
    pad_to_multiple_of: int | None


@dataclass(frozen=True, eq=False)
class PruneRequest:
    """What is to be pruned and how: everything a caller decides before the inputs are there.

    Attributes:
        model: the transformers model, out of its wrappers.
        family: its row in the table of families.
        pruner: what selects.
        budgets: one for all images, or for each sample one or a list with one per image.
        question: see `gripvlm.prune_inputs`.
        proportional_attention: see `gripvlm.prune`.
        drop: how the shortened prompts look.
        needs: what the pruner wants of the vision tower.
    """

    model: PreTrainedModel
    family: Family
    pruner: Pruner
    budgets: Budget | Sequence[Budget | Sequence[Budget]]
    question: Question
    proportional_attention: bool
    drop: DropOptions
    needs: TowerRequest

    @classmethod
    def of(cls, model: Any, pruner: str | Pruner, keep: Keeps = None, **options: Unpack[PruneOptions]) -> PruneRequest:
        """Checks and parses everything.

        Raises:
            GripError: it says what was given, what is allowed and what to do.
        """
        model = unwrapped(model)
        family = family_of(model)
        # The pruner before the budget: errors of `keep` name it, and it may have a budget of its own.
        chosen = checked_pruner(pruner)
        needs = checked_pair(chosen, model, family)
        positions = options.get("positions", "original")
        checked_positions(positions)
        multiple = _checked_multiple(options.get("pad_to_multiple_of"))
        proportional = options.get("proportional_attention", False)
        if proportional:
            checked_sizes(model)
        budgets = _parsed(chosen, keep)
        if isinstance(chosen, TowerPruner):
            checked_tower(model, family)
            needs = needs._replace(merging=_merging(chosen, budgets))
        drop = DropOptions(positions, multiple)
        return cls(model, family, chosen, budgets, options.get("question"), proportional, drop, needs)

    def budgets_for(self, images: Sequence[int]) -> list[list[Budget]]:
        """One budget for each image of prompts that have so many images."""
        if isinstance(self.budgets, Budget):
            return [[self.budgets] * count for count in images]
        if len(self.budgets) != len(images):
            raise BudgetError(f"keep has {len(self.budgets)} entries for {len(images)} samples")
        budgets = []
        for sample, (count, given) in enumerate(zip(images, self.budgets, strict=True)):
            each = [given] * count if isinstance(given, Budget) else list(given)
            if len(each) != count:
                raise BudgetError(f"keep[{sample}] has {len(each)} entries for the {count} images of that sample")
            budgets.append(each)
        return budgets


# --- options ----------------------------------------------------------------------------------


def checked_positions(positions: str) -> None:
    if positions not in ("original", "renumbered"):
        raise InputError(f"positions={positions!r}: pass 'original' or 'renumbered'")


def _checked_multiple(pad_to_multiple_of: Any) -> int:
    if pad_to_multiple_of is None:
        return 1
    try:
        multiple = 0 if isinstance(pad_to_multiple_of, bool) else operator.index(pad_to_multiple_of)
    except TypeError:
        multiple = 0
    if multiple < 1:
        raise InputError(f"pad_to_multiple_of={pad_to_multiple_of!r}: pass an int of 1 or more, such as 64, or None")
    return multiple


def checked_budget(pruner: Pruner, keep: Any) -> Budget:
    """`keep` as a `Budget`; where it is None, the pruner's own, if it has one."""
    if keep is None:
        keep = getattr(pruner, "default_keep", None)
    if keep is None:
        raise BudgetError(f"pruner {pruner.name!r} needs a budget: pass keep=64 (tokens an image) or keep=0.1")
    return Budget.of(keep)


def _parsed(pruner: Pruner, keep: Keeps) -> Budget | list[Budget | list[Budget]]:
    if not isinstance(keep, (list, tuple)):
        return checked_budget(pruner, keep)
    budgets: list[Budget | list[Budget]] = []
    for given in keep:
        if isinstance(given, (list, tuple)):
            budgets.append([checked_budget(pruner, image) for image in given])
        else:
            budgets.append(checked_budget(pruner, given))
    return budgets


def _merging(pruner: TowerPruner, budgets: Any) -> TowerMerging:
    """How this pruner merges inside the vision tower, to the same count in all images."""
    if not isinstance(budgets, Budget):
        raise BudgetError(
            f"pruner {pruner.name!r} merges all images of a batch together, so all have the same count: pass one keep, "
            "such as keep=64, not a list"
        )
    return TowerMerging(lambda n: budgets.count(n, "each image"), pruner.plan, pruner.match, pruner.proportional)


# --- the inputs of one call -------------------------------------------------------------------


def has_pixels(inputs: Mapping[str, Any]) -> bool:
    return any(inputs.get(name) is not None for name in _PIXELS)


def checked_inputs(model: Any, family: Family, inputs: Mapping[str, Any], encoded: Encoded | None) -> dict[str, Any]:
    """The inputs as a dict without None, or an `InputError` that says what is wrong with them."""
    if not isinstance(inputs, Mapping):
        raise InputError(f"inputs are a {type(inputs).__name__}: pass what the processor returns")
    given = {name: value for name, value in inputs.items() if value is not None}
    device_of(model)  # raises for a model without weights
    if "inputs_embeds" in given:
        raise InputError("inputs_embeds hide where the images are: pass input_ids and pixel_values")
    ids = given.get("input_ids")
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point():
        raise InputError("input_ids must be a tensor of token ids [B, L]: use return_tensors='pt'")
    if (cache := cache_in(given)) is not None and cache.get_seq_length() > 0:
        raise InputError(
            "the cache already holds tokens: pass the full prompt and no cache; each turn of a chat selects anew"
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


def _check_per_token(model: Any, given: Mapping[str, Any]) -> None:
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
    # Merged in the tower, an image must be encoded for each budget.
    if needs.merging is not None:
        if not has_pixels(inputs):
            raise InputError(
                f"pruner {pruner.name!r} merges inside the vision tower, so an encoding of all rows does not serve it: "
                "leave the pixels in the inputs"
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
    """How to name a pruner in a call: by its name where that makes it, else as the object at hand."""
    try:
        get_pruner(pruner.name)
    except GripError:
        return "pruner"
    return repr(pruner.name)


def checked_imageless(model: Any, given: Mapping[str, Any]) -> None:
    """Raises where a call without pixels has images all the same, and would run unpruned or wrong."""
    for name in _NOT_IDS:
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
            raise InputError(  # transformers would take the placeholders for words
                f"the prompts have {count} {modality} placeholder tokens, but the call has no pixels: pass everything "
                "the processor returns"
            )
