"""A policy over k-subsets in rounds: the logits of a round depend on what earlier rounds kept.

One vector of logits is one ranking: it cannot say "one of these three". Here k is divided among R rounds as evenly as
it goes, the earlier ones first; round r keeps items b_r to b_(r+1) of a sample, b_r = ceil(k r / R). Shapes and samples
are those of `policy`.

1. Inside a round the law is Plackett-Luce over what is left, so that a sample's probability is exact, and the highest
   logits of a round are one top-k. What a round keeps does not change the logits inside it, not even by the diversity
   term: a greedy choice one by one would take k steps of several kernels each, and its probability B x G x K x n
   numbers.
2. With logits that do not change, R rounds are the same law as one: what a new scorer begins with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor

from gripvlm.grip.policy import PlackettLuce, samples_to_mask

__all__ = ["Rescore", "Rounds", "first_items", "greedy"]

Rescore: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""(kept [B, G, m] items, -1 at padding; [B] how many of each row are still to be kept) -> logits [B, G, n]."""

_Counts = TypeVar("_Counts", int, Tensor)


class Rounds:
    """The law of the module's docstring. It samples and evaluates as `PlackettLuce` does.

    Args:
        logits: [B, n] of the first round; -inf marks an item that is never sampled.
        k: int64 [B], or one int for all rows.
        mask: bool [B, n], True for an item that exists. None: all exist.
        rounds: R, at least 1.
        rescore: the logits of later rounds.

    Raises:
        InputError: as `PlackettLuce`.
    """

    def __init__(self, logits: Tensor, k: int | Tensor, mask: Tensor | None, rounds: int, rescore: Rescore) -> None:
        self._whole = PlackettLuce(logits, k, mask)  # checks, and the first round's logits with all k
        self.logits, self.k, self.k_max = logits, self._whole.k, self._whole.k_max
        self.rounds, self.rescore = rounds, rescore
        self._walked: tuple[Tensor, bool, list[_Round]] | None = None

    def sample(self, num_samples: int = 1, *, generator: torch.Generator | None = None) -> Tensor:
        """int64 [B, G, K]: ordered samples."""
        samples = self.k.new_full((len(self.k), num_samples, self.k_max), -1)
        with torch.no_grad():
            for r in range(self.rounds):
                law = self._law(r, samples)
                drawn = law.sample(num_samples if r == 0 else 1, generator=generator)
                samples = _written(samples, drawn.view(*samples.shape[:2], -1), self.bound(r))
        return samples

    def mode(self) -> Tensor:
        """int64 [B, K]: the most probable picks of each round, given those of the rounds before; then -1."""
        with torch.no_grad():
            logits = self.logits.masked_fill(~self._whole.valid, -torch.inf)
            return greedy(logits, self.k, self.k_max, self.rounds, self.rescore)

    def log_prob(self, samples: Tensor) -> Tensor:
        """[B, G]: of ordered samples [B, G, K]."""
        return self.step_log_probs(samples).sum(-1)

    def step_log_probs(self, samples: Tensor) -> Tensor:
        """[B, G, K]: of each item given those before it; 0 at padding."""
        return self._joined(samples, [each.law.step_log_probs(each.samples) for each in self._walk(samples)])

    def step_entropy(self, samples: Tensor) -> Tensor:
        """[B, G, K]: see `PlackettLuce.step_entropy`."""
        return self._joined(samples, [each.law.step_entropy(each.samples) for each in self._walk(samples)])

    def step_kl(self, other: Rounds, samples: Tensor) -> Tensor:
        """[B, G, K]: see `PlackettLuce.step_kl`; `other` has as many rounds."""
        pairs = zip(self._walk(samples), other._walk(samples), strict=True)
        return self._joined(samples, [mine.law.step_kl(theirs.law, mine.samples) for mine, theirs in pairs])

    def entropy(self, samples: Tensor) -> Tensor:
        """[B, G]: the sum of `step_entropy`, an unbiased estimate over samples of this policy."""
        return self.step_entropy(samples).sum(-1)

    def kl(self, other: Rounds, samples: Tensor) -> Tensor:
        """[B, G]: the sum of `step_kl`, an unbiased estimate over samples of this policy."""
        return self.step_kl(other, samples).sum(-1)

    def bound(self, r: int) -> Tensor:
        """int64 [B]: the items of each row that are kept before round r."""
        return _bound(self.k, r, self.rounds)

    def _law(self, r: int, samples: Tensor) -> PlackettLuce:
        """The law of round r: [B, n] in the first round, [B * G, n] in later ones, given the samples' earlier items."""
        size = self.bound(r + 1) - self.bound(r)
        if r == 0:
            return PlackettLuce(self.logits, size, self._whole.valid)
        kept = first_items(samples, self.bound(r), _bound(self.k_max, r, self.rounds))
        logits = self.rescore(kept, self.k - self.bound(r))
        left = self._whole.valid[:, None] & ~samples_to_mask(kept, self.logits.shape[1])
        return PlackettLuce(logits.flatten(0, 1), size.repeat_interleave(samples.shape[1]), left.flatten(0, 1))

    def _walk(self, samples: Tensor) -> list[_Round]:
        """Each round's law along the samples, kept for the next call: log_prob, entropy and KL share it."""
        grad = torch.is_grad_enabled()
        if self._walked is None or self._walked[0] is not samples or (grad and not self._walked[1]):
            found = []
            for r in range(self.rounds):
                law = self._law(r, samples)
                place = self.bound(r)[:, None] + torch.arange(law.k_max, device=samples.device)  # [B, K_r]
                inside = place < self.bound(r + 1)[:, None]
                index = place.clamp_max(self.k_max - 1)[:, None].expand(-1, samples.shape[1], -1)
                mine = samples.gather(-1, index).masked_fill(~inside[:, None], -1)
                found.append(_Round(law, mine if r == 0 else mine.flatten(0, 1)[:, None], place, inside))
            self._walked = samples, grad, found
        return self._walked[2]

    def _joined(self, samples: Tensor, steps: list[Tensor]) -> Tensor:
        """[B, G, K]: the steps of each round, which are [B, G, K_r] or [B * G, 1, K_r], side by side."""
        parts, places = [], []
        for step, each in zip(steps, self._walk(samples), strict=True):
            parts.append(step.reshape(*samples.shape[:2], -1))
            places.append(each.place.masked_fill(~each.inside, self.k_max))
        every = torch.cat(parts, -1)
        place = torch.cat(places, -1)[:, None].expand_as(every)
        return every.new_zeros(*samples.shape[:2], self.k_max + 1).scatter(-1, place, every)[..., :-1]


