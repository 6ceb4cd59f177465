"""IVC-Prune: keep the positions that a model's rotary embedding reads places off, and what the question is about."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gripvlm.pruners.base import LLMScorePruner
from gripvlm.pruners.ops.ranking import descending, mask_of
from gripvlm.pruners.ops.schedules import one_layer_schedule, same_depths
from gripvlm.types import LLMTokens


@dataclass(frozen=True)
class IVCPrune(LLMScorePruner):
    """Implicit visual coordinates (arXiv 2602.03060), as the authors' code for Qwen2.5-VL computes it.

    Coordinates: the tokens whose position m has the largest V(m) = mean_i cos(m theta_i), where the rotation is near
    the identity, and those with the largest U(m) = mean_i sin(m theta_i), where it is near 90 degrees (of M-RoPE, the
    mean over its axes too). `coordinates` x k of each stay, whatever they show. Foreground: f_j is the mean, over
    queries and heads, of softmax_j(v . v_j / sqrt(d_h)) over the image's tokens j, with values v of the layer before,
    which no position has turned. First the text after the image asks, and its `seeds` x n best tokens stay; then text
    and seeds ask together, and the tokens with the largest f_j fill up k. All of it once, before the layer `layer`.

    1. `keep` is the average over layers. In the code 0.5 n tokens are left, of which 0.1 n for each kind of coordinate;
       here it is the same share of what is left. Where k is too small for all seeds, those with the largest f_j stay.
    2. Text ahead of the image asks where none comes after it, and the image's own tokens where there is no text at all.
       Special tokens never ask; in the code those of the end of the prompt do.
    3. Images of a prompt choose one by one. The code knows one image; that for InternVL chooses in the thumbnail and
       maps it to the tiles.
    4. Dropping from the caches of the layers before `layer` too is off by default: `keep` is what the prompt's layers
       see, and it comes on top. As in the code, the first layer's cache is never shortened.

    Attributes:
        layer: of a model of 32, as in the code for LLaVA-1.5; other depths drop at the same relative one.
        coordinates: in [0, 0.5].
        seeds: in [0, 1]; one token at least.
        decode: also shorten earlier caches.
    """

    name = "ivc_prune"
    llm_needs = frozenset({"values", "rotary", "text"})
    source = "IVC-Prune (decode=True: earlier caches too), arXiv 2602.03060 (ICLR 2026)"

    layer: int = 16
    coordinates: float = 0.2
    seeds: float = 0.01
    decode: bool = False

    def __post_init__(self) -> None:
        valid = 0 <= self.coordinates <= 0.5 and 0 <= self.seeds <= 1
        self.require(valid, "coordinates=0.2, in [0, 0.5], and seeds=0.01, in [0, 1]")

    def schedule(self, n: int, keep: int, num_layers: int) -> dict[int, int]:
        layer = same_depths((self.layer,), 32, num_layers)[0]
        return one_layer_schedule(self.name, n, keep, num_layers, layer)

    def evict_after_prefill(self, num_layers: int) -> int | None:
        return 1 if self.decode else None

    def score_at_layer(self, layer: int, tokens: LLMTokens) -> Tensor:
        assert tokens.values is not None
        assert tokens.text_values is not None
        assert tokens.after is not None
        assert tokens.rotary is not None
        n, values, text = tokens.n, tokens.values.float(), tokens.text_values.float()
        asks = text[tokens.after] if bool(tokens.after.any()) else text if len(text) else values
        looked = value_attention(asks, values)  # [t, n]
        seeds = descending(looked.mean(dim=0))[: max(1, round(self.seeds * n))]
        foreground = torch.cat((looked, value_attention(values[seeds], values))).mean(dim=0)
        cosine, sine = tokens.rotary.float().mean(dim=2).unbind(dim=1)  # [n] each
        share = round(self.coordinates * tokens.keep)
        places = torch.cat((descending(cosine)[:share], descending(sine)[:share]))
        # Foreground scores are at most 1: coordinates come before all seeds, and seeds before the others.
        return foreground + mask_of(seeds, n) + 2.0 * mask_of(places, n)


def value_attention(queries: Tensor, values: Tensor) -> Tensor:
    """[q, n] softmax over the n rows of products of [q, H, d_h] and [n, H, d_h] / sqrt(d_h), the mean over heads."""
    products = torch.einsum("qhd,nhd->hqn", queries, values) / math.sqrt(values.shape[-1])
    return products.softmax(dim=-1).mean(dim=0)
