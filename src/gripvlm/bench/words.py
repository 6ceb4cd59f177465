"""What a user should take from the numbers, in sentences that follow from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["FAR", "fit_sentences", "sentences"]

FAR = 0.2
"""Below this share of the roofline a phase waits for something else than arithmetic or memory."""

_BOUNDS = {
    "vision": (
        "the vision encoder",
        "No pruning after it makes it shorter: use smaller pictures, or encode a picture once for several questions "
        "(gripvlm.encode).",
    ),
    "decode": (
        "decoding",
        "Each new token reads all weights whatever was pruned: larger batches or shorter answers help.",
    ),
    "overhead": (
        "the overhead of pruning itself",
        "Take a cheaper pruner, or a larger batch over which it is spread.",
    ),
    "prefill": ("the language model's prefill", "Keeping fewer visual tokens makes it shorter still."),
}


def sentences(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A few sentences for each batch size and prompt length: what is gained, and what bounds the time now.

    They speak of the setting with the smallest budget, and there of the pruner with the shortest median time. A gain or
    a loss is said only where the middle half of the turns (between the quartiles) agrees.

    Args:
        rows: as `bench` returns them.
    """
    found = []
    for cell in dict.fromkeys((row["batch"], row["prompt"]) for row in rows):
        mine = [row for row in rows if (row["batch"], row["prompt"]) == cell]
        where = f"Batch {cell[0]}, {cell[1]} text tokens"
        left = [row for row in mine if row.get("unreached")]
        found += [f"{where}: {row['setting']} was not measured: {row['failed']}." for row in left]
        failed = [row["setting"] for row in mine if row["failed"] and row not in left]
        if failed:
            found.append(f"{where}: the device's memory does not hold {', '.join(failed)}.")
        pruned = [row for row in mine if row["kind"] == "pruned" and not row["failed"]]
        if not pruned:
            found.append(f"{where}: no pruned run was measured.")
            continue
        fewest = min(pruned, key=lambda row: row["kept"])["keep"]  # averages over layers are met to half a token
        best = min((row for row in pruned if row["keep"] == fewest), key=lambda row: row["seconds"]["whole"]["median"])
        found.append(f"{where}: {_gain(best)}{_limit(best)} {_bound(best)}")
    return found


def fit_sentences(fits: Sequence[Mapping[str, Any]], memory: str = "the device's memory") -> list[str]:
    """For each prompt length, how many prompts the memory holds at once unpruned and with each pruner and budget.

    Args:
        fits: as `bench` returns them.
        memory: which holds them.
    """
    found = []
    for length in dict.fromkeys(row["prompt"] for row in fits):
        mine = [row for row in fits if row["prompt"] == length]
        said = "; ".join(f"{_held(row)} {_times(row)}" for row in mine)
        found.append(f"{length} text tokens: the largest batch that {memory} holds is {said}.")
    return found


def _held(row: Mapping[str, Any]) -> str:
    """`137`, or what is known where the search ended at its bound."""
    if row["fails"] is None:
        return f"at least {row['fits']} (--fit {row['most']} looks no further)"
    return str(row["fits"]) if row["fits"] else "none, not even 1,"


def _times(row: Mapping[str, Any]) -> str:
    if row["kind"] == "full":
        return "unpruned"
    more = "" if row["to_full"] is None else f" ({row['to_full']:.2f} times the unpruned one)"
    return f"with {row['setting']}{more}"


def _gain(row: Mapping[str, Any]) -> str:
    what = f"{row['pruner']} keeps {row['kept']:g} of {row['visual_tokens']:g} visual tokens a prompt"
    ratios = row["to_full"]
    whole = ratios.get("whole")
    if whole is None:
        return f"{what}; the unpruned model was not measured, so there is no ratio."
    said = f"(quartiles {whole['low']:.2f} to {whole['high']:.2f})"
    if whole["high"] < 1:
        text = f"takes {whole['median']:.2f} of the unpruned time end to end {said}: {1 / whole['median']:.2f}x as fast"
    elif whole["low"] > 1:
        text = f"takes {whole['median']:.2f} times the unpruned time end to end {said}: pruning makes it slower"
    else:
        text = f"and takes {whole['median']:.2f} of the unpruned time end to end {said}: no difference these turns show"
    text = text if text.startswith("and ") else f"and {text}"
    first, added = ratios["first_token"]["median"], ratios["added"]["median"]
    return (
        f"{what} {text}; the first token comes after {first:.2f} of its unpruned time, the prefill alone takes "
        f"{ratios['prefill']['median']:.2f}, and the cache holds {ratios['kv_bytes']:.2f} of the bytes. Pruning itself "
        f"costs {100 * added:.1f} % of the unpruned prefill."
    )


def _limit(row: Mapping[str, Any]) -> str:
    whole = (row["to_limit"] or {}).get("whole")
    if whole is None:
        return ""
    return f" The limit, a model that received so few tokens for nothing, takes {1 / whole['median']:.2f} of that time."


def _bound(row: Mapping[str, Any]) -> str:
    """The longest part of the time now, what helps against it, and whether arithmetic or memory fill it."""
    seconds = {name: value["median"] for name, value in row["seconds"].items() if value is not None}
    parts = {name: seconds[name] for name in ("vision", "prefill", "decode")}
    parts["overhead"] = sum(seconds[name] for name in ("pruner", "overhead", "other"))
    longest = max(parts, key=lambda name: parts[name])
    name, advice = _BOUNDS[longest]
    shares = ", ".join(
        f"{_BOUNDS[part][0]} {100 * parts[part] / sum(parts.values()):.0f} %"
        for part in sorted(parts, key=lambda part: -parts[part])
    )
    reached = row["roofline"].get(longest)
    far = reached is not None and reached < FAR
    text = f"What bounds you now is {name} ({shares})."
    if not (far and longest == "prefill"):  # fewer tokens would not help there
        text += f" {advice}"
    if far:
        share = f"{100 * reached:.0f} %" if reached >= 0.01 else "less than 1 %"
        text += (
            f" It runs at {share} of what this machine's matrix rate and bandwidth allow; so far below, it is mostly "
            "the starting of many small kernels that takes the time, not arithmetic."
        )
    return text
