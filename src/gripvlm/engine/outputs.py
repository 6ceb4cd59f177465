"""Checks of every pruner's output: types and sizes at once, values without a wait for the device."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gripvlm.errors import InputError, PrunerError
from gripvlm.pruners import Pruner
from gripvlm.types import LLMTokens, Merge, Selection, VisualTokens
from gripvlm.utils.batching import joined, per_entry

__all__ = ["DeferredChecks", "check_features", "checked_counts", "checked_selection", "checked_selections"]

_TOLERANCE = 1e-3
"""Allowed difference between 1 and the sum of a kept row's weights; bfloat16 weights do not sum to exactly 1."""


class DeferredChecks:
    """Checks of values on a device. All are read together after the device is done; on a CPU each is read at once."""

    def __init__(self) -> None:
        self._pending: list[tuple[Tensor, Callable[[], None]]] = []

    def add(self, failed: Tensor, explain: Callable[[], None]) -> None:
        """`failed` is a bool without dimensions; if it is True, `explain` finds the cause and raises the error."""
        self._pending.append((failed, explain))
        # On a CPU nothing waits, and the traceback should show where the cause is.
        if failed.device.type == "cpu":
            self.raise_if_failed()

    def raise_if_failed(self) -> None:
        """Waits for the device, and raises for the first check that failed."""
        pending, self._pending = self._pending, []
        if not pending:
            return
        # One read for all checks: each read would wait for the device. With device_map they may be on several.
        device = pending[0][0].device
        flags = torch.stack([failed.to(device) for failed, _ in pending]).tolist()
        for failed, (_, explain) in zip(flags, pending, strict=True):
            if failed:
                explain()

    @contextmanager
    def explaining_errors(self) -> Iterator[None]:
        """If the block raises an error after a check failed, the check is its cause: its error is raised instead."""
        try:
            yield
        except Exception:
            self.raise_if_failed()
            raise


def check_features(images: Sequence[VisualTokens], checks: DeferredChecks) -> None:
    """Schedules a NaN check on the visual features."""
    # A sum is NaN if one of its terms is, and it is far cheaper than a check of each value. (inf - inf is NaN as well:
    # in that case no image has NaN, and nothing is raised.)
    total = joined([tokens.features.detach() for tokens in images]).sum(dtype=torch.float32)

    def explain() -> None:
        for tokens in images:
            if bool(tokens.features.isnan().any()):
                raise InputError(
                    f"the vision encoder made NaN of image {tokens.image} of sample {tokens.sample}: look at its "
                    "pixels (a corrupt image), or load the model in bfloat16 or float32, if float16 overflows"
                )

    checks.add(total.isnan(), explain)


def checked_counts(pruner: Pruner, counts: Sequence[int], images: Sequence[VisualTokens]) -> list[int]:
    """The counts that a pruner gives to a sample's images: their sum is that of the budgets, or more if it may be."""
    counts, budgets = list(counts), [tokens.keep for tokens in images]
    fits = len(counts) == len(images) and all(1 <= k <= tokens.n for k, tokens in zip(counts, images, strict=True))
    more = sum(counts) - sum(budgets)
    if not fits or more < 0 or (more and not pruner.may_exceed):
        raise PrunerError(
            f"pruner {pruner.name!r} allots {counts} to the {len(images)} images of sample {images[0].sample}: allowed "
            f"are counts from 1 to {[tokens.n for tokens in images]} with the sum of the budgets {budgets}"
            f"{', or more' if pruner.may_exceed else ''}"
        )
    return counts


# --- selections -------------------------------------------------------------------------------


def checked_selections(
    pruner: Pruner, answers: Sequence[Any], images: Sequence[VisualTokens], checks: DeferredChecks
) -> list[Selection]:
    """One selection for each image, on its device; checks of the values are scheduled.

    Raises:
        PrunerError: it names the pruner and the image.
    """
    if len(answers) != len(images):
        raise PrunerError(f"pruner {pruner.name!r} returned {len(answers)} selections for {len(images)} images")
    where = [f"pruner {pruner.name!r} on image {tokens.image} of sample {tokens.sample}" for tokens in images]
    # Any object with select() will do as a pruner, and may lack the attribute.
    joint = getattr(pruner, "joint", False)
    selections = [_with_right_shape(*each, exact=not joint) for each in zip(answers, images, where, strict=True)]
    if joint:
        _check_sums(pruner, selections, images)

    def explain() -> None:
        for selection, prefix in zip(selections, where, strict=True):
            _check_values(selection, prefix)

    checks.add(_wrong_values(selections).any(), explain)
    if not all(selection.sound for selection in selections):
        # An index out of range would crash the whole device when rows are read by it.
        checks.raise_if_failed()
    return selections


def checked_selection(name: str, answer: Any, tokens: VisualTokens | LLMTokens, where: str) -> Selection:
    """The selection of `tokens.keep` of `tokens`, checked at once, or a `PrunerError` that names pruner and place."""
    prefix = f"pruner {name!r} on {where}"
    selection = _with_right_shape(answer, tokens, prefix)
    _check_values(selection, prefix)
    return selection


def _check_sums(pruner: Pruner, selections: Sequence[Selection], images: Sequence[VisualTokens]) -> None:
    """Refuses a joint pruner's selections of a prompt that do not add up to its budget."""
    spare: dict[int, list[int]] = {}
    for selection, tokens in zip(selections, images, strict=True):
        spare.setdefault(tokens.sample, []).append(tokens.keep - selection.k)
    for sample, each in spare.items():
        if sum(each):
            asked = sum(tokens.keep for tokens in images if tokens.sample == sample)
            raise PrunerError(
                f"pruner {pruner.name!r} kept {asked - sum(each)} tokens of the {len(each)} images of sample {sample}, "
                f"but their budget is exactly {asked}"
            )


