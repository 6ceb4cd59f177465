"""What pruners return, checked: shapes at once, values without making an accelerator wait."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gripvlm.errors import InputError, PrunerError
from gripvlm.pruners import Pruner
from gripvlm.types import Selection, VisualTokens
from gripvlm.utils.batching import in_one_storage, onto

__all__ = ["DeferredChecks", "checked_features", "checked_selection", "checked_selections"]

TOLERANCE = 1e-3
"""Of the sum of weights that go to one kept row."""


class DeferredChecks:
    """Whether values are as they must be, asked of a device and read later, all in one go; on a CPU at once."""

    def __init__(self) -> None:
        self._open: list[tuple[Tensor, Callable[[], object]]] = []

    def add(self, wrong: Tensor, look: Callable[[], object]) -> None:
        """`wrong` is a bool of no dimensions; where it is True, `look` finds what is wrong and raises."""
        self._open.append((wrong, look))
        if wrong.device.type == "cpu":
            self.settle()

    def settle(self) -> None:
        """Waits for the device, and raises for the first that is wrong."""
        now, self._open = self._open, []
        if not now:
            return
        device = now[0][0].device
        for wrong, (_, look) in zip(torch.stack([flag.to(device) for flag, _ in now]).tolist(), now, strict=True):
            if wrong:
                look()

    @contextmanager
    def at_the_end(self) -> Iterator[None]:
        """Settles when the block ends, or fails."""
        with self.as_cause():
            yield
        self.settle()

    @contextmanager
    def as_cause(self) -> Iterator[None]:
        """Where the block fails: what is wrong here is the cause and is raised instead; else the block's own error."""
        try:
            yield
        except Exception:
            self.settle()
            raise


def checked_features(images: Sequence[VisualTokens], deferred: DeferredChecks) -> None:
    """Queues a check that features are not NaN."""
    rows = [tokens.features.detach() for tokens in images]
    found = in_one_storage(rows)
    sums = [found[0].sum(dtype=torch.float32)] if found else [one.sum(dtype=torch.float32) for one in rows]

    def look() -> None:
        for tokens in images:
            if bool(tokens.features.isnan().any()):
                raise InputError(
                    f"the vision encoder made NaN of image {tokens.image} of sample {tokens.sample}: look at its "
                    "pixels (a corrupt image), or load the model in bfloat16 or float32, if float16 overflows"
                )

    deferred.add(torch.stack(sums).isnan().any(), look)


def checked_selections(
    pruner: Pruner, raw: Sequence[Any], images: Sequence[VisualTokens], deferred: DeferredChecks
) -> list[Selection]:
    """One selection an image, on its device; what its values are, is in `deferred`.

    Raises:
        PrunerError: it names the pruner and the image.
    """
    if len(raw) != len(images):
        raise PrunerError(f"pruner {pruner.name!r} returned {len(raw)} selections for {len(images)} images")
    names = [f"image {tokens.image} of sample {tokens.sample}" for tokens in images]
    found = [
        _shaped(pruner.name, selection, tokens.n, tokens.keep, tokens.features.device, where)
        for selection, tokens, where in zip(raw, images, names, strict=True)
    ]

    def look() -> None:
        for selection, where in zip(found, names, strict=True):
            _valued(pruner.name, selection, where)

    deferred.add(_odd(found), look)
    if not all(selection.sound for selection in found):
        deferred.settle()  # rows that are not there must not be asked of an accelerator
    return found


def _odd(found: Sequence[Selection]) -> Tensor:
    """A bool: whether any selection has indices out of range or order, NaN scores, or a wrong merge."""
    device = found[0].indices.device
    indices, spread = _along([one.indices for one in found], [(one.n, 0) for one in found], device)
    odd = ((indices < 0) | (indices >= spread[0])).any() | ((indices + spread[2]).diff() <= 0).any()
    if scores := [one.scores.to(device) for one in found if one.scores is not None]:
        odd = odd | torch.cat(scores).isnan().any()
    slots = itertools.accumulate((one.k for one in found), initial=0)
    merging = [(one, one.merge, slot) for one, slot in zip(found, slots, strict=False) if one.merge is not None]
    if not merging:
        return odd
    source, spread = _along([merge.source for _, merge, _ in merging], [(one.n, 0) for one, *_ in merging], device)
    odd = odd | ((source < 0) | (source >= spread[0])).any()
    own = [(one.k, slot) for one, _, slot in merging]
    slot, spread = _along([merge.destination for _, merge, _ in merging], own, device)
    odd = odd | ((slot < 0) | (slot >= spread[0])).any()
    slot = slot.clamp(min=0).minimum(spread[0] - 1) + spread[1]
    weight = torch.cat([merge.weight.to(device, torch.float32) for _, merge, _ in merging])
    sums = torch.zeros(sum(one.k for one in found), device=device).index_add(0, slot, weight)
    return odd | (~((sums[slot] - 1).abs() <= TOLERANCE)).any()


