"""A policy over k-subsets in which tokens that are like kept ones lose.

One vector of logits is one ranking: it cannot say "one of these three". Here k is divided among R rounds as evenly as
it goes, the earlier ones first; round r keeps items b_r to b_(r+1) of a sample, b_r = ceil(k r / R). In its logits

    s_i - lambda max_{j kept in earlier rounds} c_ij

an item loses lambda >= 0 times its closeness c >= 0 to the nearest kept one (0 in the first round), as in maximal
marginal relevance (Carbonell and Goldstein, SIGIR 1998). Shapes and samples are those of `policy`.

1. Inside a round the law is Plackett-Luce over what is left, so that a sample's probability is exact, and the most
   probable picks of a round are one top-k. What a round keeps does not change the logits inside it: R = k chooses one
   by one, and costs k steps of several kernels each. What that loses on lab-dense: experiments/grip_claim.
2. With lambda = 0, R rounds are the same law as one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from gripvlm.grip.closeness import Closeness
from gripvlm.grip.policy import PlackettLuce, samples_to_mask

__all__ = ["Penalty", "Rounds", "adjusted", "greedy"]

_Counts = TypeVar("_Counts", int, Tensor)


@dataclass(frozen=True)
class Penalty:
    """What an item loses by being like kept ones.

    Attributes:
        rounds: R, at least 1.
        weight: [B] lambda.
        close: c of the B rows' items. Not used where R = 1.
    """

    rounds: int
    weight: Tensor
    close: Closeness


class Rounds:
    """The law of the module's docstring. It samples and evaluates as `PlackettLuce` does.

    Args:
        logits: [B, n] s; -inf marks an item that is never sampled.
        k: int64 [B], or one int for all rows.
        mask: bool [B, n], True for an item that exists. None: all exist.
        penalty: what makes a round differ from the one before.

    Raises:
        InputError: as `PlackettLuce`.
    """

    def __init__(self, logits: Tensor, k: int | Tensor, mask: Tensor | None, penalty: Penalty) -> None:
        self._whole = PlackettLuce(logits, k, mask)  # checks, and the first round's logits with all k
        self.logits, self.k, self.k_max = logits, self._whole.k, self._whole.k_max
        self.penalty = penalty
        self.rounds = min(penalty.rounds, self.k_max)  # of more, the last ones would keep nothing of any row
        self._walked: tuple[Tensor, bool, list[_Round]] | None = None

    def sample(self, num_samples: int = 1, *, generator: torch.Generator | None = None) -> Tensor:
        """int64 [B, G, K]: ordered samples."""
        samples = self.k.new_full((len(self.k), num_samples, self.k_max), -1)
        with torch.no_grad():
            state = None
            for r in range(self.rounds):
                law, state = self._law(r, state, num_samples)
                drawn = law.sample(num_samples if r == 0 else 1, generator=generator).view(*samples.shape[:2], -1)
                samples = _written(samples, drawn, self.bound(r))
                state = self._after(state, drawn)
        return samples

    def mode(self) -> Tensor:
        """int64 [B, K]: the most probable picks of each round, given those of the rounds before; then -1."""
        with torch.no_grad():
            return greedy(self.logits.masked_fill(~self._whole.valid, -torch.inf), self.k, self.k_max, self.penalty)

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
        return self._joined(samples, [ours.law.step_kl(theirs.law, ours.samples) for ours, theirs in pairs])

    def entropy(self, samples: Tensor) -> Tensor:
        """[B, G]: the sum of `step_entropy`, an unbiased estimate over samples of this policy."""
        return self.step_entropy(samples).sum(-1)

    def kl(self, other: Rounds, samples: Tensor) -> Tensor:
        """[B, G]: the sum of `step_kl`, an unbiased estimate over samples of this policy."""
        return self.step_kl(other, samples).sum(-1)

    def bound(self, r: int) -> Tensor:
        """int64 [B]: the items of each row that are kept before round r."""
        return _bound(self.k, r, self.rounds)

    def _law(self, r: int, state: _State | None, group: int) -> tuple[PlackettLuce, _State]:
        """The law of round r, [B, n] in the first and [B * G, n] in later ones, and what it starts from."""
        size = self.bound(r + 1) - self.bound(r)
        if state is None:
            shape = len(self.k), group, self.logits.shape[1]
            near = self.logits.detach().new_zeros(shape)
            return PlackettLuce(self.logits, size, self._whole.valid), _State(
                near, self._whole.valid[:, None].expand(shape)
            )
        logits = self.logits[:, None] - self.penalty.weight[:, None, None] * state.near
        return PlackettLuce(logits.flatten(0, 1), size.repeat_interleave(group), state.left.flatten(0, 1)), state

    def _after(self, state: _State, kept: Tensor) -> _State:
        """What is left, and how close it is, once a round has kept items [B, G, K_r]."""
        with torch.no_grad():
            left = state.left & ~samples_to_mask(kept, self.logits.shape[1])
            return _State(torch.maximum(state.near, self.penalty.close.nearest(kept)), left)

    def _walk(self, samples: Tensor) -> list[_Round]:
        """Each round's law along the samples, kept for the next call: log_prob, entropy and KL share it."""
        grad = torch.is_grad_enabled()
        if self._walked is None or self._walked[0] is not samples or (grad and not self._walked[1]):
            found: list[_Round] = []
            state = None
            for r in range(self.rounds):
                law, state = self._law(r, state, samples.shape[1])
                place = self.bound(r)[:, None] + torch.arange(law.k_max, device=samples.device)  # [B, K_r]
                inside = place < self.bound(r + 1)[:, None]
                index = place.clamp_max(self.k_max - 1)[:, None].expand(-1, samples.shape[1], -1)
                items = samples.gather(-1, index).masked_fill(~inside[:, None], -1)
                found.append(_Round(law, items if r == 0 else items.flatten(0, 1)[:, None], place, inside))
                state = self._after(state, items)
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


