"""Exact distributions over the k-subsets of n items, given one logit per item.

`PlackettLuce` draws items one after another without replacement (Gumbel top-k): its law is that of the ORDERED
picks, the steps of a Markov decision process. `ConditionalBernoulli` is a law of the set itself: p(S) ~ exp(sum of
the logits in S) for |S| = k. With k = 1 both are the softmax; for larger k the same logits mean different things, so
warm up and train in one family.

Shapes: B rows, n items, G samples of a row, K = the largest k of the batch. Rows may differ in k (a tensor) and in
size (a mask). Picks are int64 [B, G, K] and padded with -1 at the end. Log-probabilities, entropies and divergences
are in nats, float32 (float64 for float64 logits); all arithmetic is float64 inside, where the device has it.
"""

from __future__ import annotations

from gripvlm.grip.policy.conditional_bernoulli import ConditionalBernoulli
from gripvlm.grip.policy.plackett_luce import PlackettLuce, band_mask
from gripvlm.grip.policy.subsets import picks_to_mask

__all__ = ["ConditionalBernoulli", "PlackettLuce", "band_mask", "picks_to_mask"]
