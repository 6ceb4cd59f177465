"""Whole-number shares of a budget, for pruners that split it among images, tiles or windows."""

from __future__ import annotations

from collections.abc import Sequence


def apportion(total: int, weights: Sequence[float], caps: Sequence[int], least: int = 1) -> list[int]:
    """Counts with sum `total`, least <= count_i <= caps_i, near total x weight_i / sum of weights.

    Each gets its share rounded down, at least `least` and at most its cap. What is left over goes
    to those with room, again by weight, and single ones to the heaviest first; what `least` took too
    much is taken back one at a time from the largest count. Ties go to the lower index. Weights that
    sum to 0 count as equal.

    Needs len(caps) x least <= total <= sum of caps.
    """
    wish = list(weights) if sum(weights) > 0 else [1.0] * len(caps)
    counts = [min(cap, max(least, int(total * w / sum(wish)))) for w, cap in zip(wish, caps, strict=True)]
    heavy = sorted(range(len(caps)), key=lambda i: -wish[i])  # stable: the lower index first
    while (left := total - sum(counts)) > 0:
        room = [i for i in heavy if counts[i] < caps[i]]
        mass = sum(wish[i] for i in room)
        extra = {i: min(caps[i] - counts[i], int(left * wish[i] / mass)) if mass > 0 else 0 for i in room}
        # Shares below one token: single ones, the heaviest first.
        if not any(extra.values()):
            extra = dict.fromkeys(room[:left], 1)
        for i, more in extra.items():
            counts[i] += more
    # Only `least` can have given too much.
    while sum(counts) > total:
        counts[max(range(len(caps)), key=lambda i: counts[i])] -= 1
    return counts


def nearest(total: int, wished: Sequence[float], least: Sequence[int], most: Sequence[int]) -> list[int]:
    """Counts with sum `total` and least_i <= count_i <= most_i, each as near to what is wished as that allows.

    Wishes are rounded, halves up; then single ones go to (come from) where most (least) is lacking, ties to the
    lower index. Needs sum of least <= total <= sum of most.
    """
    counts = [min(high, max(low, int(w + 0.5))) for w, low, high in zip(wished, least, most, strict=True)]
    while over := sum(counts) - total:
        step = -1 if over > 0 else 1
        room = [i for i, count in enumerate(counts) if least[i] <= count + step <= most[i]]
        counts[max(room, key=lambda i: step * (wished[i] - counts[i]))] += step
    return counts
