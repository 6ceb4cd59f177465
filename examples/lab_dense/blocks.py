"""Attention for many questions behind one prompt: each sees the prompt's pictures and itself only.

With a mask over the whole sequence most of the work goes into pairs that the mask removes: with 24 questions behind
60 visual tokens, six of seven pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface

NAME = "lab_blocks"


@dataclass
class Blocks:
    """Where the questions of a packed batch are.

    prefix: tokens before the first question, the same in every row of the batch.
    index: [b, s, t] position of token t of question s; the row's last one where the question is shorter.
    real: [b, s, t], false where it is.
    """

    prefix: int
    index: Tensor
    real: Tensor

    @classmethod
    def of(cls, segment: Tensor) -> Blocks:
        """segment: [b, l], 0 in the prefix, 1.. in a question, -1 in padding."""
        length = segment.shape[1]
        prefix = int((segment[0] == 0).sum())
        count = int(segment.max())
        sizes = torch.stack([(segment == s).sum(1) for s in range(1, count + 1)], 1)  # [b, s]
        start = prefix + sizes.cumsum(1) - sizes
        step = torch.arange(int(sizes.max()), device=segment.device)
        index = (start[..., None] + step).clamp(max=length - 1)
        return cls(prefix, index, step < sizes[..., None])


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    blocks: Blocks | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """query, key, value: [b, h, l, d]; returns [b, l, h, d]. Positions of no question and padding come out as zero."""
    if blocks is None:
        raise ValueError(f"{NAME} attention needs blocks=Blocks.of(segment)")
    # Rotary positions leave float32 under autocast.
    query, key = query.to(value.dtype) * scaling, key.to(value.dtype)
    b, h, _, d = query.shape
    p = blocks.prefix
    first = F.scaled_dot_product_attention(query[:, :, :p], key[:, :, :p], value[:, :, :p], is_causal=True, scale=1.0)
    s, t = blocks.index.shape[1:]
    flat = blocks.index.reshape(b, 1, s * t, 1).expand(-1, h, -1, d)
    q, k, v = (x.gather(2, flat) for x in (query, key, value))  # [b, h, s * t, d]
    before = q @ key[:, :, :p].transpose(2, 3)
    hidden = torch.ones(t, t, dtype=torch.bool, device=query.device).triu(1)
    inside = q.view(b, h, s, t, d) @ k.view(b, h, s, t, d).transpose(3, 4)
    scores = torch.cat([before.view(b, h, s, t, p), inside.masked_fill(hidden, -torch.inf)], -1)
    share = scores.softmax(-1)
    mixed = (share[..., :p].reshape(b, h, s * t, p) @ value[:, :, :p]).view(b, h, s, t, d)
    mixed = mixed + share[..., p:] @ v.view(b, h, s, t, d)
    out = torch.zeros_like(query)
    out[:, :, :p] = first
    out = out.scatter_add(2, flat, mixed.view(b, h, s * t, d) * blocks.real.view(b, 1, s * t, 1))
    return out.transpose(1, 2), None


AttentionInterface.register(NAME, attention)
