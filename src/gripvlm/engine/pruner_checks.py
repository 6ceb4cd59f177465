"""What a pruner object must have, and what a model must supply for it: checked before any image is encoded."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from gripvlm.errors import InputError, PrunerError, UnsupportedModelError
from gripvlm.models.families import FAMILIES, Family, family_of
from gripvlm.models.first_layer import checked_first_layer
from gripvlm.models.hooks.attention import blocks_of
from gripvlm.models.hooks.llm_drop import checked_layers
from gripvlm.models.hooks.merge_repeats import checked_repeats
from gripvlm.models.repeats import RepeatRule
from gripvlm.models.tower_rows import TowerRequest
from gripvlm.pruners import LLMPruner, Pruner, TowerPruner, get_pruner
from gripvlm.pruners.base import LLM_NEEDS, NEEDS
from gripvlm.pruners.wrappers.repeats import Repeats
from gripvlm.pruners.wrappers.tower import Tower
from gripvlm.utils.spec import options_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["checked_needs", "checked_pair", "checked_pruner"]


def checked_pruner(pruner: str | Pruner, model: Any = None) -> Pruner:
    """The pruner, known to have what a pruner has, and to serve `model` where one is given."""
    chosen = get_pruner(pruner)
    if not isinstance(chosen, Pruner):
        raise PrunerError(
            f"a {type(chosen).__name__} is no pruner: make it a subclass of gripvlm.Pruner, or of gripvlm.ScorePruner"
        )
    name, needs, stage = getattr(chosen, "name", None), chosen.needs, chosen.stage
    if not isinstance(name, str):
        raise PrunerError(f"a {type(chosen).__name__} has no name: give it name = 'snake_case'")
    if not isinstance(needs, frozenset):
        raise PrunerError(f"pruner {name!r} states no needs: give it needs = frozenset({{'features'}})")
    if unread := sorted(needs - NEEDS):
        raise PrunerError(f"pruner {name!r} needs {unread}, but known are {sorted(NEEDS)}")
    if "vision_attention" in needs and not chosen.vision_layers:
        raise PrunerError(f"pruner {name!r} needs vision_attention, but names no layers: give it vision_layers = (-2,)")
    classes: dict[str, Any] = {"pixels": Repeats, "vision": (TowerPruner, Tower), "llm": LLMPruner}
    by_class = next((stage for stage, kind in classes.items() if isinstance(chosen, kind)), "input")
    if stage != by_class:
        raise PrunerError(
            f"pruner {name!r} drops rows at stage {stage!r}, but its base class at {by_class!r}: leave stage out, or "
            "make it a gripvlm.LLMPruner ('llm') or a gripvlm.pruners.TowerPruner ('vision')"
        )
    if "groups" in needs and not isinstance(chosen, TowerPruner):
        raise PrunerError(f"pruner {name!r} needs groups, which only a gripvlm.pruners.TowerPruner has")
    if "tower_rows" in needs and not isinstance(chosen, Tower):
        raise PrunerError(f"pruner {name!r} needs tower_rows, which only the wrapper tower has")
    if isinstance(chosen, TowerPruner) and (wrong := sorted(needs & {"vision_attention", "patches"})):
        raise PrunerError(f"pruner {name!r} merges inside the vision tower, which then has no {wrong[0]} for each row")
    if isinstance(chosen, LLMPruner) and (unread := sorted(chosen.llm_needs - LLM_NEEDS)):
        raise PrunerError(f"pruner {name!r} needs {unread} of the layers, but known are {sorted(LLM_NEEDS)}")
    if model is not None:
        checked_pair(chosen, model, family_of(model))
    return chosen


def checked_pair(pruner: Pruner, model: PreTrainedModel, family: Family) -> TowerRequest:
    """What the pruner wants of this model's vision tower, known to be there."""
    needs = checked_needs(family, [pruner])
    if needs.layers:
        tower = model.get_encoder("image")
        blocks = len(blocks_of(tower))
        if wrong := [layer for layer in needs.layers if not -blocks <= layer < blocks]:
            options = ", ".join(str(option) for option in options_of(type(pruner)))
            raise InputError(
                f"pruner {pruner.name!r} reads a block of the vision tower by its number, but there is no layer "
                f"{wrong[0]} in this {type(tower).__name__}: it has {blocks}, from 0 to {blocks - 1}; the pruner's "
                f"options are {options or 'none'}"
            )
    if isinstance(pruner, Repeats):
        rule = RepeatRule(pruner.threshold, pruner.counted)
        needs = checked_pair(pruner.inner, model, family)._replace(repeats=rule)
        checked_repeats(model, family, rule)
    if isinstance(pruner, LLMPruner):
        checked_layers(model)
    if "first_layer" in pruner.needs:
        checked_first_layer(model, f"pruner {pruner.name!r} needs first_layer,")
    # Last: it may look at weights, and the errors above are about the model at hand.
    pruner.check(model)
    return needs


def checked_needs(family: Family, pruners: Iterable[Pruner]) -> TowerRequest:
    """What these pruners together want of the vision tower.

    Raises:
        UnsupportedModelError: the family cannot supply what one of them needs: its rows cannot be traced to its
            tower's patches, never are a plain raster, or its layers cannot drop.
    """
    layers: dict[int, None] = {}
    patches = given = keys = False
    for pruner in pruners:
        wanted = sorted(pruner.needs & {"vision_attention", "patches"})
        if wanted and family.vision is None:
            raise UnsupportedModelError(
                f"pruner {pruner.name!r} needs {' and '.join(wanted)} of the vision tower, which gripvlm cannot yet "
                f"bring back to {family.model_type}'s rows; it can for "
                f"{_families(lambda row: row.vision is not None)}: use another pruner or model"
            )
        if "grid" in pruner.needs and not family.has_rasters:
            raise UnsupportedModelError(
                f"pruner {pruner.name!r} needs a grid, rows in a plain raster, which is not known of "
                f"{family.model_type}; rasters have {_families(lambda row: row.has_rasters)}: use another pruner or "
                "model"
            )
        if pruner.stage == "llm" and not family.layers:
            raise UnsupportedModelError(
                f"pruner {pruner.name!r} drops inside the language model's layers, which is not known to be right in "
                f"{family.model_type}; it is in {_families(lambda row: row.layers)}: use another model, or drop at the "
                "input with a pruner such as divprune"
            )
        if "vision_attention" in wanted:
            # A dict and not a set: layers in the order in which pruners name them, each once.
            layers.update(dict.fromkeys(pruner.vision_layers))
            given |= "vision_given" in pruner.needs
        patches |= "patches" in wanted
        keys |= "key" in pruner.needs
    return TowerRequest(tuple(layers), patches, given, keys=keys)


def _families(supports: Callable[[Family], bool]) -> str:
    return ", ".join(sorted(name for name, row in FAMILIES.items() if supports(row)))
