"""Every check of what a caller passes (what a pruner returns: `selections.py`). `prune.py` calls them, once each."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor

from gripvlm.budget import Budget, Keep
from gripvlm.errors import BudgetError, InputError, PrunerError, UnsupportedModelError
from gripvlm.models import adapter as seam
from gripvlm.models.encoded import Encoded, Span
from gripvlm.models.families import FAMILIES, Family, family_of
from gripvlm.models.grids import unknown
from gripvlm.models.hooks.attention import blocks_of
from gripvlm.models.hooks.llm_drop import checked_layers
from gripvlm.models.hooks.tower_merge import checked_tower
from gripvlm.models.renamed import cache_in
from gripvlm.models.text import placeholder
from gripvlm.models.tower_rows import Asked, Merging
from gripvlm.models.wrapped import device_of
from gripvlm.pruners import LLMPruner, Pruner, TowerPruner, get_pruner
from gripvlm.pruners.base import LLM_NEEDS, NEEDS
from gripvlm.pruners.ops.schedules import average_tokens
from gripvlm.types import VisualTokens
from gripvlm.utils.spec import options_of

__all__ = [
    "ENCODED",
    "PIXELS",
    "Keeps",
    "checked_budgets",
    "checked_imageless",
    "checked_inputs",
    "checked_merging",
    "checked_multiple",
    "checked_needs",
    "checked_positions",
    "checked_pruner",
    "checked_schedule",
    "one_budget",
]

Keeps: TypeAlias = Keep | Sequence[Keep | Sequence[Keep]] | None
"""One budget, one for each sample, or one list for each sample with one for each image."""

ENCODED = ("mm_encoder_outputs", "inputs_embeds")
PIXELS = ("pixel_values", "pixel_values_videos")


def checked_positions(positions: str) -> None:
    if positions not in ("original", "renumbered"):
        raise InputError(f"positions={positions!r}: type 'original' or 'renumbered'")


def checked_multiple(pad_to_multiple_of: Any) -> int:
    if pad_to_multiple_of is None:
        return 1
    try:
        multiple = 0 if isinstance(pad_to_multiple_of, bool) else operator.index(pad_to_multiple_of)
    except TypeError:
        multiple = 0
    if multiple < 1:
        raise InputError(f"pad_to_multiple_of={pad_to_multiple_of!r}: type an int of 1 or more, such as 64, or None")
    return multiple


def checked_pruner(pruner: str | Pruner, model: Any = None) -> Pruner:
    """The pruner, known to have what a pruner has, and to serve `model` where one is given."""
    chooser = get_pruner(pruner)
    name = getattr(chooser, "name", None)
    if not isinstance(name, str):
        raise PrunerError(f"a {type(chooser).__name__} has no name: give it name = 'snake_case'")
    if not isinstance(getattr(chooser, "needs", None), frozenset):
        raise PrunerError(f"pruner {name!r} states no needs: give it needs = frozenset({{'features'}})")
    if unknown := sorted(chooser.needs - NEEDS):
        raise PrunerError(f"pruner {name!r} needs {unknown}, but known are {sorted(NEEDS)}")
    stage = getattr(chooser, "stage", "input")
    if stage not in ("input", "llm", "vision"):
        raise PrunerError(f"pruner {name!r} drops rows at stage {stage!r}: known are 'input', 'llm' and 'vision'")
    if stage == "vision" and not isinstance(chooser, TowerPruner):
        raise PrunerError(f"pruner {name!r} merges at stage 'vision', so it must be a gripvlm.pruners.TowerPruner")
    if stage != "vision" and "groups" in chooser.needs:
        raise PrunerError(f"pruner {name!r} needs groups, which only a gripvlm.pruners.TowerPruner has")
    if stage == "vision" and (wrong := sorted(chooser.needs & {"vision_attention", "patches"})):
        raise PrunerError(f"pruner {name!r} merges inside the vision tower, which then has no {wrong[0]} for each row")
    if stage == "llm" and not isinstance(chooser, LLMPruner):
        raise PrunerError(f"pruner {name!r} drops rows at stage 'llm', so it must be a gripvlm.LLMPruner")
    if stage == "llm" and (unknown := sorted(chooser.llm_needs - LLM_NEEDS)):  # type: ignore[attr-defined]
        raise PrunerError(f"pruner {name!r} needs {unknown} of the layers, but known are {sorted(LLM_NEEDS)}")
    if "vision_attention" in chooser.needs and not getattr(chooser, "vision_layers", ()):
        raise PrunerError(f"pruner {name!r} needs vision_attention, but names no layers: give it vision_layers = (-2,)")
    if model is not None:
        _checked_pair(chooser, model)
    return chooser


def _checked_pair(pruner: Pruner, model: Any) -> None:
    """Refuses, before any picture is encoded, a pruner that this model cannot serve."""
    asked = checked_needs(family_of(model), [pruner])
    if asked.layers:
        tower = model.get_encoder("image")
        blocks = len(blocks_of(tower))
        if wrong := [layer for layer in asked.layers if not -blocks <= layer < blocks]:
            options = ", ".join(str(option) for option in options_of(type(pruner)))
            raise InputError(
                f"pruner {pruner.name!r} reads a block of the vision tower by its number, but there is no layer "
                f"{wrong[0]} in this {type(tower).__name__}: it has {blocks}, from 0 to {blocks - 1}; the pruner's "
                f"options are {options or 'none'}"
            )
    if isinstance(pruner, LLMPruner):
        checked_layers(model)
    if hasattr(pruner, "check"):  # an object of the caller's own may do without
        pruner.check(model)


def checked_needs(family: Family, pruners: Iterable[Pruner]) -> Asked:
    """What these pruners together want of the vision tower.

    Raises:
        UnsupportedModelError: the family cannot supply what one of them needs: its rows cannot be traced to
            its tower's patches, never are a plain raster, or its layers cannot drop.
    """
    layers: dict[int, None] = {}
    patches = given = keys = False
    for pruner in pruners:
        wanted = sorted(pruner.needs & {"vision_attention", "patches"})
        if wanted and family.vision is None:
            having = ", ".join(sorted(name for name, row in FAMILIES.items() if row.vision is not None))
            raise UnsupportedModelError(
                f"pruner {pruner.name!r} needs {' and '.join(wanted)} of the vision tower, which gripvlm cannot yet "
                f"bring back to {family.model_type}'s rows; it can for {having}: use another pruner or model"
            )
        if "grid" in pruner.needs and family.grid is unknown:
            having = ", ".join(sorted(name for name, row in FAMILIES.items() if row.grid is not unknown))
            raise UnsupportedModelError(
                f"pruner {pruner.name!r} needs a grid, rows in a plain raster, but {family.model_type} joins tiles and "
                f"breaks them into lines; rasters have {having}: use another pruner or model"
            )
        if getattr(pruner, "stage", "input") == "llm" and not family.layers:
            having = ", ".join(sorted(name for name, row in FAMILIES.items() if row.layers))
            raise UnsupportedModelError(
                f"pruner {pruner.name!r} drops inside the language model's layers, but {family.model_type}'s share or "
                f"carry state that still holds the dropped tokens; they can be dropped there in {having}: use another "
                "model, or drop at the input with a pruner such as divprune"
            )
        if "vision_attention" in wanted:
            layers.update(dict.fromkeys(pruner.vision_layers))
            given |= "vision_given" in pruner.needs
        patches |= "patches" in wanted
        keys |= "key" in pruner.needs
    return Asked(tuple(layers), patches, given, keys=keys)


def checked_merging(model: Any, family: Family, pruner: TowerPruner, keep: Keeps) -> Merging:
    """How this pruner merges inside this model's vision tower, to the same count in all images.

    Raises:
        UnsupportedModelError: the tower's tokens cannot get fewer.
        BudgetError: one budget for each sample or image.
    """
    checked_tower(model, family)
    if isinstance(keep, (list, tuple)):
        raise BudgetError(
            f"pruner {pruner.name!r} merges all images of a batch together, so all have the same count: type one keep, "
            f"such as keep=64, not {keep}"
        )
    budget = one_budget(pruner, keep)
    return Merging(lambda n: budget.count(n, "each image"), pruner.plan, pruner.match, pruner.proportional)


def checked_schedule(pruner: LLMPruner, tokens: VisualTokens, layers: int) -> dict[int, int]:
    """The rows of one image that each layer sees, or a `PrunerError` that names the pruner."""
    where = f"image {tokens.image} of sample {tokens.sample}"
    plan = pruner.schedule(tokens.n, tokens.keep, layers)

    def wrong(what: str) -> PrunerError:
        return PrunerError(f"pruner {pruner.name!r} on {where}: schedule {plan} {what}")

    if not isinstance(plan, Mapping) or not all(isinstance(x, int) for pair in plan.items() for x in pair):
        raise wrong("must be a dict of ints, layer -> count")
    if outside := [layer for layer in plan if not 0 <= layer < layers]:
        raise wrong(f"names layer {outside[0]}, but there are {layers}, from 0 to {layers - 1}")
    counts = [tokens.n, *(plan[layer] for layer in sorted(plan))]
    if counts[-1] < 1 or counts != sorted(counts, reverse=True):
        raise wrong(f"must go down from {tokens.n}, to 1 at least")
    if abs(average_tokens(tokens.n, plan, layers) - tokens.keep) > 0.5:
        paid = average_tokens(tokens.n, plan, layers)
        raise wrong(f"pays for {paid:.1f} rows on average over {layers} layers, but the budget is {tokens.keep}")
    return dict(plan)


def checked_imageless(model: Any, given: Mapping[str, Any]) -> None:
    """Raises where a call without any image has placeholders for one: transformers would take them for words."""
    ids = given.get("input_ids")
    cache = cache_in(given)
    filled = cache is not None and cache.get_seq_length() > 0
    if not isinstance(ids, Tensor) or filled or any(given.get(name) is not None for name in ENCODED):
        return
    for modality in ("image", "video"):
        if getattr(model.config, f"{modality}_token_id", None) is None:
            continue
        if count := int((ids == placeholder(model, modality)).sum()):
            raise InputError(
                f"the prompts have {count} {modality} placeholder tokens, but the call has no pixels: pass everything "
                "the processor returns"
            )


def checked_inputs(model: Any, family: Family, inputs: Mapping[str, Any], encoded: Encoded | None) -> dict[str, Any]:
    """The inputs as a dict without None, or an `InputError` that says what is wrong with them."""
    if not isinstance(inputs, Mapping):
        raise InputError(f"inputs are a {type(inputs).__name__}: pass what the processor returns")
    given = {name: value for name, value in inputs.items() if value is not None}
    device_of(model)  # it has weights somewhere
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
    if encoded is None and not any(name in given for name in PIXELS):
        raise InputError("no image: inputs have no pixel_values; without images call the model without gripvlm")
    if "pixel_values_videos" in given and "video" not in family.modalities:
        raise InputError(
            f"videos are not supported for {family.model_type}: leave pixel_values_videos out, or pass frames as images"
        )
    for name in ("attention_mask", "labels"):
        if name not in given:
            continue
        if not isinstance(given[name], Tensor):
            kind = type(given[name]).__name__
            what = (
                "the model makes its own masks from that, also where layers differ" if name != "labels" else "or none"
            )
            raise InputError(f"{name} is a {kind}: pass a tensor like input_ids, {tuple(ids.shape)}; {what}")
        if given[name].shape != ids.shape:
            raise InputError(
                f"{name} has shape {tuple(given[name].shape)}, expected that of input_ids, {tuple(ids.shape)}"
            )
    visual = seam.encoder_arguments(model, given)
    for name, value in given.items():
        if name in seam.PER_TOKEN or name in visual or not isinstance(value, Tensor):
            continue
        if value.shape[:2] == ids.shape:
            raise InputError(
                f"{name} has one entry a prompt token, which gripvlm does not know how to shorten: "
                "leave it out, or pass it after prune_inputs"
            )
    return given


def one_budget(pruner: Pruner, keep: Any) -> Budget:
    if keep is None:
        keep = getattr(pruner, "default_keep", None)
    if keep is None:
        raise BudgetError(f"pruner {pruner.name!r} needs a budget: type keep=64 (tokens an image) or keep=0.1")
    return Budget.of(keep)


def checked_budgets(pruner: Pruner, keep: Keeps, spans: Sequence[Sequence[Span]]) -> list[list[Budget]]:
    """One budget an image, whatever form `keep` came in."""
    if not isinstance(keep, (list, tuple)):
        budget = one_budget(pruner, keep)
        return [[budget] * len(mine) for mine in spans]
    if len(keep) != len(spans):
        raise BudgetError(f"keep has {len(keep)} entries for {len(spans)} samples")
    budgets = []
    for sample, (mine, asked) in enumerate(zip(spans, keep, strict=True)):
        each = list(asked) if isinstance(asked, (list, tuple)) else [asked] * len(mine)
        if len(each) != len(mine):
            raise BudgetError(f"keep[{sample}] has {len(each)} entries for the {len(mine)} images of that sample")
        budgets.append([one_budget(pruner, one) for one in each])
    return budgets
