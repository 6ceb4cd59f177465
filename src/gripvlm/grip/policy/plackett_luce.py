"""Plackett-Luce: picks without replacement, one softmax after another."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from gripvlm.errors import InputError
from gripvlm.grip.policy.subsets import FAR, SubsetPolicy, per_pick, picks_to_mask, uniform_noise

__all__ = ["PlackettLuce", "band_mask"]


class PlackettLuce(SubsetPolicy):
    """k picks without replacement, each from the softmax over the items that are left. The law of ORDERED picks.

    p(a) = prod_j exp(s_{a_j}) / sum_{i left at j} exp(s_i). A sample is the top-k of s + Gumbel noise (Kool, van Hoof
    and Welling, arXiv 1903.06059), so that one ranking serves every k: the first k' picks have the law of k = k'.

    1. What is left at a step is never found by subtraction, which loses everything on peaked logits. It is the
       log-sum-exp of the never-picked items, carried backwards over the picks; a step is log sigmoid(s_a - left). No
       sort, O(n + k) a sample. B = G = 16, one core, ms: log_prob 1.5, with backward 3.4, sample 2.6 at n = 256,
       k = 64; 17, 42 and 47 at n = 4096, k = 512.
    2. Entropy and KL are those of the ordered law. A bonus on this entropy also rewards shuffling, and this KL is an
       upper bound of the sets' KL.

    Args and raises: see `SubsetPolicy`.
    """

    def sample(self, samples: int = 1, *, generator: torch.Generator | None = None, antithetic: bool = False) -> Tensor:
        """int64 [B, G, K]: ordered picks.

        Args:
            samples: G, at least 1.
            generator: its device is where the noise is drawn, so that a CPU generator gives the same on any device.
            antithetic: samples 2i and 2i + 1 share their noise as u and 1 - u. Either still has Gumbel noise, so each
                is an exact sample; the two of a pair depend on each other. An odd last one has no partner.
        """
        uniform = uniform_noise(self.logits, (samples, self.n), generator, antithetic)
        keys = self._lowered(-torch.inf).detach()[:, None] - (-uniform.log()).log()
        return keys.topk(self.kmax, dim=-1).indices.masked_fill(self._padding[:, None], -1)

    def mode(self) -> Tensor:
        """int64 [B, K]: the most probable picks: the k largest logits in descending order, ties by lower index."""
        return self._top()

    def log_prob(self, picks: Tensor) -> Tensor:
        """[B, G]: of the ordered picks [B, G, K]. Hundreds of nats at large k: divide by k before clipping a ratio."""
        return self._out(self._steps(picks).sum(-1))

    def step_log_probs(self, picks: Tensor) -> Tensor:
        """[B, G, K]: of each pick given those before it; 0 at padding."""
        return self._out(self._steps(picks))

    def step_entropy(self, picks: Tensor) -> Tensor:
        """[B, G, K]: the entropy of each pick given those before it, exact; 0 at padding.

        Its sum over K is an unbiased estimate of the entropy of the ordered law when the picks are samples of it, and
        a far better one than -log_prob. Its gradient holds the picks fixed, and so leaves out how the logits move
        them. With p the probability of the pick made, H = h(p) + (1 - p) H(the rest), again carried backwards.
        """
        odds, left, spare = self._walk(self._checked_picks(picks))
        p, q = odds.sigmoid(), (-odds).sigmoid()
        chance = spare.softmax(-1)
        return self._backwards(
            p * softplus(-odds) + q * softplus(odds), -(chance * spare.log_softmax(-1)).sum(-1), left
        )

    def step_kl(self, other: PlackettLuce, picks: Tensor) -> Tensor:
        """[B, G, K]: KL(this || other) of each pick given those before it, exact; 0 at padding.

        Sums to an unbiased estimate of the ordered laws' KL as `step_entropy` does, and with the same caveat.
        """
        self._comparable(other)
        mine, left, spare = self._walk(self._checked_picks(picks))
        theirs, _, spare_of_theirs = other._walk(picks)
        kept = mine.sigmoid() * (logsigmoid(mine) - logsigmoid(theirs))
        passed = (-mine).sigmoid() * (logsigmoid(-mine) - logsigmoid(-theirs))
        gap = spare.log_softmax(-1) - spare_of_theirs.log_softmax(-1)
        return self._backwards(kept + passed, (spare.softmax(-1) * gap).sum(-1), left)

    def entropy(self, picks: Tensor) -> Tensor:
        """[B, G]: an estimate of the entropy of the ordered law: the sum of `step_entropy`."""
        return self.step_entropy(picks).sum(-1)

    def kl(self, other: PlackettLuce, picks: Tensor) -> Tensor:
        """[B, G]: an estimate of the KL of the ordered laws: the sum of `step_kl`."""
        return self.step_kl(other, picks).sum(-1)

    def _steps(self, picks: Tensor) -> Tensor:
        """[B, G, K], wide: `step_log_probs`."""
        odds, _, _ = self._walk(self._checked_picks(picks))
        return logsigmoid(odds).masked_fill(self._padding[:, None], 0.0)

    def _walk(self, picks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The log-odds of each pick against what is left after it [B, G, K], log of what is left at each step
        [B, G, K + 1], and the logits of the never-picked items [B, G, n] (`FAR` elsewhere)."""
        logits = self._lowered(FAR)
        own = per_pick(logits, picks.clamp_min(0)).masked_fill(self._padding[:, None], FAR)
        spare = logits[:, None].masked_fill(picks_to_mask(picks, self.n), FAR)
        left = _cumulative(torch.cat([own, spare.logsumexp(-1, keepdim=True)], -1))
        return own - left[..., 1:], left, spare

    def _backwards(self, terms: Tensor, last: Tensor, left: Tensor) -> Tensor:
        """[B, G, K]: x_j = t_j + (1 - p_j) x_{j+1}, x_{K+1} = last, by 1 - p_j = left_{j+1} / left_j; all are >= 0."""
        terms = torch.cat([terms.masked_fill(self._padding[:, None], 0.0), last[..., None]], -1)
        logs = left + terms.clamp_min(torch.finfo(terms.dtype).tiny).log()
        value = (_cumulative(logs) - left).exp()[..., :-1]
        return self._out(value.masked_fill(self._padding[:, None], 0.0))


