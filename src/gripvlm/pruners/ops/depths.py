"""Published layers of one language model, at the same relative depth of another."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["at_depths"]


def at_depths(published: Sequence[int], of: int, layers: int) -> list[int]:
    """Layers to drop before in a model of `layers` layers, for those published for one of `of`.

    round(layer x layers / of), halves up, at least 1 and ascending; those past the last layer fall away.
    With layers == of they are as published.
    """
    cuts: list[int] = []
    for layer in published:
        cut = max(cuts[-1] + 1 if cuts else 1, (2 * layer * layers + of) // (2 * of))
        if cut < layers or not cuts:
            cuts.append(cut)
    return cuts