def _with_right_shape(selection: Any, tokens: VisualTokens | LLMTokens, prefix: str, exact: bool = True) -> Selection:
    """The selection on its image's device, known to be of the right types and sizes (`exact`: of `tokens.keep`)."""
    n, k, device = tokens.n, tokens.keep, tokens.device
    if not isinstance(selection, Selection):
        raise PrunerError(f"{prefix}: select() returned a {type(selection).__name__}, expected a Selection")
    scores = selection.scores
    if scores is not None:
        if not isinstance(scores, Tensor) or scores.shape != (n,):
            got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise PrunerError(f"{prefix}: scores must be a tensor ({n},), got {got}")
        scores = scores.to(device)
    indices = selection.indices
    if not isinstance(indices, Tensor) or indices.ndim != 1 or indices.dtype != torch.long:
        raise PrunerError(f"{prefix}: indices must be a LongTensor [k], got {_described(indices)}")
    if indices.device.type == "meta":
        raise PrunerError(f"{prefix}: indices are on the meta device, which holds no data: make them on {device}")
    if exact and indices.numel() != k:
        raise PrunerError(f"{prefix}: returned {indices.numel()} indices, but the budget is exactly {k} of {n}")
    if selection.n != n:
        raise PrunerError(f"{prefix}: says n={selection.n}, but there are {n} visual tokens")
    if selection.merge is not None:
        _check_merge_shape(selection.merge, prefix)
    return replace(selection, indices=indices.to(device), scores=scores)


def _check_merge_shape(merge: Merge, prefix: str) -> None:
    for name, kind in (("source", "LongTensor"), ("destination", "LongTensor"), ("weight", "tensor of floats")):
        part = getattr(merge, name)
        if not isinstance(part, Tensor) or part.ndim != 1 or (kind == "LongTensor" and part.dtype != torch.long):
            raise PrunerError(f"{prefix}: merge.{name} must be a {kind} [m], got {_described(part)}")
    if len({merge.source.numel(), merge.destination.numel(), merge.weight.numel()}) != 1:
        raise PrunerError(f"{prefix}: merge.source, merge.destination and merge.weight differ in length")


def _described(value: Any) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _check_values(selection: Selection, prefix: str) -> None:
    """Raises where the values of a selection that has the right shape are wrong; waits for the device."""
    indices, scores, n = selection.indices, selection.scores, selection.n
    nan, outside, unordered, source, slot, weight = _wrong_values([selection]).tolist()
    if scores is not None and nan:
        raise PrunerError(f"{prefix}: {int(scores.isnan().sum())} of {n} scores are NaN")
    if outside:
        raise PrunerError(f"{prefix}: indices reach {indices.min()}..{indices.max()}, allowed 0..{n - 1}")
    if unordered:
        raise PrunerError(f"{prefix}: indices must be ascending, without duplicates: end with indices.sort().values")
    if source:
        raise PrunerError(f"{prefix}: merge.source leaves the rows 0..{n - 1}")
    if slot:
        raise PrunerError(f"{prefix}: merge.destination leaves the kept slots 0..{selection.k - 1}")
    if weight:
        raise PrunerError(f"{prefix}: merge.weight must sum to 1 over each destination")


def _wrong_values(selections: Sequence[Selection]) -> Tensor:
    """[6] bool on the device, whether any selection has: NaN scores, indices that are out of range, or that do not
    ascend; and in its merge sources out of range, destinations out of range, weights that do not sum to 1.

    All images together, in a number of operations that does not grow with them.
    """
    indices, scores = [s.indices for s in selections], [s.scores for s in selections if s.scores is not None]
    sizes = [selection.n for selection in selections]
    starts = list(itertools.accumulate(sizes[:-1], initial=0))
    every = joined(indices)
    fine = torch.zeros((), dtype=torch.bool, device=every.device)
    nan = joined(scores).isnan().any() if scores else fine
    outside = ((every < 0) | (every >= per_entry(sizes, indices))).any()
    # Numbered through all images, indices must ascend; with the range check that is ascending in each of them.
    unordered = ((every + per_entry(starts, indices)).diff() <= 0).any()
    merges = [(s, s.merge) for s in selections if s.merge is not None]
    return torch.stack((nan, outside, unordered, *(_wrong_merges(merges, every.device) if merges else (fine,) * 3)))


def _wrong_merges(merges: Sequence[tuple[Selection, Merge]], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Whether sources, destinations and weights are wrong in any merge."""
    sources = [merge.source.to(device) for _, merge in merges]
    slots = [merge.destination.to(device) for _, merge in merges]
    counts = [selection.k for selection, _ in merges]
    source, slot, count = joined(sources), joined(slots), per_entry(counts, slots)
    wrong_source = ((source < 0) | (source >= per_entry([s.n for s, _ in merges], sources))).any()
    wrong_slot = ((slot < 0) | (slot >= count)).any()
    # Clamped, so that a slot out of range, which is noted already, does not reach another image's sums.
    starts = list(itertools.accumulate(counts[:-1], initial=0))
    slot = slot.clamp(min=0).minimum(count - 1) + per_entry(starts, slots)
    weight = joined([merge.weight.to(device, torch.float32) for _, merge in merges])
    sums = torch.zeros(sum(counts), device=device).index_add(0, slot, weight)
    return wrong_source, wrong_slot, (~((sums[slot] - 1).abs() <= _TOLERANCE)).any()  # so that NaN is wrong
