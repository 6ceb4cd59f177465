"""The scorer's layers: a block of its trunk, and the update of the scores by what is kept already."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Block", "Update"]

DIVERSITY_WIDTH = 32
"""Channels in which the diversity term compares tokens."""


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


class Update(nn.Module):
    """How the scores of a batch change once some tokens are kept.

    Every token attends to the kept ones, then a small MLP that knows the budget gives the change of its score, and with
    `diversity` it loses lambda x the largest cosine with a kept token.

    1. Tokens attend to the kept ones alone, so that being kept needs no mark of its own, and to a place of zeros, which
       takes the attention where nothing kept is alike.
    2. Queries, keys and values come from the trunk's states, and so once for all samples of a sequence.
    3. lambda = softplus of a linear function of the budget, 0.02 at first; the change is 0 at first. A scorer begins
       as one that does not look at what is kept.
    """

    def __init__(self, width: int, heads: int, film: bool, diversity: bool) -> None:
        super().__init__()
        self.heads, self.diversity = heads, diversity
        self.ask, self.kept, self.told = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.norm, self.mix = nn.LayerNorm(width), nn.Linear(width, width)
        self.change = nn.Linear(width, 1)
        nn.init.zeros_(self.change.weight)
        nn.init.zeros_(self.change.bias)
        if film:
            self.film = nn.Linear(width, 2 * width)
            nn.init.zeros_(self.film.weight)
            nn.init.zeros_(self.film.bias)
        if diversity:
            self.compare = nn.Linear(width, DIVERSITY_WIDTH, bias=False)
            self.penalty = nn.Linear(width, 1)
            nn.init.zeros_(self.penalty.weight)
            nn.init.constant_(self.penalty.bias, -4.0)

    def forward(self, x: Tensor, kept: Tensor, film: Tensor | None) -> Tensor:
        """[B, G, n] float32 changes of the scores.

        Args:
            x: [B, n, width] states of the tokens.
            kept: int64 [B, G, m] tokens that are kept, -1 at padding.
            film: [B, width] what is known of the budget that is left, or None.
        """
        batch, group, m = kept.shape
        mine = self.kept(x).gather(1, kept.clamp_min(0).flatten(1)[..., None].expand(-1, -1, 2 * x.shape[-1]))
        keys, values = F.pad(mine.view(batch * group, m, -1), (0, 0, 1, 0)).chunk(2, dim=-1)
        mask = F.pad(kept >= 0, (1, 0), value=True).view(batch * group, 1, 1, m + 1)
        queries = self.ask(x).repeat_interleave(group, 0)
        told = self.told(attend(queries, keys, values, mask, self.heads)).unflatten(0, (batch, group))
        y = self.norm(x[:, None] + told)
        if film is not None:
            scale, shift = self.film(film)[:, None, None].chunk(2, dim=-1)
            y = y * (1 + scale) + shift
        change = self.change(F.gelu(self.mix(y))).squeeze(-1).float()
        return change - self._alike(x, kept, film) if self.diversity else change

    def _alike(self, x: Tensor, kept: Tensor, film: Tensor | None) -> Tensor:
        """[B, G, n]: lambda x the largest cosine of each token with a kept one."""
        raw: Tensor = self.penalty.bias if film is None else self.penalty(film)[:, :, None]  # [1] or [B, 1, 1]
        places = F.normalize(self.compare(x).float(), dim=-1)
        wide = (-1, -1, places.shape[-1])
        with torch.no_grad():  # which is nearest; its cosine alone is kept for the backward pass
            others = places.gather(1, kept.clamp_min(0).flatten(1)[..., None].expand(wide)).unflatten(1, kept.shape[1:])
            cosines = torch.einsum("bnd,bgmd->bgnm", places, others)
            nearest = cosines.masked_fill((kept < 0)[:, :, None], -2.0).argmax(-1)  # [B, G, n]
            nearest = kept.clamp_min(0).gather(-1, nearest)
        other = places.gather(1, nearest.flatten(1)[..., None].expand(wide)).unflatten(1, nearest.shape[1:])
        cosine = (places[:, None] * other).sum(-1)
        return F.softplus(raw.float()) * cosine


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, heads: int) -> Tensor:
    """Scaled dot-product attention by heads; mask [B, 1, 1, keys] bool."""
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
