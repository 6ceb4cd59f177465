"""Images side by side, for pruners that pick one token after the other: a step of all images is one operation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from gripvlm.types import VisualTokens

__all__ = ["batches", "cosines", "products", "unit_rows"]

MOST = 1 << 27
"""Numbers in the [B, n, n] matrix of one batch: half a gigabyte."""

SIDE = 256
"""Rows of a symmetric matrix that are multiplied at a time."""


def batches(images: Sequence[VisualTokens]) -> Iterator[Sequence[VisualTokens]]:
    """The images in order, as many at a time as their matrices have room; one at least."""
    start = 0
    while start < len(images):
        stop, most = start, 0
        while stop < len(images):
            most = max(most, images[stop].n)
            if stop > start and (stop + 1 - start) * most * most > MOST:
                break
            stop += 1
        yield images[start:stop]
        start = stop


def cosines(images: Sequence[VisualTokens]) -> Tensor:
    """[B, n, n] cosines of each image's rows, float32, symmetric to the bit, so that ties are ties; 0 at padding.

    Each image has products of its own: what they come to does not depend on its neighbours. No gradients.
    """
    return products(unit_rows(images))


def unit_rows(images: Sequence[VisualTokens]) -> list[Tensor]:
    """[n_i, d] of each image, float32, of length 1."""
    return [normalize(tokens.features.float(), dim=-1) for tokens in images]


@torch.no_grad()
def products(each: Sequence[Tensor]) -> Tensor:
    """[B, n, n] of the rows [n_i, d] of B images, as `cosines` says."""
    most = max(len(rows) for rows in each)
    whole = each[0].new_zeros(len(each), most, most)
    for i, rows in enumerate(each):
        _squared(rows, whole[i, : len(rows), : len(rows)])
    return whole


def _squared(rows: Tensor, out: Tensor) -> None:
    """rows @ rows.T of [n, d] rows into [n, n]: the upper triangle by strips, and its mirror image."""
    for start in range(0, len(rows), SIDE):
        stop = min(start + SIDE, len(rows))
        strip = rows[start:stop] @ rows[start:].T
        own = strip[:, : stop - start]
        out[start:stop, start:stop] = torch.maximum(own, own.T)
        if stop < len(rows):
            out[start:stop, stop:] = strip[:, stop - start :]
            out[stop:, start:stop] = strip[:, stop - start :].T
