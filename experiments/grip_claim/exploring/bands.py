"""Draws from one band of tokens with like scores: what CaCoVID calls combination-space sampling."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gripvlm.grip.policy import NEG_INF, PlackettLuce, uniform_noise, wide_type
from gripvlm.grip.rounds import Penalty, Rounds, adjusted

__all__ = ["Bands", "bands_of", "capped"]


class Bands:
    """A policy over k-subsets: one of M bands is drawn, and k items inside it as `law` draws them.

    After CaCoVID (arXiv 2602.01649) and its code (LivingFutureLab/CaCoVID, commit 384752d, `grouped_sample`). Items are
    ordered by score and cut into M = max(floor(n / 2k), 1) bands of as many items each. A band is drawn with the
    probability of all its items, held between 1 / M^2 and twice the mean, 2 / M (itself kept in [0.1, 0.9]); what that
    takes from a band goes to the others in proportion. No subset mixes tokens of unlike score, so there are far fewer.

    The bands do not overlap, so a subset's probability is exact: that of its band times that of `law` inside it.

    1. There the loss has a ratio for each token's own yes or no, as if they were independent; here for the subset.
    2. There every frame has its bands; here a sequence, of one image or of all of a prompt.
    3. With rounds, scores are what they leave of the logits (`adjusted`), and inside a band tokens lose as ever.
    4. The lower limit holds before the upper one is applied; there again after each band that is held.

    Shapes are those of `gripvlm.grip.policy`. `mode` is that of `law`: the k highest.

    Args:
        law: what would be drawn without bands.
        valid: bool [B, n], True for the items that can be drawn.
        band: int64 [B, n] the band of each item, -1 for none, where subsets were drawn before `law` moved; by default
            by `law`'s own scores.
    """

    def __init__(self, law: PlackettLuce | Rounds, valid: Tensor, band: Tensor | None = None) -> None:
        self.law, self.logits, self.k, self.k_max = law, law.logits, law.k, law.k_max
        scores = adjusted(law.logits, law.k, law.k_max, law.penalty) if isinstance(law, Rounds) else law.logits
        scores = scores.to(wide_type(scores.device)).masked_fill(~valid, -torch.inf)
        self.band = bands_of(scores.detach(), self.k, valid) if band is None else band
        self.log_band = _log_probabilities(scores, self.band)  # [B, M]
        self._inside: tuple[Tensor, bool, PlackettLuce | Rounds, Tensor] | None = None

    def sample(self, num_samples: int = 1, *, generator: torch.Generator | None = None) -> Tensor:
        """int64 [B, G, K]: ordered samples, each from one band."""
        with torch.no_grad():
            width = self.log_band.shape[1]
            uniform = uniform_noise(self.log_band, num_samples, width, generator)
            drawn = (self.log_band[:, None] - (-uniform.log()).log()).argmax(-1)  # [B, G]
            inside = self._law(drawn).sample(1, generator=generator)
        return inside.view(len(self.k), num_samples, -1)

    def mode(self) -> Tensor:
        return self.law.mode()

    def log_prob(self, samples: Tensor) -> Tensor:
        return self.step_log_probs(samples).sum(-1)

    def step_log_probs(self, samples: Tensor) -> Tensor:
        """[B, G, K]: of each item given those before it; the first has its band's as well. About -1e30 across bands."""
        law, flat = self._walk(samples)
        steps = law.step_log_probs(flat).view(samples.shape)
        return _with_first(steps, self.log_band.gather(1, self._drawn(samples)))

    def step_entropy(self, samples: Tensor) -> Tensor:
        law, flat = self._walk(samples)
        band = -(self.log_band.exp() * self.log_band).sum(-1, keepdim=True)
        return _with_first(law.step_entropy(flat).view(samples.shape), band)

    def step_kl(self, other: Bands, samples: Tensor) -> Tensor:
        """[B, G, K]; `other` has the same bands."""
        law, flat = self._walk(samples)
        band = (self.log_band.exp() * (self.log_band - other.log_band)).sum(-1, keepdim=True)
        inside: Any = other._walk(samples)[0]
        return _with_first(law.step_kl(inside, flat).view(samples.shape), band)

    def entropy(self, samples: Tensor) -> Tensor:
        return self.step_entropy(samples).sum(-1)

    def kl(self, other: Bands, samples: Tensor) -> Tensor:
        return self.step_kl(other, samples).sum(-1)

    def _drawn(self, samples: Tensor) -> Tensor:
        """[B, G]: the band of each sample, by its first item."""
        return self.band.gather(1, samples[..., 0].clamp_min(0)).clamp_min(0)

    def _walk(self, samples: Tensor) -> tuple[PlackettLuce | Rounds, Tensor]:
        """The law of each sample in its band, and samples [B * G, 1, K] as it takes them; kept for the next call."""
        grad = torch.is_grad_enabled()
        if self._inside is None or self._inside[0] is not samples or (grad and not self._inside[1]):
            self._inside = samples, grad, self._law(self._drawn(samples)), samples.flatten(0, 1)[:, None]
        return self._inside[2:]

    def _law(self, drawn: Tensor) -> PlackettLuce | Rounds:
        """`law` for B * G rows, each inside its band of drawn [B, G]."""
        group = drawn.shape[1]
        mask = (self.band[:, None] == drawn[..., None]).flatten(0, 1)
        logits, k = self.logits.repeat_interleave(group, 0), self.k.repeat_interleave(group, 0)
        if isinstance(self.law, PlackettLuce):
            return PlackettLuce(logits, k, mask)
        of: Any = _Grouped(self.law.penalty.close, group)
        weight = self.law.penalty.weight.repeat_interleave(group, 0)
        return Rounds(logits, k, mask, Penalty(self.law.penalty.rounds, weight, of))