def _along(parts: Sequence[Tensor], numbers: Sequence[tuple[int, int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """[M] all parts [m_i] in one line; [3, M] beside each entry its part's two numbers, and the first summed up."""
    starts = itertools.accumulate((first for first, _ in numbers), initial=0)
    told = np.array([(*pair, start) for pair, start in zip(numbers, starts, strict=False)], dtype=np.int64).T
    spread = np.repeat(told, [len(part) for part in parts], axis=1)
    return torch.cat([part.to(device) for part in parts]), onto(spread, device)


def checked_selection(name: str, selection: Any, n: int, k: int, device: torch.device, where: str) -> Selection:
    """The selection of k of n rows, on `device`, or a `PrunerError` that names the pruner and `where`."""
    found = _shaped(name, selection, n, k, device, where)
    _valued(name, found, where)
    return found


def _shaped(name: str, selection: Any, n: int, k: int, device: torch.device, where: str) -> Selection:
    """The selection on `device`, of the right types and sizes."""
    wrong = partial(_wrong, name, where)
    if not isinstance(selection, Selection):
        raise wrong(f"select() returned a {type(selection).__name__}, expected a Selection")
    scores = selection.scores
    if scores is not None:
        if not isinstance(scores, Tensor) or scores.shape != (n,):
            got: object = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise wrong(f"scores must be a tensor ({n},), got {got}")
        scores = scores.to(device)
    indices = selection.indices
    if not isinstance(indices, Tensor) or indices.ndim != 1 or indices.dtype != torch.long:
        got = f"{indices.dtype} {tuple(indices.shape)}" if isinstance(indices, Tensor) else indices
        raise wrong(f"indices must be a LongTensor [k], got {got}")
    if indices.device.type == "meta":
        raise wrong(f"indices are on the meta device, which holds no data: make them on {device}")
    if indices.numel() != k:
        raise wrong(f"returned {indices.numel()} indices, but the budget is exactly {k} of {n}")
    if selection.n != n:
        raise wrong(f"says n={selection.n}, but there are {n} visual tokens")
    merge = selection.merge
    if merge is not None:
        for part, whole in (("source", True), ("destination", True), ("weight", False)):
            one = getattr(merge, part)
            if not isinstance(one, Tensor) or one.ndim != 1 or (whole and one.dtype != torch.long):
                got = f"{one.dtype} {tuple(one.shape)}" if isinstance(one, Tensor) else type(one).__name__
                raise wrong(f"merge.{part} must be a {'LongTensor' if whole else 'tensor of floats'} [m], got {got}")
        if len({merge.source.numel(), merge.destination.numel(), merge.weight.numel()}) != 1:
            raise wrong("merge.source, merge.destination and merge.weight differ in length")
    return replace(selection, indices=indices.to(device), scores=scores)


def _valued(name: str, selection: Selection, where: str) -> None:
    """Raises where the values of a selection that has the right shape are wrong; waits for the device."""
    wrong, n, k = partial(_wrong, name, where), selection.n, selection.k
    scores, indices, merge = selection.scores, selection.indices, selection.merge
    if scores is not None and bool(scores.isnan().any()):
        raise wrong(f"{int(scores.isnan().sum())} of {n} scores are NaN")
    if int(indices.min()) < 0 or int(indices.max()) >= n:
        raise wrong(f"indices reach {int(indices.min())}..{int(indices.max())}, allowed 0..{n - 1}")
    if bool((indices.diff() <= 0).any()):
        raise wrong("indices must be ascending, without duplicates: end with indices.sort().values")
    if merge is None:
        return
    source, destination = merge.source.to(indices.device), merge.destination.to(indices.device)
    if bool(((source < 0) | (source >= n)).any()):
        raise wrong(f"merge.source leaves the rows 0..{n - 1}")
    if bool(((destination < 0) | (destination >= k)).any()):
        raise wrong(f"merge.destination leaves the kept slots 0..{k - 1}")
    sums = torch.zeros(k, device=indices.device).index_add(
        0, destination, merge.weight.to(indices.device, torch.float32)
    )
    if not bool(((sums[destination] - 1).abs() <= TOLERANCE).all()):
        raise wrong("merge.weight must sum to 1 over each destination")


def _wrong(name: str, where: str, what: str) -> PrunerError:
    return PrunerError(f"pruner {name!r} on {where}: {what}")
