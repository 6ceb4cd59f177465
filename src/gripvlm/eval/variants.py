"""What is compared: one arm for each pruner at each budget, `full` always first."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gripvlm.budget import Budget, Keep
from gripvlm.engine.request import checked_pruner
from gripvlm.errors import GripError
from gripvlm.pruners import Pruner, get_pruner
from gripvlm.tasks.base import Sample
from gripvlm.utils.spec import parse_spec

__all__ = ["BLIND", "FULL", "ORACLE", "Arm", "digest", "fingerprint", "make_arms"]

FULL, ORACLE, BLIND = "full", "oracle", "blind"


@dataclass(frozen=True, eq=False)
class Arm:
    """One pruner at one budget.

    Attributes:
        label: as typed, `"random:seed=3"`; or `full`, `oracle`, `blind`.
        keep: the budget as asked, as JSON holds it (`Budget.plain`); None for `blind`.
        pruner: None for `oracle`, which is made anew for each batch, and for `blind`.
        config: the pruner's name and every one of its fields.
        trained: whether it, or a pruner inside it, has weights that were trained for pruning.
    """

    label: str
    keep: int | float | str | None
    pruner: Pruner | None
    config: dict[str, Any]
    trained: bool = False

    @property
    def key(self) -> tuple[str, str]:
        """What rows and answers know it by."""
        return self.label, self.keep_text

    @property
    def named(self) -> str:
        """For people: `fastv at 10%`."""
        return self.label if self.keep is None else f"{self.label} at {Budget.of(self.keep).short}"

    @property
    def keep_text(self) -> str:
        """The budget as the samples file writes it."""
        return "" if self.keep is None else str(self.keep)


def make_arms(
    pruners: Sequence[str | Pruner], keeps: Sequence[Keep], blind: bool = True, seeds: Sequence[int] = ()
) -> list[Arm]:
    """`full`, every pruner at every budget, and `blind`.

    With `seeds`, a pruner that has a `seed` and was named without one stands for one of each.

    Raises:
        GripError: an unknown pruner, no budget for one that needs it, or two pruners that would
            have the same rows.
    """
    budgets = [budget.plain for budget in dict.fromkeys(Budget.of(keep) for keep in keeps)]
    full = get_pruner("keep_all")
    arms = [Arm(FULL, 1.0, full, _config(full))]
    seen: set[str] = set()
    for pruner in [one for named in pruners for one in _seeded(named, seeds)]:
        label, chooser, config = _resolve(pruner)
        if label in (FULL, "keep_all"):
            continue
        if label in seen:
            if isinstance(pruner, str):
                continue
            raise GripError(f"two pruners are both called {label!r}: give one of them another name")
        seen.add(label)
        if not budgets:
            raise GripError(f"pruner {label!r} needs a budget: type --keep 64,10% (or keeps=[64, 0.1])")
        arms += [Arm(label, budget, chooser, config, _trained(chooser)) for budget in budgets]
    return [*arms, Arm(BLIND, None, None, {"name": BLIND})] if blind else arms


def _seeded(pruner: str | Pruner, seeds: Sequence[int]) -> list[str | Pruner]:
    """The pruner once for each seed, or as it is where it has none or its own was typed."""
    if not seeds or (isinstance(pruner, str) and pruner.strip() in (FULL, ORACLE, BLIND)):
        return [pruner]
    chooser: Any = checked_pruner(pruner)
    fields = dataclasses.fields(chooser) if dataclasses.is_dataclass(chooser) else ()
    default = [field.default for field in fields if field.name == "seed" and field.init]
    if not default:
        return [pruner]
    if not isinstance(pruner, str):
        return [dataclasses.replace(chooser, seed=seed) for seed in seeds] if chooser.seed == default[0] else [pruner]
    options = dict(parse_spec(pruner).options)
    if "seed" in options:
        return [pruner]
    return [f"{pruner.strip()}{',' if options else ':'}seed={seed}" for seed in seeds]


def _trained(pruner: Pruner | None) -> bool:
    inner = getattr(pruner, "inner", ())
    return bool(getattr(pruner, "trained", False)) or any(
        _trained(one) for one in (inner if isinstance(inner, (tuple, list)) else (inner,)) if one is not None
    )


def _resolve(pruner: str | Pruner) -> tuple[str, Pruner | None, dict[str, Any]]:
    """Label, object and configuration of what the caller named."""
    if isinstance(pruner, str):
        label = pruner.strip()
        if label == FULL:
            return FULL, None, {}
        if label == ORACLE:
            return ORACLE, None, {"name": ORACLE}
        if label == BLIND:
            raise GripError("'blind' is measured by itself and is no pruner: leave it out")
        chooser = checked_pruner(label)
        return label, chooser, _config(chooser)
    chooser = checked_pruner(pruner)
    options = _fields(chooser, changed=True)
    spec = ",".join(f"{name}={value}" for name, value in options.items())
    return f"{chooser.name}:{spec}" if spec else chooser.name, chooser, _config(chooser)


def _config(pruner: Pruner) -> dict[str, Any]:
    return {"name": pruner.name, **_fields(pruner)}


def _fields(pruner: Pruner, changed: bool = False) -> dict[str, Any]:
    """The pruner's dataclass fields as JSON values; only those unlike their default if `changed`."""
    if not dataclasses.is_dataclass(pruner):
        return {}
    found = {}
    for field in dataclasses.fields(pruner):
        if not field.repr or (changed and not field.init):
            continue
        value = getattr(pruner, field.name)
        if changed and isinstance(value, (str, int, float, bool)) and value == field.default:
            continue
        found[field.name] = value if isinstance(value, (str, int, float, bool, type(None))) else repr(value)[:200]
    return found


def digest(samples: Sequence[Sample]) -> str:
    """A short hash of which questions are asked and what counts as right."""
    text = "\n".join(
        f"{s.id}\t{s.image_id}\t{s.question}\t{s.answer}\t{s.choices}\t{s.evidence}"
        + (f"\t{s.answers}" if s.answers else "")  # so that hashes without any stay what they were
        for s in samples
    )
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


@torch.no_grad()
def fingerprint(model: Any) -> str:
    """A short hash of a few numbers of every weight: another checkpoint gives another one."""
    seen = hashlib.blake2b(digest_size=8)
    for name, weight in sorted(model.state_dict().items()):
        few = weight.flatten()[:: max(1, weight.numel() // 16)][:16].float().cpu()
        seen.update(f"{name} {tuple(weight.shape)}".encode() + few.contiguous().numpy().tobytes())
    return seen.hexdigest()
