"""The largest batch whose prompt and new tokens the accelerator's memory holds, with and without pruning."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from gripvlm.api import pruned_run
from gripvlm.bench.measure import FULL, Setting, forbidden, generated
from gripvlm.errors import GripError

__all__ = ["FINE", "check_limit", "edge_of", "fits", "free", "largest", "tiled"]

FINE = 32
"""The largest batch is found exactly below twice this number, beyond to one part in so many."""
FAR, GUESSES = 8, 8
"""A guess goes no further than so many times what was held, and so many are made before the gap is halved."""


def check_limit(device: torch.device) -> None:
    """Raises GripError where no memory of the device's own would run out: on a CPU."""
    if device.type in ("cpu", "meta"):
        raise GripError(
            f"--fit looks for the largest batch that an accelerator's memory holds, but the model is on the "
            f"{device.type}, where there is no such limit to find: leave --fit out, or type --device cuda"
        )


def largest(
    holds: Callable[[int], bool], most: int, start: int = 1, edge: Callable[[], float | None] = lambda: None
) -> tuple[int, int | None]:
    """(the largest size from 1 to `most` that was seen to hold, the smallest seen not to), by doubling, then bisection.

    0 where none does, None where `most` does. In the end the two differ by 1, or by at most one part in `FINE`.

    Args:
        holds: true of small sizes and false of large ones.
        start: the first size tried.
        edge: the largest size that should hold, by what was tried so far; None where nothing tells. Sizes around it are
            tried first.
    """
    good, bad, size, guesses = 0, None, min(start, most), GUESSES
    while True:
        if holds(size):
            good = size
        else:
            bad = size
        if good == most or (bad is not None and bad - good <= max(1, good // FINE)):
            return good, bad
        guess = edge() if good and guesses else None
        if guess is None:
            size = 2 * good if bad is None else (good + bad) // 2
        else:
            size, guesses = _around(guess, good, bad), guesses - 1
        size = min(size, most)


def _around(guess: float, good: int, bad: int | None) -> int:
    """The size to try next: a little below the guess, and where that is known to hold or not, the next beside it."""
    below = int(min(guess - guess / (2 * FINE), FAR * good))
    if below <= good:
        below = good + max(1, good // FINE)
    elif bad is not None and below >= bad:
        below = bad - max(1, bad // (FINE + 1))
    return below if bad is None else min(max(below, good + 1), bad - 1)


class _Peaks:
    """The memory that runs took at most, and where the device's would be full if it grew on like that."""

    def __init__(self, device: torch.device, allowed: float) -> None:
        self.device, self.allowed, self.told = device, allowed, device.type == "cuda"
        self.seen: list[tuple[int, int]] = []  # (batch, bytes)

    def begin(self) -> None:
        if self.told:
            torch.cuda.reset_peak_memory_stats(self.device)

    def end(self, batch: int) -> None:
        """Of a run that was held."""
        if self.told:
            self.seen.append((batch, torch.cuda.max_memory_allocated(self.device)))

    def edge(self) -> float | None:
        return edge_of(self.seen, self._limit()) if self.told else None

    def _limit(self) -> float:
        free, _ = torch.cuda.mem_get_info(self.device)
        return min(self.allowed, free + torch.cuda.memory_reserved(self.device))


def edge_of(seen: Sequence[tuple[int, int]], limit: float) -> float | None:
    """The batch that takes `limit` bytes, on the line through the two largest of (batch, bytes); None without one."""
    if len(seen) < 2:
        return None
    (a, low), (b, high) = sorted(seen)[-2:]
    return b + (limit - high) * (b - a) / (high - low) if high > low else None


def fits(
    model: Any,
    prompts: Callable[[int, int], Mapping[str, Any]],
    settings: Sequence[Setting],
    lengths: Iterable[int],
    new: int,
    most: int,
    told: Callable[[str], None] = lambda what: None,
    allowed: float = math.inf,
) -> Iterator[dict[str, Any]]:
    """A row for the unpruned model and each pruner and budget, one prompt length after the other.

    Args:
        model, prompts, lengths, new: as for `bench`; prompts of one sample are asked for and repeated.
        settings: as in `bench`; limits are left out.
        most: the largest batch tried.
        told: hears what is tried.
        allowed: bytes, where the process may take less than the device has (`set_per_process_memory_fraction`).

    Yields:
        {"prompt", "kind", "setting", "pruner", "keep", "most", "fits", "fails", "to_full"}; docs/bench.md says what
        each means.
    """
    for length in lengths:
        one, full, known = prompts(1, length), 0, False
        for setting in settings:
            if setting.kind == "limit":
                continue

            peaks = _Peaks(model.device, allowed)

            def holds(
                batch: int, setting: Setting = setting, one: Mapping[str, Any] = one, peaks: _Peaks = peaks
            ) -> bool:
                told(f"fit {setting.name}: {batch}")
                return _holds(model, one, batch, setting, new, peaks)

            good, bad = largest(holds, most, max(1, full), peaks.edge)  # pruned, as many fit as unpruned, or more
            if setting == FULL:
                full, known = good, bad is not None
            yield {
                "prompt": length,
                "kind": setting.kind,
                "setting": setting.name,
                "pruner": setting.spec or None,
                "keep": None if setting.keep is None else setting.keep.plain,
                "most": most,
                "fits": good,
                "fails": bad,
                "to_full": good / full if full and known and bad is not None else None,
            }


def tiled(inputs: Mapping[str, Any], batch: int) -> dict[str, Any]:
    """The inputs of one prompt, so many times: all that processors return of a batch is joined in the first axis."""
    return {
        name: value.repeat(batch, *[1] * (value.ndim - 1)) if isinstance(value, Tensor) else value
        for name, value in inputs.items()
    }


def free(model: Any) -> None:
    """Hands memory that no tensor holds back to the device."""
    gc.collect()
    memory: Any = getattr(torch, model.device.type, None)
    if hasattr(memory, "empty_cache"):
        memory.empty_cache()


def _holds(model: Any, one: Mapping[str, Any], batch: int, setting: Setting, new: int, peaks: _Peaks) -> bool:
    """Whether the memory holds a run of so many prompts."""
    free(model)  # what the run before left in pieces
    peaks.begin()
    try:
        _run(model, tiled(one, batch), setting, new)
    except torch.OutOfMemoryError:
        return False
    peaks.end(batch)
    return True


@torch.no_grad()
def _run(model: Any, inputs: Mapping[str, Any], setting: Setting, new: int) -> None:
    """All that a user's call would do: encoding, pruning, the prompt, `new` tokens."""
    with ExitStack() as stack:
        arguments = dict(inputs)
        if setting.pruner is not None:
            run = pruned_run(model, inputs, setting.pruner, setting.keep)
            arguments, _ = stack.enter_context(run)
        generated(model, arguments, new, forbidden(model))
