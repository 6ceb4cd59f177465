"""The oracle: keep the patches that hold the answer, then cover the rest of the images evenly.

No pruner can know the evidence: the oracle is close to an upper bound of what a choice of tokens can reach.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from gripvlm.models.encoded import Encoded
from gripvlm.pruners.base import top_k
from gripvlm.pruners.baselines.given import Given
from gripvlm.tasks.base import Sample, TaskError
from gripvlm.types import Selection, VisualTokens

__all__ = ["oracle"]

# The plastic number's powers: the best-known additive recurrence in two dimensions.
_STEP = (0.5698402909980532, 0.7548776662466927)


@lru_cache(maxsize=32)
def spread_order(grid: tuple[int, int]) -> tuple[int, ...]:
    """All cells of an h x w raster, so ordered that every prefix covers it evenly.

    The points of the low-discrepancy sequence frac(1/2 + i a), a from the plastic number, in turn, on the square of the
    longer side, so that spacing is the same both ways; each cell comes when a point first falls into it.
    """
    h, w = grid
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


def oracle_order(evidence: Sequence[int], grid: tuple[int, int], pictures: int = 1) -> list[int]:
    """Every cell of a prompt's pictures once: the evidence in its own order, then the others, all pictures evenly.

    Cells count through the pictures one after another. The others come picture by picture in turn, in `spread_order`.
    """
    size = grid[0] * grid[1]
    spread = (p * size + cell for cell in spread_order(grid) for p in range(pictures))
    return list(dict.fromkeys((*evidence, *spread)))


@dataclass(frozen=True, eq=False)
class Oracle(Given):
    """Scores that compete over all pictures of a prompt for one budget, the sum of theirs."""

    name = "oracle"
    joint: ClassVar[bool] = True

    def select_batch(self, images: Sequence[VisualTokens]) -> list[Selection]:
        selections = []
        for _, group in itertools.groupby(images, key=lambda tokens: tokens.sample):
            prompt = list(group)
            scores = [self.score(tokens) for tokens in prompt]
            kept = torch.zeros(sum(tokens.n for tokens in prompt), dtype=torch.bool, device=scores[0].device)
            kept[top_k(torch.cat(scores), sum(tokens.keep for tokens in prompt))] = True
            rows = [part.nonzero()[:, 0] for part in kept.split([tokens.n for tokens in prompt])]
            selections += [Selection(row, tokens.n, own) for row, tokens, own in zip(rows, prompt, scores, strict=True)]
        return selections


def oracle(samples: Sequence[Sample], encoded: Encoded, evidence_grid: tuple[int, int] | None) -> Oracle:
    """A pruner that keeps the first cells of each prompt's `oracle_order`, as many as its images may keep together.

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
        if not items:
            scores.append([])
            continue
        sample.evidence_by_image(evidence_grid)  # refuses a patch beyond the last image
        order = torch.tensor(oracle_order(sample.evidence, evidence_grid, len(items)))
        rank = torch.empty(len(order))
        rank[order] = torch.arange(len(order), 0, -1, dtype=torch.float32)
        scores.append(list(rank.split(evidence_grid[0] * evidence_grid[1])))
    return Oracle(scores)