class _Grouped:
    """A `Closeness` of B rows as one of B * G rows, without a copy of its table."""

    def __init__(self, close: Any, group: int) -> None:
        self.close, self.group = close, group

    def nearest(self, kept: Tensor) -> Tensor:
        """[B * G, 1, n] from kept [B * G, 1, m]."""
        near: Tensor = self.close.nearest(kept.unflatten(0, (-1, self.group))[:, :, 0])
        return near.flatten(0, 1)[:, None]


def bands_of(scores: Tensor, k: Tensor, valid: Tensor) -> Tensor:
    """int64 [B, n]: the band of each item, 0 for the highest scores [B, n], -1 where not `valid`.

    The first n mod M bands have one item more.
    """
    n = valid.sum(-1)
    number = (n // (2 * k).clamp_min(1)).clamp_min(1)
    least, more = (n // number)[:, None], (n % number)[:, None]
    order = scores.masked_fill(~valid, -torch.inf).sort(dim=-1, descending=True, stable=True).indices
    rank = torch.empty_like(order).scatter_(-1, order, torch.arange(order.shape[1], device=k.device).expand_as(order))
    wide = more * (least + 1)  # items of the bands that have one more
    band = torch.where(rank < wide, rank // (least + 1), more + (rank - wide) // least.clamp_min(1))
    return band.masked_fill(~valid, -1)


def _log_probabilities(scores: Tensor, band: Tensor) -> Tensor:
    """[B, M] log-probability of each band of scores [B, n]; `NEG_INF` where a row has fewer bands."""
    number = band.amax(-1) + 1
    each = torch.arange(int(number.max()), device=band.device)
    # NEG_INF, not -inf: a row without such a band has gradients too.
    mass = scores[..., None].masked_fill(band[..., None] != each, NEG_INF).logsumexp(1)  # [B, M]
    exists = each < number[:, None]
    share = capped(mass.masked_fill(~exists, NEG_INF).softmax(-1), number)
    return torch.where(exists, share.clamp_min(1e-30).log(), NEG_INF)


def capped(shares: Tensor, number: Tensor) -> Tensor:
    """[B, M] shares with sum 1, of which the first `number` [B] are there, held within the limits of `Bands`."""
    exists = torch.arange(shares.shape[1], device=shares.device) < number[:, None]
    lifted = shares.maximum((1 / number.square())[:, None].to(shares)) * exists
    lifted = lifted / lifted.sum(-1, keepdim=True)
    cap = torch.where(number > 1, (2 / number).clamp(0.1, 0.9), 1.0)[:, None].to(shares)
    with torch.no_grad():
        # The j largest are held at the cap: the fewest such that the next is below it once the rest fills what is left.
        high, order = lifted.sort(dim=-1, descending=True)
        j = torch.arange(high.shape[1], device=high.device)
        left = 1 - high.cumsum(-1) + high
        fits = high * (1 - j * cap) <= cap * left * (1 + 1e-9)
        held = torch.empty_like(order).scatter_(-1, order, j.expand_as(order)) < fits.int().argmax(-1)[:, None]
    rest = lifted.masked_fill(held, 0.0)
    spare = 1 - cap * held.sum(-1, keepdim=True)
    return torch.where(held, cap, rest * spare / rest.sum(-1, keepdim=True).clamp_min(1e-30))


def _with_first(steps: Tensor, first: Tensor) -> Tensor:
    """[B, G, K] steps with first [B, G] or [B, 1] added to the first of each."""
    return torch.cat((steps[..., :1] + first[..., None].to(steps), steps[..., 1:]), -1)
