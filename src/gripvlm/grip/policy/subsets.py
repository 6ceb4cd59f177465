"""What both laws share: their checked inputs, picks and masks, the noise."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gripvlm.errors import InputError

__all__ = ["FAR", "SubsetPolicy", "per_pick", "picks_to_mask", "uniform_noise", "wide_type"]

_LARGEST = 1e20  # of a finite logit
FAR = -1e30  # stands for -inf where a gradient passes: exp gives 0, and FAR - FAR is no nan


class SubsetPolicy:
    """What both laws share: the checked logits, k and mask; the mode.

    Args:
        logits: [B, n], or [n] for B = 1; any float type. -inf marks an item that is never picked.
        k: the size of the subset, at least 1: one for all rows, or int64 [B].
        mask: bool [B, n] (or [n]), True for an item that exists. None: all exist.

    Raises:
        InputError: wrong shapes or types, nan, +inf, |logit| > 1e20, or a row with fewer than k items to pick from.
    """

    def __init__(self, logits: Tensor, k: int | Tensor, mask: Tensor | None = None) -> None:
        self.logits = _checked_logits(logits)
        """[B, n], as given."""
        rows, n = self.logits.shape
        self.real = _checked_real(self.logits, mask)
        """[B, n], True for the items that can be picked: they exist and their logit is finite."""
        self.k = _checked_k(k, rows, self.logits.device)
        """int64 [B]."""
        lacking = self.real.sum(-1) < self.k
        if bool(lacking.any()):
            row = int(lacking.nonzero()[0, 0])
            has, wants = int(self.real[row].sum()), int(self.k[row])
            raise InputError(
                f"k={wants} in row {row}, which has {has} items to pick from (of {n}; masked and -inf ones do not "
                f"count): type k={has} or less, or unmask items"
            )
        self.kmax = int(self.k.max())
        """The width K of picks."""
        self._padding = torch.arange(self.kmax, device=self.k.device) >= self.k[:, None]  # [B, K]

    @property
    def n(self) -> int:
        """Items of a row, masked ones included."""
        return self.logits.shape[1]

    def _top(self) -> Tensor:
        """int64 [B, K]: the k largest logits in descending order, ties by the lower index, -1 after them."""
        ranked = self._lowered(-torch.inf).sort(dim=-1, descending=True, stable=True).indices
        return ranked[:, : self.kmax].masked_fill(self._padding, -1)

    def _lowered(self, value: float) -> Tensor:
        """[B, n], wide: the logits less `_at_k`, `value` where nothing can be picked."""
        wide = self.logits.to(wide_type(self.logits.device)).masked_fill(~self.real, 0.0)
        return (wide - self._at_k()).masked_fill(~self.real, value)

    def _at_k(self) -> Tensor:
        """[B, 1], wide: the k-th largest logit, a constant: a centre that keeps what is near rank k exact."""
        wide = self.logits.detach().to(wide_type(self.logits.device)).masked_fill(~self.real, -torch.inf)
        return wide.sort(dim=-1, descending=True).values.gather(-1, self.k[:, None] - 1)

    def _checked_picks(self, picks: Tensor) -> Tensor:
        """`picks` if each is a subset that this law can give, else an `InputError`."""
        rows, n = self.logits.shape
        if picks.dim() != 3 or picks.shape[0] != rows or picks.shape[2] != self.kmax or picks.dtype != torch.int64:
            raise InputError(
                f"picks are {picks.dtype} {list(picks.shape)}, not int64 [B, G, K] with B={rows}, K={self.kmax}: type "
                f"what sample() returns (or mode()[:, None])"
            )
        padding, index = self._padding[:, None], picks.clamp(0, n - 1)
        member = picks_to_mask(index.masked_fill(padding, -1), n)
        good = torch.where(padding, picks == -1, (picks == index) & per_pick(self.real, index)).all(-1)
        good &= member.sum(-1) == self.k[:, None]
        if not bool(good.all()):
            row, sample = (int(i) for i in (~good).nonzero()[0])
            raise InputError(
                f"picks[{row}, {sample}] = {picks[row, sample].tolist()} is no subset of this law: allowed are "
                f"{int(self.k[row])} different items of 0..{n - 1} that are neither masked nor -inf, then -1: "
                f"type what sample() returns"
            )
        return picks

    def _out(self, value: Tensor) -> Tensor:
        """`value` in the type the caller sees."""
        return value.to(torch.promote_types(self.logits.dtype, torch.float32))

    def _comparable(self, other: SubsetPolicy) -> None:
        """Refuses a reference law with other sizes, or one that can never give what this one gives."""
        given = f"a {type(other).__name__}"
        if isinstance(other, type(self)):
            same = self.logits.shape == other.logits.shape and bool((self.k == other.k).all())
            if same and not bool((self.real & ~other.real).any()):
                return
            given = f"one over {list(other.logits.shape)} with k={other.k.tolist()}"
            if same:
                given += " that never picks some item which this one picks (masked or -inf): the divergence is infinite"
        raise InputError(
            f"the KL of a {type(self).__name__} over {list(self.logits.shape)} with k={self.k.tolist()} is to another "
            f"of the same shape, k and items, not to {given}: type kl({type(self).__name__}(logits, k, mask), ...)"
        )


def picks_to_mask(picks: Tensor, n: int) -> Tensor:
    """bool [..., n]: True at the items that picks [..., K] name; -1 names none."""
    member = torch.zeros(*picks.shape[:-1], n + 1, dtype=torch.bool, device=picks.device)
    return member.scatter_(-1, picks.masked_fill(picks < 0, n), True)[..., :n]


def per_pick(values: Tensor, index: Tensor) -> Tensor:
    """[B, G, K]: values [B, n] at index [B, G, K]."""
    return values.gather(-1, index.flatten(1)).view(index.shape)


def wide_type(device: torch.device) -> torch.dtype:
    """float64, or float32 on a device without it."""
    return torch.float32 if device.type == "mps" else torch.float64


def uniform_noise(
    logits: Tensor, shape: tuple[int, int], generator: torch.Generator | None, antithetic: bool
) -> Tensor:
    """[B, *shape] in the open interval (0, 1), so that no log of it or of 1 less it is infinite."""
    samples, width = shape
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise InputError(f"samples={samples!r} is no number of samples: type an int of 1 or more, such as samples=16")
    dtype = wide_type(logits.device)
    drawn = (samples + 1) // 2 if antithetic else samples
    device = logits.device if generator is None else generator.device
    uniform = torch.rand(logits.shape[0], drawn, width, dtype=dtype, device=device, generator=generator)
    edge = torch.finfo(dtype).eps / 2
    uniform = uniform.to(logits.device).clamp(edge, 1 - edge)
    return torch.stack([uniform, 1 - uniform], 2).flatten(1, 2)[:, :samples] if antithetic else uniform


def _checked_logits(logits: Any) -> Tensor:
    """`logits` as [B, n]."""
    allowed = "allowed are floats [B, n] or [n] with n >= 1"
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        what = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
        raise InputError(f"logits are {what}: {allowed}: type torch.as_tensor(logits, dtype=torch.float32)")
    if logits.dim() not in (1, 2) or logits.numel() == 0:
        raise InputError(f"logits have shape {list(logits.shape)}: {allowed}: type logits.view(-1, n)")
    return logits if logits.dim() == 2 else logits[None]


def _checked_real(logits: Tensor, mask: Tensor | None) -> Tensor:
    """bool [B, n]: not masked, not -inf; refuses nan, +inf and a finite logit beyond 1e20 where it is not masked."""
    real = torch.ones_like(logits, dtype=torch.bool)
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape not in (real.shape, real.shape[1:]):
            what = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise InputError(
                f"mask is {what}: allowed is bool {list(real.shape)}, True for a real item: type mask.bool()"
            )
        real = real & mask.to(logits.device)
    fixed = logits.detach()
    bad = real & ~((fixed.abs() <= _LARGEST) | (fixed == -torch.inf))
    if bool(bad.any()):
        row, item = (int(i) for i in bad.nonzero()[0])
        raise InputError(
            f"logits[{row}, {item}] = {float(fixed[row, item])}: allowed are -inf (never picked) and finite ones up to "
            f"{_LARGEST:g}: type mask=... to leave the item out, or look where it comes from"
        )
    return real & (fixed > -torch.inf)


def _checked_k(k: Any, rows: int, device: torch.device) -> Tensor:
    """`k` as int64 [B], at least 1."""
    allowed = f"allowed is an int of 1 or more, or a tensor of {rows} of them, one a row"
    count = torch.as_tensor(k) if isinstance(k, int | Tensor) else None
    if count is None or count.dtype not in (torch.int64, torch.int32) or count.shape not in ((), (1,), (rows,)):
        raise InputError(f"k={k!r} is no size of a subset: {allowed}: type k=64")
    if bool((count < 1).any()):
        raise InputError(f"k={count.tolist()} picks nothing: {allowed}: type k=64")
    return count.to(device, torch.int64).expand(rows)
