"""The scorer's layers: a block of its trunk, and how much tokens lose by being like kept ones."""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Block", "Diversity"]

FIRST_PENALTY = 4.0
"""lambda of a new scorer: chosen on validation questions of lab-dense (experiments/grip_claim)."""


class Block(nn.Module):
    """Pre-norm self-attention, cross-attention and MLP, the first and last shifted and scaled by the budget."""

    def __init__(self, width: int, heads: int, cross: bool, film: bool) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3 if cross else 2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        if cross:
            # Queries, keys and values, and the output of cross-attention.
            self.ask, self.words = nn.Linear(width, width), nn.Linear(width, 2 * width)
            self.told = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        if film:
            self.film = nn.Linear(width, 4 * width)
            # The budget changes nothing at first.
            nn.init.zeros_(self.film.weight)
            nn.init.zeros_(self.film.bias)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None,
        words: Tensor | None = None,
        words_mask: Tensor | None = None,
        film: Tensor | None = None,
    ) -> Tensor:
        shifts = (0.0, 0.0, 0.0, 0.0) if film is None else self.film(film)[:, None].chunk(4, dim=-1)
        y = self.norms[0](x) * (1 + shifts[0]) + shifts[1]
        queries, keys, values = self.qkv(y).chunk(3, dim=-1)
        x = x + self.out(attend(queries, keys, values, mask, self.heads))
        if words is not None:
            keys, values = self.words(words).chunk(2, dim=-1)
            x = x + self.told(attend(self.ask(self.norms[2](x)), keys, values, words_mask, self.heads))
        return x + self.mlp(self.norms[1](x) * (1 + shifts[2]) + shifts[3])


class Diversity(nn.Module):
    """lambda [B]: how much a token loses by being like a kept one, in the unit of the scores.

    softplus of a linear function of what is known of the budget; 4 at first, for all budgets.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.penalty = nn.Linear(width, 1)
        nn.init.zeros_(self.penalty.weight)
        nn.init.constant_(self.penalty.bias, math.log(math.expm1(FIRST_PENALTY)))

    def forward(self, film: Tensor | None) -> Tensor:
        """[B] float32 from film [B, width]; [1] where no budget is known."""
        raw = self.penalty.bias if film is None else self.penalty(film).squeeze(-1)
        return F.softplus(raw.float())


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, heads: int) -> Tensor:
    """Scaled dot-product attention by heads; mask [B, 1, 1, keys] bool."""
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
