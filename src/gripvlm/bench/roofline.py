"""What the hardware can do, what a run counts, and a row of both: medians, ratios, shares of the roofline."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from gripvlm.utils.timing import device_time

PHASES = ("vision", "pruner", "overhead", "other", "prefill", "first_token", "decode", "whole")
"""Of a run: the first five and decode add up to whole; first_token is whole without decode."""
ADDED = ("pruner", "overhead", "other")
"""Phases that pruning adds before the prompt runs."""
COMPARED = ("vision", "prefill", "first_token", "decode", "whole")


@dataclass(frozen=True)
class Machine:
    """The two numbers of a roofline.

    Attributes:
        flops: a second, of the fastest of several products of two square matrices in the model's dtype.
        bandwidth: bytes a second, read and written together, of the fastest of several copies.
        side: of the matrices.
        copied: bytes that each copy reads.
    """

    flops: float
    bandwidth: float
    side: int
    copied: int

    def seconds(self, flops: float, moved: float) -> float:
        """The least time for so many FLOPs and bytes: max(flops / rate, bytes / bandwidth), Williams et al. 2009."""
        return max(flops / self.flops, moved / self.bandwidth)


@dataclass(frozen=True)
class Weights:
    """Bytes of weights that a pass reads: the language model's layers and output head, and all that is not text."""

    language: int
    vision: int

    @classmethod
    def of(cls, model: Any) -> Weights:
        """Looking up embeddings reads a few rows only, so that table counts where it is the output head as well."""
        parts = [part for part in (model.get_decoder(), model.get_output_embeddings()) if part is not None]
        head = {id(p) for p in parts[1].parameters()} if len(parts) > 1 else set()
        table = {id(p) for p in model.get_input_embeddings().parameters()}
        text = {id(p): p.nbytes for part in parts for p in part.parameters() if id(p) not in table or id(p) in head}
        rest = [p.nbytes for p in model.parameters() if id(p) not in text and id(p) not in table]
        return cls(sum(text.values()), sum(rest))


@dataclass(frozen=True)
class Counts:
    """What is counted, not timed, of a setting's run of B samples.

    Attributes:
        flops: of vision (the encoder and projector alone), pruning (all that is added before the prompt runs; below
            zero where merging inside the tower saves more), prefill, decode, whole.
        kv_bytes: of the cache when the last token is decoded, all samples together.
        kept, total: visual tokens of all samples, averaged over the layers.
        tower: rows of all samples that the last blocks of the vision tower saw.
    """

    flops: dict[str, int]
    kv_bytes: int
    kept: float
    total: int
    tower: float

    def times(self, batch: int) -> Counts:
        """Of so many prompts alike: all that is counted grows with them."""
        flops = {part: batch * value for part, value in self.flops.items()}
        return Counts(flops, batch * self.kv_bytes, batch * self.kept, batch * self.total, batch * self.tower)


@dataclass
class Runs:
    """What one setting gave in one cell.

    Attributes:
        turns: turn -> seconds by phase.
        peak: bytes of accelerator memory at most.
        counts: of all its samples.
        failed: why there are no numbers, or empty.
        unreached: it failed because the pruner, or these images, do not reach the budget.
    """

    turns: dict[int, dict[str, float]] = field(default_factory=dict)
    peak: int | None = None
    counts: Counts | None = None
    failed: str = ""
    unreached: bool = False


