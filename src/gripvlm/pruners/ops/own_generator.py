"""Random numbers that belong to an image: the same in any batch and on any device."""

from __future__ import annotations

import hashlib

import torch

from gripvlm.types import VisualTokens


def own_generator(seed: int, tokens: VisualTokens) -> torch.Generator:
    """A CPU generator, seeded from (seed, the image's `key`, its place in the prompt, n).

    The key comes from the pixels, not from the features, so rounding in the vision encoder cannot move it: the draw is
    the same in a batch of N as in N batches of one, and on any device, and different images get different ones.
    """
    identity = f"{seed}/{tokens.key}/{tokens.image}/{tokens.n}".encode()
    # 7 bytes: a generator's seed has 63 bits. On the CPU: generators of devices differ.
    return torch.Generator().manual_seed(int.from_bytes(hashlib.blake2b(identity, digest_size=7).digest(), "little"))
