"""The largest batch whose prompts and new tokens the accelerator's memory holds, with and without pruning."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gripvlm.api import pruned_run
from gripvlm.bench.measure import FULL, Setting, forbidden, generated
from gripvlm.errors import GripError

FINE = 32
"""The largest batch is found exactly below twice this number, beyond to one part in so many."""


def check_limit(device: torch.device) -> None:
    """Raises GripError where no memory of the device's own would run out: on a CPU."""
    if device.type in ("cpu", "meta"):
        raise GripError(
            f"--fit looks for the largest batch that an accelerator's memory holds, but the model is on the "
            f"{device.type}, where there is no such limit to find: leave --fit out, or type --device cuda"
        )


def largest(holds: Callable[[int], bool], most: int, start: int = 1) -> tuple[int, int | None]:
    """(the largest size from 1 to `most` that was seen to hold, the smallest seen not to), by doubling, then bisection.

    0 where none does, None where `most` does. In the end the two differ by 1, or by at most one part in `FINE`.
    accelerate's `find_executable_batch_size` only shrinks, so it stops at some size that fits, not at the largest.

    Args:
        holds: true of small sizes and false of large ones.
        start: the first size tried.
    """
    good, bad, size = 0, None, min(start, most)
    while True:
        if holds(size):
            good = size
        else:
            bad = size
        if good == most or (bad is not None and bad - good <= max(1, good // FINE)):
            return good, bad
        size = min(2 * good, most) if bad is None else (good + bad) // 2


def fits(
    model: PreTrainedModel,
    prompts: Callable[[int, int], Mapping[str, Any]],
    settings: Sequence[Setting],
    lengths: Iterable[int],
    new: int,
    most: int,
    report: Callable[[str], None] = lambda text: None,
) -> Iterator[dict[str, Any]]:
    """A row for the unpruned model and each pruner and budget, one prompt length after the other.

    Args:
        model, prompts, lengths, new: as for `bench`; one prompt is made, and repeated.
        settings: as in `bench`; limits and smaller pictures are left out.
        most: the largest batch tried.
        report: called with each batch that is tried.

    Yields:
        {"prompt", "kind", "setting", "pruner", "keep", "most", "fits", "fails", "to_full"}; docs/bench.md says what
        each means.
    """
    for length in lengths:
        inputs, full, known = prompts(1, length), 0, False
        for setting in settings:
            if setting.kind in ("limit", "tower_limit", "downsample"):
                continue

            def holds(batch: int, setting: Setting = setting, inputs: Mapping[str, Any] = inputs) -> bool:
                report(f"fit {setting.name}: {batch}")
                free(model)  # what the run before left in pieces
                try:
                    _run(model, tiled(inputs, batch), setting, new)
                except torch.OutOfMemoryError:  # any other error is a bug, not an edge
                    return False
                return True

            # pruned, as many fit as unpruned, or more: the search starts where the unpruned one ended
            good, bad = largest(holds, most, max(1, full))
            if setting == FULL:
                full, known = good, bad is not None
            # a search that ended at its bound knows no edge, so there is nothing to divide
            ratio = good / full if full and known and bad is not None else None
            sizes = {"most": most, "fits": good, "fails": bad, "to_full": ratio}
            yield {"prompt": length, **setting.columns, **sizes}


def tiled(inputs: Mapping[str, Any], batch: int) -> dict[str, Any]:
    """The inputs of one prompt, so many times: all that processors return of a batch is joined in the first axis."""
    return {
        name: value.repeat(batch, *[1] * (value.ndim - 1)) if isinstance(value, Tensor) else value
        for name, value in inputs.items()
    }


def free(model: PreTrainedModel) -> None:
    """Hands memory that no tensor holds back to the device."""
    gc.collect()
    memory: Any = getattr(torch, model.device.type, None)
    if hasattr(memory, "empty_cache"):
        memory.empty_cache()


@torch.no_grad()
def _run(model: PreTrainedModel, inputs: Mapping[str, Any], setting: Setting, new: int) -> None:
    """All that a user's call would do: encoding, pruning, the prompt, `new` tokens."""
    with ExitStack() as stack:
        arguments = dict(inputs)
        if setting.pruner is not None:
            arguments, _ = stack.enter_context(pruned_run(model, inputs, setting.pruner, setting.keep))
        generated(model, arguments, new, forbidden(model))
