"""What is said of one setting: medians with quartiles, ratios turn by turn, shares of the roofline."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from gripvlm.bench.machine import Machine, Weights
from gripvlm.bench.measure import PHASES, Runs

__all__ = ["row", "spread"]

COMPARED = ("vision", "prefill", "first_token", "decode", "whole")


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """{"median", "low", "high"}, the last two quartiles (of the values themselves); None of no values."""
    if not values:
        return None
    low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {"median": statistics.median(values), "low": low, "high": high}


def row(
    found: Runs, full: Runs, limit: Runs | None, new: int, batch: int, machine: Machine, weights: Weights
) -> dict[str, Any]:
    """All numbers of a setting.

    Args:
        found, full, limit: runs of the setting, the unpruned model and the model that received so few tokens.
        new: tokens generated.
        batch: B.
    """
    if found.failed or found.counts is None:
        return {"failed": found.failed, "unreached": found.unreached}
    counts, taken = found.counts, list(found.turns.values())
    seconds = {phase: spread([turn[phase] for turn in taken]) for phase in PHASES}
    seconds["decode_token"] = spread([turn["decode"] / (new - 1) for turn in taken])
    least = {
        "vision": machine.seconds(counts.flops["vision"], weights.vision),
        "prefill": machine.seconds(counts.flops["prefill"], weights.language),
        "decode": (new - 1) * machine.seconds(counts.flops["decode"] / (new - 1), weights.language + counts.kv_bytes),
    }
    return {
        "failed": None,
        "turns": len(taken),
        "visual_tokens": counts.total / batch,
        "kept": counts.kept / batch,
        "seconds": seconds,
        "runs": [{"turn": turn} | values for turn, values in found.turns.items()],
        "flops": counts.flops,
        "kv_bytes": counts.kv_bytes,
        "peak_memory": found.peak,
        "roofline": {phase: value / seconds[phase]["median"] for phase, value in least.items()},  # type: ignore[index]
        "to_full": _ratios(found, full) | {"added": _added(found, full), **_counted(found, full)},
        "to_limit": None if limit is None else _ratios(found, limit) | _counted(found, limit),
    }


def _ratios(found: Runs, other: Runs) -> dict[str, Any]:
    """Time / the other's time, turn by turn."""
    both = [turn for turn in found.turns if turn in other.turns]
    return {phase: spread([found.turns[t][phase] / other.turns[t][phase] for t in both]) for phase in COMPARED}


def _added(found: Runs, full: Runs) -> dict[str, float] | None:
    """What pruning adds before the prompt runs (pruner, overhead, other), as a share of the unpruned prefill."""
    parts = ("pruner", "overhead", "other")
    both = [turn for turn in found.turns if turn in full.turns]
    return spread([sum(found.turns[t][part] for part in parts) / full.turns[t]["prefill"] for t in both])


def _counted(found: Runs, other: Runs) -> dict[str, float | None]:
    """Ratios of what is counted: FLOPs of prefill and of all, bytes of the cache, peak memory."""
    if found.counts is None or other.counts is None:
        return {}
    mine, theirs = found.counts, other.counts
    return {
        "flops_prefill": mine.flops["prefill"] / theirs.flops["prefill"],
        "flops_whole": mine.flops["whole"] / theirs.flops["whole"],
        "kv_bytes": mine.kv_bytes / theirs.kv_bytes,
        "peak_memory": found.peak / other.peak if found.peak and other.peak else None,
    }
