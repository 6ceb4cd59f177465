"""Plackett-Luce: samples without replacement, one softmax after another."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from gripvlm.grip.policy.subsets import NEG_INF, SubsetPolicy, gather_samples, samples_to_mask, uniform_noise

__all__ = ["PlackettLuce"]


class PlackettLuce(SubsetPolicy):
    """k items without replacement, each from the softmax over the items that are left: ORDERED samples.

    p(a) = prod_j exp(s_{a_j}) / sum_{i left at j} exp(s_i). A sample is the top-k of s + Gumbel noise (Kool, van Hoof
    and Welling, arXiv 1903.06059), so that one ranking serves every k: the first k' items are distributed as for k'.

    1. What is left at a step is never computed by subtraction, which loses everything on peaked logits. It is the
       log-sum-exp of the items that are not in the sample, carried backwards over the steps; a step is
       log sigmoid(s_a - left). No sort, O(n + k) a sample. B = G = 16, one core, ms: log_prob 1.5, with backward 3.4,
       sample 2.6 at n = 256, k = 64; 17, 42 and 47 at n = 4096, k = 512.
    2. Entropy and KL are those of the ordered samples. A bonus on this entropy also rewards shuffling, and this KL is
       an upper bound of the sets' KL.

    Args and raises: see `SubsetPolicy`.
    """

    def sample(self, num_samples: int = 1, *, generator: torch.Generator | None = None) -> Tensor:
        """int64 [B, G, K]: ordered samples.

        Args:
            num_samples: G, at least 1.
            generator: its device is where the noise is drawn, so that a CPU generator gives the same on any device.
        """
        uniform = uniform_noise(self.logits, num_samples, self.n, generator)
        # Gumbel noise on detached logits: samples have no gradient, their log-probabilities have.
        keys = self._centred(-torch.inf).detach()[:, None] - (-uniform.log()).log()
        return keys.topk(self.k_max, dim=-1).indices.masked_fill(self._padding[:, None], -1)

    def mode(self) -> Tensor:
        """int64 [B, K]: the most probable sample: the k largest logits in descending order, ties by lower index."""
        return self._top_k()

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
        odds, left, spare = self._walk(self._checked_samples(samples))
        p, q = odds.sigmoid(), (-odds).sigmoid()
        binary = p * softplus(-odds) + q * softplus(odds)
        last = -(spare.softmax(-1) * spare.log_softmax(-1)).sum(-1)
        return self._backwards(binary, last, left)

    def step_kl(self, other: PlackettLuce, samples: Tensor) -> Tensor:
        """[B, G, K]: KL(this || other) of each step given those before it, exact; 0 at padding.

        Sums to an unbiased estimate of the ordered samples' KL as `step_entropy` does, and with the same caveat.

        Raises:
            InputError: `other` has another shape or k, or never samples an item that this one samples.
        """
        self._check_comparable(other)
        odds, left, spare = self._walk(self._checked_samples(samples))
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
        odds, _, _ = self._walk(self._checked_samples(samples))
        return logsigmoid(odds).masked_fill(self._padding[:, None], 0.0)

    def _walk(self, samples: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The odds, what is left, and the spare items of each sample.

        Returns:
            [B, G, K] log-odds of each item against what is left after it, [B, G, K + 1] log of what is left at each
            step, and [B, G, n] logits of the items that are not in the sample (`NEG_INF` elsewhere).
        """
        logits = self._centred(NEG_INF)
        # Padding at the end adds exp(NEG_INF) = 0 to what is left.
        own = gather_samples(logits, samples.clamp_min(0)).masked_fill(self._padding[:, None], NEG_INF)
        spare = logits[:, None].masked_fill(samples_to_mask(samples, self.n), NEG_INF)
        left = _cumulative(torch.cat([own, spare.logsumexp(-1, keepdim=True)], -1))
        return own - left[..., 1:], left, spare

    def _backwards(self, terms: Tensor, last: Tensor, left: Tensor) -> Tensor:
        """[B, G, K]: x_j = t_j + (1 - p_j) x_{j+1}, x_{K+1} = last, by 1 - p_j = left_{j+1} / left_j; all are >= 0."""
        terms = torch.cat([terms.masked_fill(self._padding[:, None], 0.0), last[..., None]], -1)
        logs = left + terms.clamp_min(torch.finfo(terms.dtype).tiny).log()
        value = (_cumulative(logs) - left).exp()[..., :-1]
        return self._narrowed(value.masked_fill(self._padding[:, None], 0.0))


def _cumulative(logs: Tensor) -> Tensor:
    """log sum_{m >= j} exp(logs_m) along the last axis."""
    return logs.flip(-1).logcumsumexp(-1).flip(-1)
