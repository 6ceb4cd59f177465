"""`PruneRequest`: the options of a caller, checked once."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, TypedDict

from torch import Tensor

from gripvlm.budget import Budget, Keep
from gripvlm.engine.outputs import DeferredChecks, check_features, checked_selections
from gripvlm.engine.pruner_checks import checked_pair, checked_pruner
from gripvlm.errors import BudgetError, InputError
from gripvlm.models.drop import DropOptions
from gripvlm.models.families import Family, family_of
from gripvlm.models.hooks.proportional import checked_sizes
from gripvlm.models.hooks.tower_drop import checked_tower_drop
from gripvlm.models.hooks.tower_merge import checked_tower
from gripvlm.models.text import Question
from gripvlm.models.tower_rows import TowerDropping, TowerMerging, TowerRequest
from gripvlm.models.wrapped import unwrapped
from gripvlm.pruners import Pruner, TowerPruner
from gripvlm.pruners.wrappers.repeats import Repeats
from gripvlm.pruners.wrappers.tower import Tower
from gripvlm.types import VisualTokens

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel
    from typing_extensions import Unpack

__all__ = ["Keeps", "PruneRequest", "checked_budget", "checked_positions", "checked_pruner"]

Keeps: TypeAlias = Keep | Sequence[Keep | Sequence[Keep]] | None
"""One budget, one for each sample, or one list for each sample with one for each image."""


class PruneOptions(TypedDict, total=False):
    """The options of a `PruneRequest`, as in `gripvlm.prune`."""

    positions: str
    question: Question
    proportional_attention: bool
    pad_to_multiple_of: int | None


@dataclass(frozen=True, eq=False)
class PruneRequest:
    """The options that do not depend on the inputs of a call.

    Attributes:
        model: the transformers model, out of its wrappers.
        family: its row in the table of families.
        pruner: what selects; what `repeats` wraps, where it is around it.
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
    def of(
        cls, model: nn.Module, pruner: str | Pruner, keep: Keeps = None, **options: Unpack[PruneOptions]
    ) -> PruneRequest:
        """Checks and parses everything.

        Raises:
            GripError: it says what was given, what is allowed and what to do.
        """
        inner = unwrapped(model)
        family = family_of(inner)
        # The pruner before the budget: errors of `keep` name it, and it may have a budget of its own.
        pruner = checked_pruner(pruner)
        needs = checked_pair(pruner, inner, family)
        # Repeats are merged before there is anything to select from: from here on the inner pruner is alone.
        pruner = pruner.inner if isinstance(pruner, Repeats) else pruner
        renumbered = checked_positions(options.get("positions", "original"))
        drop = DropOptions(renumbered, _checked_multiple(options.get("pad_to_multiple_of")))
        proportional = options.get("proportional_attention", False)
        if proportional:
            checked_sizes(inner)
        budgets = _parsed(pruner, keep)
        if isinstance(pruner, TowerPruner):
            checked_tower(inner, family)
            needs = needs._replace(merging=_merging(pruner, budgets))
        if isinstance(pruner, Tower):
            checked_tower_drop(inner, family, pruner.block)
            needs = needs._replace(dropping=_dropping(pruner))
        return cls(inner, family, pruner, budgets, options.get("question"), proportional, drop, needs)

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


def checked_positions(positions: str) -> bool:
    """Whether positions are to be renumbered."""
    if positions not in ("original", "renumbered"):
        raise InputError(f"positions={positions!r}: pass 'original' or 'renumbered'")
    return positions == "renumbered"


def _checked_multiple(pad_to_multiple_of: Any) -> int:
    if pad_to_multiple_of is None:
        return 1
    # NumPy integers are allowed; True, which is an int in Python, is a mistake.
    whole = isinstance(pad_to_multiple_of, numbers.Integral) and not isinstance(pad_to_multiple_of, bool)
    if not whole or pad_to_multiple_of < 1:
        raise InputError(f"pad_to_multiple_of={pad_to_multiple_of!r}: pass an int of 1 or more, such as 64, or None")
    return int(pad_to_multiple_of)


def checked_budget(pruner: Pruner, keep: Any) -> Budget:
    """`keep` as a `Budget`; where it is None, the pruner's own, if it has one."""
    if keep is None:
        keep = pruner.default_keep
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


def _dropping(pruner: Tower) -> TowerDropping:
    """What this pruner drops inside the vision tower: as many rows of all images, whatever `keep` is."""

    def select(images: list[VisualTokens]) -> list[Tensor]:
        checks = DeferredChecks()
        # On an accelerator nothing is read here: NaN of the tower goes on into the features, which are checked.
        check_features(images, checks)
        answers = pruner.inside.select_batch(images)
        return [selection.indices for selection in checked_selections(pruner.inside, answers, images, checks)]

    budget = pruner.tower_budget
    return TowerDropping(
        pruner.block, lambda n: budget.count(n, "each image (tower_keep)"), select, pruner.inside.needs
    )