def measured(device: torch.device, dtype: torch.dtype, seconds: float = 0.5) -> Machine:
    """The machine's rates, each from repeats over about `seconds`."""
    # so large that starting the kernel is nothing beside it, so small that a CPU repeats it often enough
    large = device.type != "cpu"
    side, count = (8192, 2**28) if large else (768, 2**25)
    matrix = torch.randn(side, side, device=device).to(dtype)
    out = torch.empty_like(matrix)
    source = torch.zeros(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    product = _fastest(lambda: torch.mm(matrix, matrix, out=out), device, seconds)
    copy = _fastest(lambda: target.copy_(source), device, seconds)
    # a multiply-add is two operations; a copy reads each byte and writes it
    return Machine(2 * side**3 / product, 2 * count / copy, side, count)


def _fastest(work: Callable[[], Any], device: torch.device, seconds: float) -> float:
    work()  # the first call also allocates and chooses a kernel
    # the fastest repeat, not the median: what slows one down is another process, not the hardware
    best, ends = float("inf"), device_time(device) + seconds
    while (began := device_time(device)) < ends:
        work()
        best = min(best, device_time(device) - began)
    return best


def flop_counter() -> FlopCounterMode:
    """torch's FlopCounterMode, with attention counted on a CPU too, and where heads share keys.

    It counts matrix products, convolutions and attention, two for a multiply-add; not sorts, norms and the like.
    """
    # torch leaves the CPU's kernel out, and refuses keys that have fewer heads than queries
    names = ("flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention")
    kernels = [getattr(torch.ops.aten, f"_scaled_dot_product_{name}", None) for name in names]
    custom = {kernel: _attention_flops for kernel in kernels if kernel is not None}
    return FlopCounterMode(display=False, custom_mapping=custom)


def _attention_flops(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **options: Any) -> int:
    """2 x B x H x Lq x Lk x (d + dv): both products of attention, the masked half of a causal one included."""
    batch, heads, length, width = query
    return int(2 * batch * heads * length * key[-2] * (width + value[-1]))


# --- a row ------------------------------------------------------------------------------------------------------------


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """{"median", "low", "high"}, the last two quartiles (of the values themselves); None of no values."""
    if not values:
        return None
    # inclusive: a handful of turns says nothing about times beyond its own least and most
    low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {"median": statistics.median(values), "low": low, "high": high}


def row(
    runs: Runs,
    full: Runs,
    limit: Runs | None,
    tower_limit: Runs | None,
    shape: tuple[int, int],
    hardware: tuple[Machine, Weights],
) -> dict[str, Any]:
    """All numbers of a setting.

    Args:
        runs, full, limit, tower_limit: of the setting, the unpruned model, the model that received so few tokens, and
            the same model behind a vision tower that had so few patches; None where the setting has no such limit.
        shape: (B, new tokens generated).
        hardware: the machine, and the model's weights.
    """
    if runs.failed or runs.counts is None:
        return {"failed": runs.failed, "unreached": runs.unreached}
    (batch, new), counts, turns = shape, runs.counts, list(runs.turns.values())
    seconds = {phase: spread([turn[phase] for turn in turns]) for phase in PHASES}
    seconds["decode_token"] = spread([turn["decode"] / (new - 1) for turn in turns])
    added = _by_turn(runs, full, ADDED, "prefill")
    return {
        "failed": None,
        "turns": len(turns),
        "visual_tokens": counts.total / batch,
        "kept": counts.kept / batch,
        "tower_kept": counts.tower / batch,
        "seconds": seconds,
        "runs": [{"turn": turn} | values for turn, values in runs.turns.items()],
        "flops": counts.flops,
        "kv_bytes": counts.kv_bytes,
        "peak_memory": runs.peak,
        "roofline": _shares(counts, seconds, new, hardware),
        "to_full": _ratios(runs, full) | {"added": added},
        "to_limit": None if limit is None else _ratios(runs, limit),
        "to_tower_limit": None if tower_limit is None else _ratios(runs, tower_limit),
        "between": None if limit is None or tower_limit is None else _between(runs, limit, tower_limit),
    }


def _between(runs: Runs, limit: Runs, tower_limit: Runs) -> dict[str, dict[str, float] | None]:
    """Where the setting stands between the two limits, turn by turn: 0 is at the limit behind the encoder, 1 at that of
    a tower with few patches."""
    turns = [turn for turn in runs.turns if turn in limit.turns and turn in tower_limit.turns]
    places = {}
    for phase in ("vision", "whole"):
        times = [(runs.turns[t][phase], limit.turns[t][phase], tower_limit.turns[t][phase]) for t in turns]
        places[phase] = spread([(high - own) / (high - low) for own, high, low in times if high != low])
    return places


def _shares(
    counts: Counts, seconds: Mapping[str, Any], new: int, hardware: tuple[Machine, Weights]
) -> dict[str, float]:
    """The least time / the measured time of each phase that the roofline speaks about."""
    machine, weights = hardware
    # each new token reads all weights and the cache again
    token = machine.seconds(counts.flops["decode"] / (new - 1), weights.language + counts.kv_bytes)
    least = {
        "vision": machine.seconds(counts.flops["vision"], weights.vision),
        "prefill": machine.seconds(counts.flops["prefill"], weights.language),
        "decode": (new - 1) * token,
    }
    return {phase: value / seconds[phase]["median"] for phase, value in least.items()}


def _by_turn(runs: Runs, other: Runs, phases: Sequence[str], of: str) -> dict[str, float] | None:
    """Time of some phases / the other's time of one, turn by turn, so that a drift of the machine's speed cancels."""
    both = [turn for turn in runs.turns if turn in other.turns]
    return spread([sum(runs.turns[turn][phase] for phase in phases) / other.turns[turn][of] for turn in both])


def _ratios(runs: Runs, other: Runs) -> dict[str, Any]:
    """Time / the other's time, then the same of what is counted: FLOPs, bytes of the cache, peak memory."""
    ratios: dict[str, Any] = {phase: _by_turn(runs, other, [phase], phase) for phase in COMPARED}
    counts, base = runs.counts, other.counts
    if counts is None or base is None:  # the other did not fit into memory
        return ratios
    ratios |= {f"flops_{part}": counts.flops[part] / base.flops[part] for part in ("prefill", "whole")}
    ratios["kv_bytes"] = counts.kv_bytes / base.kv_bytes
    ratios["peak_memory"] = runs.peak / other.peak if runs.peak and other.peak else None
    return ratios