class _Round(NamedTuple):
    """One round along given samples."""

    law: PlackettLuce
    samples: Tensor  # [B, G, K_r], or [B * G, 1, K_r] as its law has it
    place: Tensor  # [B, K_r] where its items are in the whole samples
    inside: Tensor  # [B, K_r] bool, False at padding


def greedy(logits: Tensor, k: Tensor, k_max: int, rounds: int, rescore: Rescore) -> Tensor:
    """int64 [B, K]: the highest logits of each round in turn, descending, ties by lower index; then -1.

    Nothing here waits for the device.

    Args:
        logits: [B, n] of the first round, -inf where nothing may be kept; NaN is the caller's to find.
        k: int64 [B], on the device.
        k_max: K, the largest k, known to the host.
    """
    picks = k.new_full((len(k), k_max), -1)
    width = -(-k_max // rounds)  # no round keeps more of any row
    rank = torch.arange(width, device=k.device)
    for r in range(rounds):
        begin, end = _bound(k, r, rounds), _bound(k, r + 1, rounds)
        if r:
            kept = first_items(picks[:, None], begin, _bound(k_max, r, rounds))
            logits = rescore(kept, k - begin)[:, 0].masked_fill(
                samples_to_mask(kept[:, 0], logits.shape[1]), -torch.inf
            )
        # Not topk, which breaks ties as it likes.
        best = torch.sort(logits, dim=-1, descending=True, stable=True).indices[:, :width]
        best = best.masked_fill(rank[: best.shape[1]] >= (end - begin)[:, None], -1)
        picks = _written(picks[:, None], best[:, None], begin)[:, 0]
    return picks


def _bound(k: _Counts, r: int, rounds: int) -> _Counts:
    """b_r = ceil(k r / R)."""
    return (k * r + rounds - 1) // rounds


def first_items(samples: Tensor, bound: Tensor, width: int) -> Tensor:
    """[B, G, width]: the first `bound` [B] items of each sample [B, G, K], then -1."""
    after = torch.arange(width, device=samples.device) >= bound[:, None]
    return samples[..., :width].masked_fill(after[:, None], -1)


def _written(samples: Tensor, drawn: Tensor, begin: Tensor) -> Tensor:
    """samples [B, G, K] with the items of drawn [B, G, m], which end in -1, from place `begin` [B] on."""
    total = samples.shape[-1]
    place = begin[:, None, None] + torch.arange(drawn.shape[-1], device=samples.device)
    place = place.expand_as(drawn).masked_fill(drawn < 0, total)
    return torch.nn.functional.pad(samples, (0, 1)).scatter(-1, place, drawn)[..., :-1]
