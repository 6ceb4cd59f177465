"""Schedules of pruners inside the language model: how many tokens of an image each layer sees, for an average `keep`.

A schedule is layer -> count from there on; all n tokens before its first entry.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from gripvlm.errors import BudgetError


def average_tokens(n: int, schedule: Mapping[int, int], num_layers: int) -> float:
    """Tokens paid for, averaged over the layers, of an image of n tokens."""
    total, count = 0, n
    for layer in range(num_layers):
        count = schedule.get(layer, count)
        total += count
    return total / num_layers


def one_layer_schedule(name: str, n: int, keep: int, num_layers: int, layer: int) -> dict[int, int]:
    """{layer: count}: all n tokens before `layer`, count = (L keep - layer n) / (L - layer) from it on, halves up.

    Raises:
        BudgetError: the layers before it alone cost more, or there is no such layer. `name` is the pruner's.
    """
    _check_layers(name, [layer], num_layers)
    # Whole numbers throughout, so that halves are rounded the same way everywhere.
    count = (2 * (num_layers * keep - layer * n) + (num_layers - layer)) // (2 * (num_layers - layer))
    if count < 1:
        raise _too_few(name, n, keep, num_layers, layer, least_keep(n, num_layers, layer))
    return {layer: count}


def least_keep(n: int, num_layers: int, layer: int) -> int:
    """The smallest `keep` that `one_layer_schedule` takes: one token is left from `layer` on."""
    # Where that schedule's count becomes 1, solved for `keep` and rounded up.
    return -(-(2 * layer * n + num_layers - layer) // (2 * num_layers))


def pyramid_schedule(name: str, n: int, keep: int, num_layers: int, drop_layers: Sequence[int]) -> dict[int, int]:
    """The same share of the tokens stays at each of several layers, such that the average is `keep`.

    Raises:
        BudgetError: the layers before the first one alone cost more, or there is no such layer.
    """
    layers = sorted(drop_layers)

    def counts_at(share: float) -> dict[int, int]:
        return {layer: max(1, round(n * share ** (i + 1))) for i, layer in enumerate(layers)}

    return _solved(name, n, keep, num_layers, layers, counts_at, 1.0)


def ratio_schedule(name: str, n: int, keep: int, num_layers: int, ratios: Mapping[int, float]) -> dict[int, int]:
    """Layer -> a count in proportion to its ratio, at least 1 and at most n, such that the average is `keep`.

    Ratios fall with the layers, the first above 0. Where n cuts the counts off, the last layers make up for it.

    Raises:
        BudgetError: as of `pyramid_schedule`.
    """
    layers = sorted(ratios)

    def counts_at(scale: float) -> dict[int, int]:
        return {layer: min(n, max(1, round(scale * ratios[layer]))) for layer in layers}

    return _solved(name, n, keep, num_layers, layers, counts_at, n / min(filter(None, ratios.values())))


def _solved(
    name: str,
    n: int,
    keep: int,
    num_layers: int,
    layers: Sequence[int],
    counts_at: Callable[[float], dict[int, int]],
    most: float,
) -> dict[int, int]:
    """The counts with average `keep`, of counts that grow with a number from 0 to `most`."""
    _check_layers(name, layers, num_layers)
    # The average grows with the number, so bisection finds it: 60 halvings exhaust a float.
    low, high = 0.0, most
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if average_tokens(n, counts_at(middle), num_layers) <= keep else (low, middle)
    counts = dict.fromkeys(layers, n) if keep == n else counts_at(low)
    # Rounding is made up for at the last layer first, where a token costs the fewest layers, then at those before.
    for i in reversed(range(len(layers))):
        span = [*layers, num_layers][i + 1] - layers[i]
        over = round((average_tokens(n, counts, num_layers) - keep) * num_layers / span)
        least = counts[layers[i + 1]] if i + 1 < len(layers) else 1
        ceiling = counts[layers[i - 1]] if i else n
        counts[layers[i]] = min(ceiling, max(least, counts[layers[i]] - over))
    if average_tokens(n, counts, num_layers) - keep > 0.5:
        least = math.ceil(average_tokens(n, dict.fromkeys(layers, 1), num_layers) - 0.5)
        raise _too_few(name, n, keep, num_layers, layers[0], least)
    return counts


def entering_tokens(n: int, keep: int, num_layers: int, layer: int, first: float) -> int:
    """Tokens that enter the language model where the input drops too: `first` x keep, and fewer from `layer` on.

    For large budgets all n enter; for small ones fewer than `first` x keep, so that one is left from `layer` on.
    """
    # All layers together pay num_layers x keep, and those from `layer` on at least one token each.
    most = (num_layers * keep - (num_layers - layer)) // layer
    return max(keep, min(n, int(first * keep + 0.5), most))


def same_depths(published: Sequence[int], of: int, num_layers: int) -> list[int]:
    """Layers published for a model of `of` layers, at the same relative depth of one of `num_layers`.

    round(layer x num_layers / of), halves up, at least 1 and ascending; those past the last layer fall away.
    """
    layers: list[int] = []
    for layer in published:
        # round() would round halves to even.
        scaled = (2 * layer * num_layers + of) // (2 * of)
        # In a shallow model two published layers may fall on the same one.
        scaled = max(scaled, layers[-1] + 1 if layers else 1)
        if scaled < num_layers or not layers:
            layers.append(scaled)
    return layers


def _check_layers(name: str, layers: Sequence[int], num_layers: int) -> None:
    for layer in layers:
        if not 1 <= layer < num_layers:
            raise BudgetError(
                f"pruner {name!r} drops before layer {layer}, but this language model has {num_layers} layers: "
                f"pass a layer from 1 to {num_layers - 1}"
            )


def _too_few(name: str, n: int, keep: int, num_layers: int, first: int, least: int) -> BudgetError:
    return BudgetError(
        f"{keep} of {n} visual tokens on average over {num_layers} layers is less than pruner {name!r} can reach: all "
        f"{n} go through the first {first}; pass keep={least} or more, or drop before an earlier layer"
    )
