"""DiffPrune-style baseline: tokens that are worth less get more noise; a denoiser stands in for the missing ones."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from gripvlm.errors import UnsupportedModelError
from gripvlm.grip.scorer import Scorer
from gripvlm.grip.train import Batch, Engine
from gripvlm.grip.train.stage import Stats
from gripvlm.grip.train.visionselector import soft_top_k

from .config import RelaxedConfig
from .masks import Relaxed

__all__ = ["EDGE", "Denoiser", "DiffPrune", "noised", "with_features"]

EDGE = 1e-4
"""Shares of variance lie between this and 1 less this, where their roots have gradients."""


def noised(features: Tensor, share: Tensor, noise: Tensor) -> Tensor:
    """[n, d] sqrt(a) x + sqrt(1 - a) r e: rows x that keep a share a [n] in (0, 1) of their variance.

    e is standard normal noise [n, d]; r the root mean square of the image's features, so that noise is of their size.
    """
    scale = features.square().mean().sqrt()
    return share.sqrt()[:, None] * features + (1 - share).sqrt()[:, None] * scale * noise


class Denoiser(nn.Module):
    """Rows [n, d] from noised rows [n, d] and their shares [n], each by itself: x + MLP(norm(x), share).

    It begins as the identity. Used in training only.
    """

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(features)
        self.enter = nn.Linear(features + 2, width)
        self.leave = nn.Linear(width, features)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(self, rows: Tensor, share: Tensor) -> Tensor:
        known = torch.stack((share, share.log() / -math.log(EDGE)), -1)
        change: Tensor = self.leave(nn.functional.gelu(self.enter(torch.cat((self.norm(rows), known), -1))))
        return rows + change


def with_features(batch: Batch, features: Sequence[Tensor]) -> Batch:
    """The batch with other rows [n, d] for its images, in order; gradients flow through them.

    Raises:
        UnsupportedModelError: images that also enter the language model at later layers.
    """
    rows = iter(features)
    samples = []
    for sample in batch.encoded.samples:
        if any(item.deepstack for item in sample):
            raise UnsupportedModelError(
                f"diffprune adds noise to an image's rows, but {batch.encoded.model_type} also adds rows at later "
                "layers: use another --relaxation, such as soft_topk"
            )
        samples.append(tuple(replace(item, features=next(rows).to(item.features.dtype)) for item in sample))
    return replace(batch, encoded=replace(batch.encoded, samples=tuple(samples)))


class DiffPrune(Relaxed):
    """Loss: minus the reward (`probability` or `log_prob`) of the answer that the frozen model gives to denoised rows.

    a = soft top-k of the scores (it sums to k), x~ = sqrt(a) x + sqrt(1 - a) e, and the model sees denoiser(x~, a)
    in place of x, every token at its place. The temperature falls from tau_start to tau_end as a cosine.

    1. The denoiser's shape and loss are not known to us: here a residual MLP on each row, as wide as four times
       the scorer, trained by the same loss. It sees no other row, so it cannot bring back what noise took.
    2. Noise has the root mean square of the image's own features, since projected rows are not of unit size.
    3. Shares lie in [EDGE, 1 - EDGE].
    4. The scorer is that of every other variant, with the question and the budget; the paper's is a two-layer
       transformer for each budget.

    Inference is the hard top-k of clean rows, without the denoiser.
    """

    def __init__(self, config: RelaxedConfig, scorer: Scorer, engine: Engine) -> None:
        super().__init__(config, scorer, engine)
        self.denoiser = Denoiser(scorer.config.features, 4 * scorer.config.width).to(engine.model.device)

    def modules(self) -> dict[str, nn.Module]:
        return {"denoiser": self.denoiser}

    def losses(self, batch: Batch, progress: float, random: torch.Generator) -> Iterator[tuple[Tensor, Stats]]:
        config = self.config
        inputs, counts, scores = self.scored(batch, random)
        tau = config.tau_end + (config.tau_start - config.tau_end) * (1 + math.cos(math.pi * progress)) / 2
        mask = soft_top_k(scores, counts, tau)
        share = mask * (1 - 2 * EDGE) + EDGE
        rows = []
        for sequence, sizes in enumerate(inputs.parts):
            n = sum(sizes)
            clean, kept = inputs.features[sequence, :n], share[sequence, :n]
            noise = torch.randn(clean.shape, generator=random).to(clean)
            rows += self.denoiser(noised(clean, kept, noise), kept).split(sizes)
        noisy = with_features(batch, rows)
        self.engine.tokens += sum(batch.text_lengths) + int(batch.sizes.sum())
        reward = self.reward_of(self.engine.forced_log_probs(noisy, self.engine.whole(noisy)), batch)
        top = mask.detach().square().sum(-1) / counts
        yield -reward.mean(), {"reward": float(reward.detach().mean()), "hardness": float(top.mean()), "tau": tau}
