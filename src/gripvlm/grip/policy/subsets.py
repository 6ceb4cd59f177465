"""What every policy over subsets shares: its checked inputs, samples and masks, the noise."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gripvlm.errors import InputError

__all__ = ["NEG_INF", "SubsetPolicy", "gather_samples", "samples_to_mask", "uniform_noise", "wide_type"]

_LARGEST = 1e20
"""Of a finite logit."""

NEG_INF = -1e30
"""Stands for -inf where a gradient passes: exp gives 0, and NEG_INF - NEG_INF is not NaN."""


class SubsetPolicy:
    """The checked logits, k and mask of a distribution over subsets.

    Args:
        logits: [B, n], or [n] for B = 1; any float type. -inf marks an item that is never sampled.
        k: the size of the subset, at least 1: one for all rows, or int64 [B].
        mask: bool [B, n] (or [n]), True for an item that exists. None: all exist.

    Attributes:
        logits: [B, n], as given.
        valid: bool [B, n], True for the items that can be sampled: they exist and their logit is finite.
        k: int64 [B].
        k_max: the width K of samples.

    Raises:
        InputError: wrong shapes or types, NaN, +inf, |logit| > 1e20, or a row with fewer than k items to sample from.
    """

    def __init__(self, logits: Tensor, k: int | Tensor, mask: Tensor | None = None) -> None:
        self.logits = _checked_logits(logits)
        rows, n = self.logits.shape
        self.valid = _checked_valid(self.logits, mask)
        self.k = _checked_k(k, rows, self.logits.device)
        too_few = self.valid.sum(-1) < self.k
        if bool(too_few.any()):
            row = int(too_few.nonzero()[0, 0])
            available, wanted = int(self.valid[row].sum()), int(self.k[row])
            raise InputError(
                f"k={wanted} in row {row}, which has {available} items to sample from (of {n}; masked and -inf ones do "
                f"not count): pass k={available} or less, or unmask items"
            )
        self.k_max = int(self.k.max())
        # Rows of a smaller k end in -1.
        self._padding = torch.arange(self.k_max, device=self.k.device) >= self.k[:, None]  # [B, K]

    @property
    def n(self) -> int:
        """Items of a row, masked ones included."""
        return self.logits.shape[1]

    def _top_k(self) -> Tensor:
        """int64 [B, K]: the k largest logits in descending order, ties by the lower index, -1 after them."""
        ranked = self._centred(-torch.inf).sort(dim=-1, descending=True, stable=True).indices
        return ranked[:, : self.k_max].masked_fill(self._padding, -1)

    def _centred(self, fill: float) -> Tensor:
        """[B, n], wide: the logits less `_kth_largest`, `fill` at items that are never sampled."""
        wide = self.logits.to(wide_type(self.logits.device)).masked_fill(~self.valid, 0.0)
        return (wide - self._kth_largest()).masked_fill(~self.valid, fill)

    def _kth_largest(self) -> Tensor:
        """[B, 1], wide: the k-th largest logit, a constant: a centre that keeps what is near rank k exact."""
        wide = self.logits.detach().to(wide_type(self.logits.device)).masked_fill(~self.valid, -torch.inf)
        return wide.sort(dim=-1, descending=True).values.gather(-1, self.k[:, None] - 1)

    def _checked_samples(self, samples: Tensor) -> Tensor:
        """`samples` if each is a subset that this policy can give.

        Raises:
            InputError: another shape or type, or a row that is no such subset.
        """
        n, shape = self.n, (self.logits.shape[0], samples.shape[1] if samples.dim() == 3 else 0, self.k_max)
        advice = "pass what sample() returns (or mode()[:, None])"
        if samples.shape != shape or samples.dtype != torch.int64:
            raise InputError(
                f"samples are {samples.dtype} {list(samples.shape)}, not int64 [B, G, K] with B={shape[0]}, "
                f"K={self.k_max}: {advice}"
            )
        padding, index = self._padding[:, None], samples.clamp(0, n - 1)
        member = samples_to_mask(index.masked_fill(padding, -1), n)
        good = torch.where(padding, samples == -1, (samples == index) & gather_samples(self.valid, index)).all(-1)
        good &= member.sum(-1) == self.k[:, None]  # fewer where an item is named twice
        if not bool(good.all()):
            row, sample = (int(i) for i in (~good).nonzero()[0])
            raise InputError(
                f"samples[{row}, {sample}] = {samples[row, sample].tolist()} is no subset of this policy, "
                f"{int(self.k[row])} different items of 0..{n - 1} that are neither masked nor -inf, then -1: {advice}"
            )
        return samples

    def _narrowed(self, value: Tensor) -> Tensor:
        """`value` in the type the caller sees."""
        return value.to(torch.promote_types(self.logits.dtype, torch.float32))

    def _check_comparable(self, other: SubsetPolicy) -> None:
        """Refuses a reference of another kind or size, or one that can never give what this one gives.

        Raises:
            InputError: it is one.
        """
        name = type(self).__name__
        if type(other) is not type(self):
            raise InputError(f"the KL of a {name} is to another {name}, not to a {type(other).__name__}")
        if self.logits.shape != other.logits.shape or not bool((self.k == other.k).all()):
            sizes = [f"{list(policy.logits.shape)} with k={policy.k.tolist()}" for policy in (self, other)]
            raise InputError(f"the KL of a {name} over {sizes[0]} is to one of the same sizes, not over {sizes[1]}")
        if bool((self.valid & ~other.valid).any()):
            raise InputError("the reference never samples some item which this policy samples: the KL is infinite")


def samples_to_mask(samples: Tensor, n: int) -> Tensor:
    """bool [..., n]: True at the items that samples [..., K] name; -1 names none."""
    member = torch.zeros(*samples.shape[:-1], n + 1, dtype=torch.bool, device=samples.device)
    return member.scatter_(-1, samples.masked_fill(samples < 0, n), True)[..., :n]


def gather_samples(values: Tensor, index: Tensor) -> Tensor:
    """[B, G, K]: values [B, n] at index [B, G, K]."""
    return values.gather(-1, index.flatten(1)).view(index.shape)


def wide_type(device: torch.device) -> torch.dtype:
    """float64, or float32 on a device without it."""
    return torch.float32 if device.type == "mps" else torch.float64


def uniform_noise(logits: Tensor, num_samples: int, width: int, generator: torch.Generator | None) -> Tensor:
    """[B, G, width] in the open interval (0, 1), so that no log of it or of 1 less it is infinite.

    Raises:
        InputError: no number of samples.
    """
    if isinstance(num_samples, bool) or not isinstance(num_samples, int) or num_samples < 1:
        raise InputError(
            f"num_samples={num_samples!r} is no number of samples: pass an int of 1 or more, such as num_samples=16"
        )
    dtype = wide_type(logits.device)
    device = logits.device if generator is None else generator.device
    # The wide type: float32 has a chance of 2^-24 for an exact 0.
    uniform = torch.rand(logits.shape[0], num_samples, width, dtype=dtype, device=device, generator=generator)
    edge = torch.finfo(dtype).eps / 2
    return uniform.to(logits.device).clamp(edge, 1 - edge)


def _checked_logits(logits: Any) -> Tensor:
    """`logits` as [B, n]."""
    allowed = "allowed are floats [B, n] or [n] with n >= 1"
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        what = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
        raise InputError(f"logits are {what}: {allowed}: pass torch.as_tensor(logits, dtype=torch.float32)")
    if logits.dim() not in (1, 2) or logits.numel() == 0:
        raise InputError(f"logits have shape {list(logits.shape)}: {allowed}: pass logits.view(-1, n)")
    return logits if logits.dim() == 2 else logits[None]


def _checked_valid(logits: Tensor, mask: Tensor | None) -> Tensor:
    """bool [B, n]: not masked, not -inf; refuses NaN, +inf and a finite logit beyond 1e20 where it is not masked."""
    valid = torch.ones_like(logits, dtype=torch.bool)
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape not in (valid.shape, valid.shape[1:]):
            what = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise InputError(
                f"mask is {what}: allowed is bool {list(valid.shape)}, True for an item that exists: pass mask.bool()"
            )
        valid = valid & mask.to(logits.device)
    fixed = logits.detach()
    bad = valid & ~((fixed.abs() <= _LARGEST) | (fixed == -torch.inf))
    if bool(bad.any()):
        row, item = (int(i) for i in bad.nonzero()[0])
        raise InputError(
            f"logits[{row}, {item}] = {float(fixed[row, item])}: allowed are -inf (never sampled) and finite ones up "
            f"to {_LARGEST:g}: pass mask=... to leave the item out, or look where it comes from"
        )
    return valid & (fixed > -torch.inf)


def _checked_k(k: Any, rows: int, device: torch.device) -> Tensor:
    """`k` as int64 [B], at least 1."""
    allowed = f"allowed is an int of 1 or more, or a tensor of {rows} of them, one a row"
    count = torch.as_tensor(k) if isinstance(k, int | Tensor) else None
    if count is None or count.dtype not in (torch.int64, torch.int32) or count.shape not in ((), (1,), (rows,)):
        raise InputError(f"k={k!r} is no size of a subset: {allowed}: pass k=64")
    if bool((count < 1).any()):
        raise InputError(f"k={count.tolist()} samples nothing: {allowed}: pass k=64")
    return count.to(device, torch.int64).expand(rows)
