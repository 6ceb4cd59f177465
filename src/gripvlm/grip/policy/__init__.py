"""Exact distributions over the k-subsets of n items, given one logit per item.

`PlackettLuce` draws items one after another without replacement (Gumbel top-k): it is a distribution of the ORDERED
samples, the steps of a Markov decision process. With k = 1 it is the softmax.

Shapes: B rows, n items, G samples of a row, K = the largest k of the batch. Rows may differ in k (a tensor) and in
size (a mask). Samples are int64 [B, G, K] indices, padded with -1 at the end. Log-probabilities, entropies and
divergences are in nats, float32 (float64 for float64 logits). Inside, arithmetic is float64 where the device has it.
"""

from __future__ import annotations

from gripvlm.grip.policy.plackett_luce import PlackettLuce
from gripvlm.grip.policy.subsets import SubsetPolicy, samples_to_mask

__all__ = ["PlackettLuce", "SubsetPolicy", "samples_to_mask"]
