"""Pruners that pick one token after the other by how alike tokens are; a step of all images is one operation."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize, threshold

from gripvlm.pruners.base import Pruner
from gripvlm.types import Selection, VisualTokens
from gripvlm.utils.batching import padded

MAX_ELEMENTS = 1 << 27
"""Numbers in the [B, n, n] matrix of one batch: half a gigabyte."""

STRIP = 256
"""Rows of a symmetric matrix that are multiplied at a time."""


class GreedyPruner(Pruner):
    """Implement `pick`, for a batch of images; their order and budgets are taken care of here."""

    @abstractmethod
    def pick(self, images: Sequence[VisualTokens], rows: Sequence[Tensor], cosine: Tensor) -> Tensor:
        """[B, k] indices in the order in which they are picked, k the largest budget of the B images.

        The first of them must not depend on how many follow. Nothing may wait for the device: no shape may depend
        on a value.

        Args:
            images: B of them.
            rows: [n_i, d] each image's `compared` rows, float32.
            cosine: [B, n, n] of these, see `products`; this call's own to change.
        """

    def compared(self, tokens: VisualTokens) -> Tensor:
        """[n, d] float32, the rows whose products `pick` gets: by default the features, of length 1."""
        return normalize(tokens.features.float(), dim=-1)

    def select(self, tokens: VisualTokens) -> Selection:
        return self.select_batch([tokens])[0]

    def select_batch(self, images: Sequence[VisualTokens]) -> list[Selection]:
        selections = []
        # One loop over tokens serves all images of a part: sixteen images cost far less than sixteen loops.
        for part in batches(images):
            rows = [self.compared(tokens) for tokens in part]
            for tokens, picks in zip(part, self.pick(part, rows, products(rows)), strict=True):
                selections.append(Selection(picks[: tokens.keep].sort().values, tokens.n, sound=True))
        return selections


def batches(images: Sequence[VisualTokens]) -> Iterator[Sequence[VisualTokens]]:
    """The images in order, as many at a time as their matrices have room; one at least."""
    start = 0
    while start < len(images):
        stop, most = start, 0
        while stop < len(images):
            most = max(most, images[stop].n)
            if stop > start and (stop + 1 - start) * most * most > MAX_ELEMENTS:
                break
            stop += 1
        yield images[start:stop]
        start = stop


def padding_of(images: Sequence[VisualTokens]) -> Tensor:
    """[B, n] bool, True at padding."""
    return padded([torch.zeros_like(tokens.features[:, 0], dtype=torch.bool) for tokens in images], True)


def explain(kernel: Tensor, factor: Tensor, left: Tensor, pick: Tensor, step: int, least: float) -> None:
    """One more row of a Cholesky factor: what a pick explains of every token beyond the picks before it.

    Args:
        kernel: [B, n, n], symmetric.
        factor: [B, k, n] rows of the factor, the first `step` of them known; the next one is written.
        left: [B, n] what the known ones do not explain of the kernel's diagonal; lowered by this one's part.
        pick: [B] indices.
        least: where no more than this is left of a pick, its row is 0.
    """
    batch = torch.arange(len(pick), device=pick.device)
    known = factor[batch, :step, pick]  # [B, step]
    part = kernel[batch, pick] - (known[..., None] * factor[:, :step]).sum(dim=1)
    own = threshold(left.gather(1, pick[:, None]), least, torch.inf)
    factor[:, step] = part * own.rsqrt()
    left -= factor[:, step].square()


@torch.no_grad()
def products(each: Sequence[Tensor]) -> Tensor:
    """[B, n, n] products of the rows [n_i, d] of B images, symmetric to the bit, so that ties are ties; 0 at padding.

    Each image has products of its own: what they come to does not depend on its neighbours. No gradients.
    """
    most = max(len(rows) for rows in each)
    whole = each[0].new_zeros(len(each), most, most)
    for i, rows in enumerate(each):
        _square(rows, whole[i, : len(rows), : len(rows)])
    return whole


def _square(rows: Tensor, out: Tensor) -> None:
    """rows @ rows.T of [n, d] rows into [n, n]: the upper triangle by strips, and its mirror image."""
    for start in range(0, len(rows), STRIP):
        stop = min(start + STRIP, len(rows))
        strip = rows[start:stop] @ rows[start:].T
        # A product and its mirror image round differently: the larger one stands for both.
        own = strip[:, : stop - start]
        out[start:stop, start:stop] = torch.maximum(own, own.T)
        if stop < len(rows):
            out[start:stop, stop:] = strip[:, stop - start :]
            out[stop:, start:stop] = strip[:, stop - start :].T
