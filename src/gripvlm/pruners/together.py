"""Images side by side, for pruners that pick one token after the other: a step of all images is one operation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from gripvlm.pruners.base import VisualTokens

__all__ = ["batches", "cosines", "padded"]

MOST = 1 << 27
"""Numbers in the [B, n, n] matrix of one batch: half a gigabyte."""


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


def padded(rows: Sequence[Tensor], value: float | bool) -> Tensor:
    """[B, n] of B tensors [n_i], filled up with `value`; the tensor itself where there is one."""
    if len(rows) == 1:
        return rows[0][None]
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)


def cosines(images: Sequence[VisualTokens]) -> Tensor:
    """[B, n, n] cosines of each image's rows, float32, symmetric to the bit, so that ties are ties; 0 at padding.

    Each image has a product of its own: what it comes to does not depend on its neighbours.
    """
    found = []
    for tokens in images:
        rows = normalize(tokens.features.float(), dim=-1)
        cosine = rows @ rows.T
        found.append(torch.maximum(cosine, cosine.T))
    if len(found) == 1:
        return found[0][None]
    most = max(tokens.n for tokens in images)
    whole = found[0].new_zeros(len(found), most, most)
    for i, cosine in enumerate(found):
        whole[i, : len(cosine), : len(cosine)] = cosine
    return whole
