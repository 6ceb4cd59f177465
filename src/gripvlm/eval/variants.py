"""What is compared: one variant for each pruner at each budget, `full` always first."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from gripvlm.budget import Budget, Keep
from gripvlm.engine.request import checked_pruner
from gripvlm.errors import GripError
from gripvlm.pruners import LLMPruner, Pruner, get_pruner, list_pruners
from gripvlm.tasks.base import Sample
from gripvlm.utils.spec import parse_spec

__all__ = ["BLIND", "DOWNSAMPLE", "FULL", "ORACLE", "Variant", "make_variants", "supported_pruners"]

FULL, ORACLE, BLIND, DOWNSAMPLE = "full", "oracle", "blind", "downsample"
NOT_IN_ALL = {
    "full": "always measured",
    "keep_all": "full by another name",
    "given": "needs scores of your own",
    "tome": "its smallest budget depends on the tower: type it by name",
}
"""Names that `--pruners all` does not stand for, and why; wrappers around other pruners are typed by name too."""
TOKENS = 576
"""Tokens of the image on which the schedules of pruners inside the language model are tried."""


@dataclass(frozen=True, eq=False)
class Variant:
    """One pruner at one budget.

    Attributes:
        label: as typed, `"random:seed=3"`; or `full`, `oracle`, `downsample`, `blind`.
        keep: the requested budget, as JSON holds it (`Budget.plain`); None for `blind`.
        pruner: None for `oracle`, which needs a new pruner for each batch, for `downsample`, which makes the pictures
            smaller, and for `blind`.
        config: the pruner's name and every one of its fields.
        trained: whether it, or a pruner inside it, has weights that were trained for pruning.
    """

    label: str
    keep: int | float | str | None
    pruner: Pruner | None
    config: dict[str, Any]
    trained: bool = False

    @property
    def keep_text(self) -> str:
        """The budget as the samples file writes it."""
        return "" if self.keep is None else str(self.keep)

    @property
    def key(self) -> tuple[str, str]:
        """What rows and answers know it by."""
        return self.label, self.keep_text

    @property
    def title(self) -> str:
        """For people: `fastv at 10%`."""
        return self.label if self.keep is None else f"{self.label} at {Budget.of(self.keep).short}"


def make_variants(
    pruners: Sequence[str | Pruner], keeps: Sequence[Keep], blind: bool = True, seeds: Sequence[int] = ()
) -> list[Variant]:
    """`full`, every pruner at every budget, and `blind`.

    With `seeds`, a pruner that has a `seed` option but no seed in its spec becomes a variant for each seed.

    Raises:
        GripError: an unknown pruner, no budget for one that needs it, or two pruners that would have the same rows.
    """
    # 64 and "64" are one budget; 1 and 1.0 are two (a token, and all of them).
    budgets = [budget.plain for budget in dict.fromkeys(Budget.of(keep) for keep in keeps)]
    full = get_pruner("keep_all")
    variants = [Variant(FULL, 1.0, full, _config(full))]
    labels: set[str] = set()
    for requested in [seeded for pruner in pruners for seeded in _with_seeds(pruner, seeds)]:
        label, pruner, config = _resolve(requested)
        if label in (FULL, "keep_all"):
            continue
        if label in labels:
            if isinstance(requested, str):
                continue
            raise GripError(f"two pruners are both called {label!r}: give one of them another name")
        labels.add(label)
        if not budgets:
            raise GripError(f"pruner {label!r} needs a budget: pass keeps=[64, 0.1], or type --keep 64,10%")
        variants += [Variant(label, budget, pruner, config, _is_trained(pruner)) for budget in budgets]
    return [*variants, Variant(BLIND, None, None, {"name": BLIND})] if blind else variants


def supported_pruners(model: PreTrainedModel, budgets: Sequence[Budget]) -> tuple[list[str], dict[str, str]]:
    """`--pruners all`: names that this model can run at one of these budgets or more, and why each other one cannot."""
    names, refused = [], dict(NOT_IN_ALL)
    layers = len(getattr(model.get_decoder(), "layers", ()))
    for row in list_pruners():
        if row.name in refused:
            continue
        try:
            pruner = checked_pruner(row.name, model)
            if isinstance(pruner, LLMPruner):
                # In the first layers all tokens are paid for, so that small averages cannot be reached.
                pruner.schedule(TOKENS, max(budget.count(TOKENS) for budget in budgets), layers)
        except GripError as error:
            refused[row.name] = str(error)
        else:
            names.append(row.name)
    return names, refused


def _with_seeds(pruner: str | Pruner, seeds: Sequence[int]) -> list[str | Pruner]:
    """The pruner once for each seed, or as it is where it has none or was given its own."""
    if not seeds or (isinstance(pruner, str) and pruner.strip() in (FULL, ORACLE, BLIND, DOWNSAMPLE)):
        return [pruner]
    resolved: Any = checked_pruner(pruner)
    fields = dataclasses.fields(resolved) if dataclasses.is_dataclass(resolved) else ()
    default = next((field.default for field in fields if field.name == "seed" and field.init), None)
    if default is None:
        return [pruner]
    # An object cannot say whether its seed was chosen: one that is not the default was.
    if not isinstance(pruner, str):
        return [dataclasses.replace(resolved, seed=seed) for seed in seeds] if resolved.seed == default else [pruner]
    options = dict(parse_spec(pruner).options)
    if "seed" in options:
        return [pruner]
    return [f"{pruner.strip()}{',' if options else ':'}seed={seed}" for seed in seeds]


def _is_trained(pruner: Pruner | None) -> bool:
    # A wrapper counts as trained if a pruner inside it is.
    inner = getattr(pruner, "inner", ())
    parts = inner if isinstance(inner, (tuple, list)) else (inner,)
    return bool(getattr(pruner, "trained", False)) or any(_is_trained(part) for part in parts if part is not None)


def _resolve(requested: str | Pruner) -> tuple[str, Pruner | None, dict[str, Any]]:
    """Label, object and configuration of what the caller named."""
    if not isinstance(requested, str):
        pruner = checked_pruner(requested)
        options = ",".join(f"{name}={value}" for name, value in _fields(pruner, changed=True).items())
        return f"{pruner.name}:{options}" if options else pruner.name, pruner, _config(pruner)
    label = requested.strip()
    if label == FULL:
        return FULL, None, {}
    if label in (ORACLE, DOWNSAMPLE):
        return label, None, {"name": label}
    if label == BLIND:
        raise GripError("'blind' is always measured and is no pruner: leave it out")
    pruner = checked_pruner(label)
    return label, pruner, _config(pruner)


def _config(pruner: Pruner) -> dict[str, Any]:
    return {"name": pruner.name, **_fields(pruner)}


def _fields(pruner: Pruner, changed: bool = False) -> dict[str, Any]:
    """The pruner's dataclass fields as JSON values; only those unlike their default if `changed`."""
    if not dataclasses.is_dataclass(pruner):
        return {}
    values = {}
    for field in dataclasses.fields(pruner):
        if not field.repr or (changed and not field.init):
            continue
        value = getattr(pruner, field.name)
        if changed and isinstance(value, (str, int, float, bool)) and value == field.default:
            continue
        values[field.name] = value if isinstance(value, (str, int, float, bool, type(None))) else repr(value)[:200]
    return values


def digest(samples: Sequence[Sample]) -> str:
    """A short hash of the questions and of what counts as right."""
    text = "\n".join(
        f"{s.id}\t{s.image_id}\t{s.question}\t{s.answer}\t{s.choices}\t{s.evidence}"
        # Added later: hashes of samples with one answer and one picture had to stay what published files say.
        + (f"\t{s.answers}" if s.answers else "")
        + (f"\t{[getattr(one, 'name', '') for one in s.pictures]}" if len(s.pictures) > 1 else "")
        for s in samples
    )
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


@torch.no_grad()
def fingerprint(model: PreTrainedModel) -> str:
    """A short hash of a few numbers of every weight: another checkpoint has another one."""
    weights_hash = hashlib.blake2b(digest_size=8)
    for name, weight in sorted(model.state_dict().items()):
        # Sixteen numbers of each weight tell checkpoints apart, without reading a large model as a whole.
        values = weight.flatten()[:: max(1, weight.numel() // 16)][:16].float().cpu()
        weights_hash.update(f"{name} {tuple(weight.shape)}".encode() + values.contiguous().numpy().tobytes())
    return weights_hash.hexdigest()