class _State(NamedTuple):
    """Before a round."""

    near: Tensor  # [B, G, n] closeness to the nearest kept item
    left: Tensor  # [B, G, n] bool, True for the items that can be kept


class _Round(NamedTuple):
    """One round along given samples."""

    law: PlackettLuce
    samples: Tensor  # [B, G, K_r], or [B * G, 1, K_r] as its law has it
    place: Tensor  # [B, K_r] where its items are in the whole samples
    inside: Tensor  # [B, K_r] bool, False at padding


def greedy(logits: Tensor, k: Tensor, k_max: int, penalty: Penalty) -> Tensor:
    """int64 [B, K]: the highest logits of each round in turn, descending, ties by lower index; then -1.

    Nothing here waits for the device.

    Args:
        logits: [B, n] of the first round, -inf where nothing may be kept; NaN is the caller's to find.
        k: int64 [B], on the device.
        k_max: K, the largest k, known to the host.
    """
    picks = k.new_full((len(k), k_max), -1)
    for begin, best, _ in _greedy_rounds(logits, k, k_max, penalty):
        picks = _written(picks[:, None], best[:, None], begin)[:, 0]
    return picks


def adjusted(logits: Tensor, k: Tensor, k_max: int, penalty: Penalty) -> Tensor:
    """[B, n] the logits less what each item loses in `greedy`: a kept one when it was kept, another in the last round.

    The k highest of a row are what `greedy` keeps, as what an item loses only grows. Gradients pass to the logits and
    to lambda; what is kept is a constant. Arguments as for `greedy`.
    """
    near, done = torch.zeros_like(logits), torch.zeros_like(logits, dtype=torch.bool)
    with torch.no_grad():
        for _, best, now in _greedy_rounds(logits, k, k_max, penalty):
            near = torch.where(done, near, now)
            done |= samples_to_mask(best, logits.shape[1])
    return logits - penalty.weight[:, None] * near


def _greedy_rounds(logits: Tensor, k: Tensor, k_max: int, penalty: Penalty) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Of each round: [B] how many items are kept before it, [B, K_r] what it keeps, [B, n] the closeness before it."""
    rounds = min(penalty.rounds, k_max)
    width = -(-k_max // max(rounds, 1))  # no round keeps more of any row
    rank = torch.arange(width, device=k.device)
    near, taken = torch.zeros_like(logits), torch.zeros_like(logits, dtype=torch.bool)
    for r in range(rounds):
        begin, end = _bound(k, r, rounds), _bound(k, r + 1, rounds)
        now = (logits - penalty.weight[:, None] * near).masked_fill(taken, -torch.inf)
        # Not topk, which breaks ties as it likes.
        best = torch.sort(now, dim=-1, descending=True, stable=True).indices[:, :width]
        best = best.masked_fill(rank[: best.shape[1]] >= (end - begin)[:, None], -1)
        yield begin, best, near
        if r + 1 < rounds:
            taken = taken | samples_to_mask(best, logits.shape[1])
            near = torch.maximum(near, penalty.close.nearest(best[:, None])[:, 0])


def _bound(k: _Counts, r: int, rounds: int) -> _Counts:
    """b_r = ceil(k r / R)."""
    return (k * r + rounds - 1) // rounds


def _written(samples: Tensor, drawn: Tensor, begin: Tensor) -> Tensor:
    """samples [B, G, K] with the items of drawn [B, G, m], which end in -1, from place `begin` [B] on."""
    total = samples.shape[-1]
    place = begin[:, None, None] + torch.arange(drawn.shape[-1], device=samples.device)
    place = place.expand_as(drawn).masked_fill(drawn < 0, total)
    return torch.nn.functional.pad(samples, (0, 1)).scatter(-1, place, drawn)[..., :-1]
