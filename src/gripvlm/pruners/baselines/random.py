"""Keep a uniformly random subset: the baseline that a method must beat."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from gripvlm.pruners.base import ScorePruner
from gripvlm.types import VisualTokens


@dataclass(frozen=True)
class Random(ScorePruner):
    """Uniform over the k-subsets of n rows, the same draw for the same image every time.

    The generator is seeded from (seed, the image's `key`, its place in the prompt, n). The key
    comes from the pixels, not from the features, so rounding in the vision encoder cannot move it:
    the draw is the same in a batch of N as in N batches of one, and on any device, and different
    images get different subsets. Draws for growing k are nested, since all of them rank
    by the same numbers.

    Strong in practice: see UniPruneBench, arXiv 2511.02650.

    Attributes:
        seed: any int; one seed is one draw per image.
    """

    name = "random"
    needs = frozenset({"key"})
    source = "baseline; UniPruneBench, arXiv 2511.02650"

    seed: int = 0

    def score(self, tokens: VisualTokens) -> Tensor:
        identity = f"{self.seed}/{tokens.key}/{tokens.image}/{tokens.n}".encode()
        # 7 bytes: a generator's seed has 63 bits.
        state = int.from_bytes(hashlib.blake2b(identity, digest_size=7).digest(), "little")
        generator = torch.Generator().manual_seed(state)
        # Drawn on the CPU: generators of devices differ.
        ranks = torch.randperm(tokens.n, generator=generator)
        return ranks.float().to(tokens.features.device)