def band_mask(logits: Tensor, k: int | Tensor, band: int, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Exploration around rank k only: the items always in, and all those that may be in; bool [B, n] each.

    With ranks counted from 0 in the order of `mode()`, the first k - band items are forced and the first k + band are
    allowed; masked and -inf items are neither. The restricted policy is then an ordinary law over the rest, so that
    its log-probability, entropy and KL are exact too:

        forced, allowed = band_mask(logits, k, band)
        law = PlackettLuce(logits, k - forced.sum(-1), mask=allowed & ~forced)  # k' = min(k, band) of 2 band items
        picks = law.sample(16)
        chosen = picks_to_mask(picks, n) | forced[:, None]  # [B, G, n], k items each

    Off-policy, keep `forced` and `allowed` of the policy that sampled, and build the new law with them.

    Raises:
        InputError: as the laws do, or a band below 1.
    """
    if isinstance(band, bool) or not isinstance(band, int) or band < 1:
        raise InputError(f"band={band!r} is no number of ranks: type an int of 1 or more, such as band=32")
    law = PlackettLuce(logits, k, mask)
    ranked = law._lowered(-torch.inf).sort(dim=-1, descending=True, stable=True).indices
    rank = ranked.argsort(-1)
    return rank < law.k[:, None] - band, (rank < law.k[:, None] + band) & law.real


def _cumulative(logs: Tensor) -> Tensor:
    """log sum_{m >= j} exp(logs_m) along the last axis."""
    return logs.flip(-1).logcumsumexp(-1).flip(-1)
