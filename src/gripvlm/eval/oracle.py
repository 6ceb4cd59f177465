"""The oracle: keep the patches that hold the answer, then cover the rest of each image evenly.

No pruner can know the evidence: the oracle is close to an upper bound of what a choice of tokens can reach.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from gripvlm.models.encoded import Encoded
from gripvlm.pruners.baselines.given import Given
from gripvlm.tasks.base import Sample, TaskError

__all__ = ["oracle"]

# The plastic number's powers: the best-known additive recurrence in two dimensions.
_STEP = (0.5698402909980532, 0.7548776662466927)


@lru_cache(maxsize=32)
def spread_order(grid: tuple[int, int]) -> tuple[int, ...]:
    """All cells of an h x w raster, so ordered that every prefix covers it evenly.

    The points of the low-discrepancy sequence frac(1/2 + i a), a from the plastic number, in turn, on
    the square of the longer side, so that spacing is the same both ways; each cell comes when a
    point first falls into it.
    """
    h, w = grid
    # On a square, so that an oblong raster is covered with equal spacing both ways.
    side = max(h, w)
    order: dict[int, None] = {}
    for i in range(64 * side * side):
        row, column = (int((0.5 + i * step) % 1.0 * side) for step in _STEP)
        if row < h and column < w:
            order[row * w + column] = None
        if len(order) == h * w:
            break
    # The sequence is finite here: cells that no point has hit come last.
    order.update(dict.fromkeys(range(h * w)))
    return tuple(order)


def oracle_order(evidence: Sequence[int], grid: tuple[int, int]) -> list[int]:
    """Every cell once: the evidence in its own order, then the others in `spread_order`."""
    return list(dict.fromkeys((*evidence, *spread_order(grid))))


def oracle(samples: Sequence[Sample], encoded: Encoded, evidence_grid: tuple[int, int] | None) -> Given:
    """A pruner that keeps the first k cells of each image's `oracle_order`, k being the image's own.

    Args:
        samples: [B], as encoded.
        evidence_grid: the raster of each image that `Sample.evidence` counts in.

    Raises:
        TaskError: the task marks no evidence, or on another raster than the model's, or beyond the last image.
    """
    if evidence_grid is None:
        raise TaskError("the oracle needs a task that marks its evidence, such as lab: leave 'oracle' out")
    scores: list[list[Tensor]] = []
    for sample, items in zip(samples, encoded.samples, strict=True):
        if [item.grid for item in items] != [evidence_grid] * len(sample.pictures):
            tokens = " + ".join(f"{item.features.shape[0]} in {item.grid}" for item in items)
            raise TaskError(
                f"the oracle's evidence is marked on {evidence_grid[0]} x {evidence_grid[1]} cells, but this model "
                f"has visual tokens {tokens}: leave 'oracle' out, or use --model lab"
            )
        scores.append([_scores(evidence, evidence_grid) for evidence in sample.evidence_by_image(evidence_grid)])
    return Given(scores)


def _scores(evidence: Sequence[int], grid: tuple[int, int]) -> Tensor:
    """[h * w] the first cell of `oracle_order` has the highest score: pruners keep the largest."""
    order = torch.tensor(oracle_order(evidence, grid))
    scores = torch.empty(len(order))
    scores[order] = torch.arange(len(order), 0, -1, dtype=torch.float32)
    return scores
