"""CLSE: keep tokens that are looked at and whose fine structure the first layers change most, in stages."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gripvlm.pruners.base import LLMScorePruner
from gripvlm.pruners.ops.attention import last_token_attention
from gripvlm.pruners.ops.schedules import ratio_schedule, same_depths
from gripvlm.types import LLMTokens

EPS = 1e-6


def fine_structure(rows: Tensor, grid: tuple[int, int], cutoff: float) -> Tensor:
    """[n] mean over channels of |high-pass of the channel's h x w picture| at each token, of [n, d] rows.

    The filter is 1 - exp(-r^2 / (2 (cutoff min(h // 2, w // 2))^2)), r the distance to the zero frequency.
    """
    h, w = grid
    spectrum = torch.fft.fft2(rows.float().T.reshape(-1, h, w))
    y, x = (torch.fft.fftfreq(size, 1 / size, device=rows.device) for size in (h, w))
    square = y[:, None].square() + x.square()
    # A grid of one row or column: every frequency but zero passes.
    width = max(cutoff * min(h // 2, w // 2), EPS)
    passed = torch.fft.ifft2(spectrum * (1 - torch.exp(-square / (2 * width**2))))
    return passed.abs().mean(dim=0).flatten()


def evolution(before: Tensor, after: Tensor, temperature: float) -> Tensor:
    """[n] in (0, 1): how much a score [n] has changed, sigmoid(standardised relative change / temperature)."""
    change = ((after - before).abs() / (before.mean() + before + EPS)).clamp(max=1)
    return torch.sigmoid((change - change.mean()) / (change.std() + EPS) / temperature)


@dataclass(frozen=True)
class CLSE(LLMScorePruner):
    """Cross-layer spectral evolution (arXiv 2606.24165): score_j = evolution_j x attention_j, in three stages.

    First stage, before layer 1 of 32: s_j is the high-frequency part of the hidden states at token j (`fine_structure`,
    a filtered 2D Fourier transform of the picture that the tokens make), of what enters the first layer and of what
    enters this one; evolution_j says how far it has changed (`evolution`). Attention is that of the prompt's last token
    in the layer before, the mean over heads; before the layers 11 and 21, where the tokens are no grid any more, it
    ranks alone.

    1. How many tokens stay is solved from `keep`, in the code's proportions 1.72 : 1.09 : 0.32. Its settings 192, 128
       and 64 keep 330/210/62, 220/140/41 and 110/70/20 of 576; with layer 0, which sees all, 208.1, 144.6 and 81.1 on
       average.
    2. For budgets so large that the first stage drops nothing, the next one is the first.

    Attributes:
        layers: three, of a model of 32; other depths drop at the same relative ones.
        cutoff: width of the high-pass filter, as a share of half of the shorter side.
        temperature: above 0.
    """

    name = "clse"
    needs = frozenset({"features", "grid"})
    llm_needs = frozenset({"hidden", "last"})
    source = "CLSE, arXiv 2606.24165 (ECCV 2026)"

    layers: tuple[int, ...] = (1, 11, 21)
    cutoff: float = 0.1
    temperature: float = 0.1

    def __post_init__(self) -> None:
        valid = len(self.layers) == 3 and min(self.layers) >= 1 and self.cutoff > 0 and self.temperature > 0
        allowed = "layers=(1,11,21), three of 1 or more, cutoff=0.1 and temperature=0.1, both above 0"
        self.require(valid, allowed)

    def schedule(self, n: int, keep: int, num_layers: int) -> dict[int, int]:
        layers = same_depths(sorted(self.layers), 32, num_layers)
        return ratio_schedule(self.name, n, keep, num_layers, dict(zip(layers, (1.72, 1.09, 0.32), strict=False)))

    def score_at_layer(self, layer: int, tokens: LLMTokens) -> Tensor:
        looked = last_token_attention(tokens)
        # A single token has nothing to be compared with.
        if tokens.n < max(2, tokens.input.n):
            return looked
        assert tokens.input.grid is not None  # promised by `needs`
        assert tokens.hidden is not None
        states = (tokens.input.features.to(looked.device), tokens.hidden)
        before, after = (fine_structure(rows, tokens.input.grid, self.cutoff) for rows in states)
        return evolution(before, after, self.temperature) * looked
