"""Exact distributions over the k-subsets of n items, given one logit per item.

Shapes: B rows, n items, G samples of a row, K = the largest k of the batch. Rows may differ in k (a tensor) and in
size (a mask). Samples are int64 [B, G, K] indices, padded with -1 at the end. Log-probabilities, entropies and
divergences are in nats, float32 (float64 for float64 logits). Inside, arithmetic is float64 where the device has it.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from gripvlm.errors import InputError

NEG_INF = -1e30
"""Stands for -inf where a gradient passes: exp gives 0, and NEG_INF - NEG_INF is not NaN."""


class SubsetPolicy:
    """The logits, k and mask of a distribution over subsets; `sample` and `log_prob` are its subclasses'.

    Args:
        logits: [B, n], any float type. -inf marks an item that is never sampled.
        k: int64 [B], or one int for all rows: the size of the subset, at least `smallest`.
        mask: bool [B, n], True for an item that exists. None: all exist.

    Attributes:
        valid: bool [B, n], True for the items that can be sampled.
        k_max: the width K of samples.
        smallest: the smallest k that is allowed.

    Raises:
        InputError: NaN, +inf or |logit| > 1e20 at an item that exists, or a row with fewer than k items.
    """

    smallest: ClassVar[int] = 1

    def __init__(self, logits: Tensor, k: int | Tensor, mask: Tensor | None = None) -> None:
        self.logits = logits
        self.k = torch.as_tensor(k, device=logits.device).expand(len(logits))
        exists = torch.ones_like(logits, dtype=torch.bool) if mask is None else mask
        self.valid = exists & (logits.detach() > -torch.inf)
        finite = logits.detach().abs() <= 1e20  # below, differences of logits stay exact to a few bits
        if bool((exists & ~finite & (logits.detach() != -torch.inf)).any()):
            raise InputError("logits of a policy are -inf (never sampled) or finite up to 1e20: mask the other items")
        available = self.valid.sum(-1)
        if bool(((self.k < self.smallest) | (self.k > available)).any()):
            raise InputError(
                f"k={self.k.tolist()}, and the rows have {available.tolist()} items that can be sampled: pass k from "
                f"{self.smallest} to that number"
            )
        self.k_max = int(self.k.max())
        # Rows of a smaller k end in -1.
        self._padding = torch.arange(self.k_max, device=self.k.device) >= self.k[:, None]  # [B, K]

    @property
    def n(self) -> int:
        """Items of a row, masked ones included."""
        return self.logits.shape[1]

    def mode(self) -> Tensor:
        """int64 [B, K]: the most probable sample: the k largest logits, descending, ties by lower index, then -1."""
        # Not topk, which breaks ties as it likes.
        ranked = self._centred(-torch.inf).sort(dim=-1, descending=True, stable=True).indices
        return ranked[:, : self.k_max].masked_fill(self._padding, -1)

    def _centred(self, fill: float) -> Tensor:
        """[B, n], wide: the logits less `_kth_largest`, `fill` at items that are never sampled."""
        wide = self.logits.to(wide_type(self.logits.device)).masked_fill(~self.valid, 0.0)
        return (wide - self._kth_largest()).masked_fill(~self.valid, fill)

    def _kth_largest(self) -> Tensor:
        """[B, 1], wide: the k-th largest logit, a constant: a centre that keeps what is near rank k exact."""
        wide = self.logits.detach().to(wide_type(self.logits.device)).masked_fill(~self.valid, -torch.inf)
        largest = wide.topk(max(self.k_max, 1), dim=-1).values.gather(-1, (self.k[:, None] - 1).clamp_min(0))
        return largest.masked_fill(largest == -torch.inf, 0.0)  # a row without items, whose k is 0

    def _narrowed(self, value: Tensor) -> Tensor:
        """`value` in the type the caller sees."""
        return value.to(torch.promote_types(self.logits.dtype, torch.float32))


class PlackettLuce(SubsetPolicy):
    """k items without replacement, each from the softmax over the items that are left: ORDERED samples.

    p(a) = prod_j exp(s_{a_j}) / sum_{i left at j} exp(s_i): the steps of a Markov decision process; with k = 1 it is
    the softmax. A sample is the top-k of s + Gumbel noise (Kool, van Hoof and Welling, arXiv 1903.06059), so that one
    ranking serves every k: the first k' items are distributed as for k'.

    1. What is left at a step is never computed by subtraction, which loses everything on peaked logits. It is the
       log-sum-exp of the items that are not in the sample, carried backwards over the steps; a step is
       log sigmoid(s_a - left). No sort, O(n + k) a sample. B = G = 16, one core, ms: log_prob 1.5, with backward 3.4,
       sample 2.6 at n = 256, k = 64; 17, 42 and 47 at n = 4096, k = 512.
    2. Entropy and KL are those of the ordered samples. A bonus on this entropy also rewards shuffling, and this KL is
       an upper bound of the sets' KL.

    Args and raises: see `SubsetPolicy`; k may be 0 here, and the row's one sample is empty then. Methods that take
    samples take those of `sample`, or `mode()[:, None]`.
    """

    smallest = 0

    def sample(self, num_samples: int = 1, *, generator: torch.Generator | None = None) -> Tensor:
        """int64 [B, G, K]: ordered samples; the noise is drawn on the generator's device, for all devices alike."""
        uniform = uniform_noise(self.logits, num_samples, self.n, generator)
        # Gumbel noise on detached logits: samples have no gradient, their log-probabilities have.
        keys = self._centred(-torch.inf).detach()[:, None] - (-uniform.log()).log()
        return keys.topk(self.k_max, dim=-1).indices.masked_fill(self._padding[:, None], -1)

    def log_prob(self, samples: Tensor) -> Tensor:
        """[B, G]: of ordered samples [B, G, K]. Hundreds of nats at large k: divide by k before clipping a ratio."""
        return self._narrowed(self._steps(samples).sum(-1))

    def step_log_probs(self, samples: Tensor) -> Tensor:
        """[B, G, K]: of each item given those before it; 0 at padding."""
        return self._narrowed(self._steps(samples))

    def step_entropy(self, samples: Tensor) -> Tensor:
        """[B, G, K]: the entropy of each step given those before it, exact; 0 at padding.

        Its sum over K is an unbiased estimate of the entropy of the ordered samples when they are drawn from this
        policy, and a far better one than -log_prob. Its gradient holds the samples fixed, and so leaves out how the
        logits move them.
        """
        # With p the probability of the item drawn, H = h(p) + (1 - p) H(the rest), carried backwards like `left`.
        odds, left, spare = self._walk(samples)
        p, q = odds.sigmoid(), (-odds).sigmoid()
        binary = p * softplus(-odds) + q * softplus(odds)
        last = -(spare.softmax(-1) * spare.log_softmax(-1)).sum(-1)
        return self._backwards(binary, last, left)

    def step_kl(self, other: PlackettLuce, samples: Tensor) -> Tensor:
        """[B, G, K]: KL(this || other) of each step given those before it, exact; 0 at padding.

        Sums to an unbiased estimate of the ordered samples' KL as `step_entropy` does, and with the same caveat.
        `other` has the same shape, mask and k.
        """
        odds, left, spare = self._walk(samples)
        other_odds, _, other_spare = other._walk(samples)
        drawn = odds.sigmoid() * (logsigmoid(odds) - logsigmoid(other_odds))
        passed = (-odds).sigmoid() * (logsigmoid(-odds) - logsigmoid(-other_odds))
        gap = spare.log_softmax(-1) - other_spare.log_softmax(-1)
        return self._backwards(drawn + passed, (spare.softmax(-1) * gap).sum(-1), left)

    def entropy(self, samples: Tensor) -> Tensor:
        """[B, G]: an estimate of the entropy of the ordered samples: the sum of `step_entropy`."""
        return self.step_entropy(samples).sum(-1)

    def kl(self, other: PlackettLuce, samples: Tensor) -> Tensor:
        """[B, G]: an estimate of the KL of the ordered samples: the sum of `step_kl`."""
        return self.step_kl(other, samples).sum(-1)

    def _steps(self, samples: Tensor) -> Tensor:
        """[B, G, K], wide: `step_log_probs`."""
        return logsigmoid(self._walk(samples)[0]).masked_fill(self._padding[:, None], 0.0)

    def _walk(self, samples: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The odds, what is left, and the spare items of each sample.

        Returns:
            [B, G, K] log-odds of each item against what is left after it, [B, G, K + 1] log of what is left at each
            step, and [B, G, n] logits of the items that are not in the sample (`NEG_INF` elsewhere).
        """
        logits = self._centred(NEG_INF)
        own = logits.gather(-1, samples.clamp_min(0).flatten(1)).view(samples.shape)
        # Padding at the end adds exp(NEG_INF) = 0 to what is left.
        own = own.masked_fill(self._padding[:, None], NEG_INF)
        spare = logits[:, None].masked_fill(samples_to_mask(samples, self.n), NEG_INF)
        left = _cumulative(torch.cat([own, spare.logsumexp(-1, keepdim=True)], -1))
        return own - left[..., 1:], left, spare

    def _backwards(self, terms: Tensor, last: Tensor, left: Tensor) -> Tensor:
        """[B, G, K]: x_j = t_j + (1 - p_j) x_{j+1}, x_{K+1} = last, by 1 - p_j = left_{j+1} / left_j; all are >= 0."""
        terms = torch.cat([terms.masked_fill(self._padding[:, None], 0.0), last[..., None]], -1)
        logs = left + terms.clamp_min(torch.finfo(terms.dtype).tiny).log()
        value = (_cumulative(logs) - left).exp()[..., :-1]
        return self._narrowed(value.masked_fill(self._padding[:, None], 0.0))


def samples_to_mask(samples: Tensor, n: int) -> Tensor:
    """bool [..., n]: True at the items that samples [..., K] name; -1 names none."""
    member = torch.zeros(*samples.shape[:-1], n + 1, dtype=torch.bool, device=samples.device)
    return member.scatter_(-1, samples.masked_fill(samples < 0, n), True)[..., :n]


def wide_type(device: torch.device) -> torch.dtype:
    """float64, or float32 on a device without it."""
    return torch.float32 if device.type == "mps" else torch.float64


def uniform_noise(logits: Tensor, num_samples: int, width: int, generator: torch.Generator | None) -> Tensor:
    """[B, G, width] in the open interval (0, 1), so that no log of it or of 1 less it is infinite."""
    dtype = wide_type(logits.device)
    device = logits.device if generator is None else generator.device
    # The wide type: float32 has a chance of 2^-24 for an exact 0.
    uniform = torch.rand(logits.shape[0], num_samples, width, dtype=dtype, device=device, generator=generator)
    edge = torch.finfo(dtype).eps / 2
    return uniform.to(logits.device).clamp(edge, 1 - edge)


def _cumulative(logs: Tensor) -> Tensor:
    """log sum_{m >= j} exp(logs_m) along the last axis."""
    return logs.flip(-1).logcumsumexp(-1).flip(-1)
