"""ApET (arXiv 2602.19870): tokens that a small basis of tokens reproduces worst, the rest merged into them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from gripvlm.pruners.base import LLMPruner, Pruner, top_k
from gripvlm.pruners.ops.merging import mean_merge
from gripvlm.pruners.ops.ranking import mask_of
from gripvlm.pruners.ops.schedules import entering_tokens, one_layer_schedule, same_depths
from gripvlm.types import LLMTokens, Selection, VisualTokens


def far_basis(rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(basis [count], error [n]) of [n, d] rows: which are in the basis, and how far each row is from its span.

    Farthest point sampling by Euclidean distance, from the longest row on. The error is that of least squares,
    |x_i - proj(x_i)|.
    """
    rows = rows.float()
    rest, error = rows, rows.norm(dim=-1)
    nearest = torch.full_like(error, torch.inf)
    basis = torch.empty(count, dtype=torch.long, device=rows.device)
    pick = error.argmax(dim=0, keepdim=True)
    for step in range(count):
        basis[step : step + 1] = pick
        # What is left of all rows once this one's direction is taken out too: stable where solving a system is not.
        direction = normalize(rest.index_select(0, pick), dim=1)
        rest = rest - (rest @ direction.T) * direction
        nearest = torch.minimum(nearest, (rows - rows.index_select(0, pick)).square().sum(dim=1))
        nearest = nearest.scatter(0, pick, -1.0)  # never sampled twice
        pick = nearest.argmax(dim=0, keepdim=True)
    return basis, rest.norm(dim=-1)


def compressed(rows: Tensor, keep: int, basis_size: int) -> Selection:
    """The basis, and of the other rows those with the largest errors; each dropped row goes to the nearest of these.

    Nearest: by cosine, among the kept rows outside the basis, each of which becomes the mean of all it stands for.
    """
    n = rows.shape[0]
    basis, error = far_basis(rows, min(basis_size, keep))
    in_basis = mask_of(basis, n)
    ranked = error.masked_fill(in_basis, torch.inf)  # the basis first
    kept = top_k(ranked, keep)
    if basis.numel() == keep:
        return Selection(kept, n, error)
    unit = normalize(rows.float(), dim=-1)
    rest = (~mask_of(kept, n)).nonzero().flatten()
    slots = (~in_basis[kept]).nonzero().flatten()
    slot = slots[(unit[rest] @ unit[kept[slots]].T).argmax(dim=1)]
    return Selection(kept, n, error, mean_merge(kept, rest, slot))


BASIS = "basis=10, at least 1"


@dataclass(frozen=True)
class ApETInput(Pruner):
    """Tokens that a small basis of tokens reproduces worst, the rest merged into them.

    `basis` tokens by farthest point sampling; e_i = |x_i - least squares of x_i on them|, of the vision tower's rows
    before the projector. Kept: the basis and the k - basis others with the largest e_i. Every other token goes to the
    kept one outside the basis with the most similar row (cosine), which becomes the mean of all that it stands for.

    1. Sampling starts at the longest row, where the error of an empty basis is largest. The code draws the first one.
    2. Basis tokens keep their own places. The code writes them over the `basis` tokens of the k with the smallest e_i,
       which are lost; the rows at the basis tokens' places it merges into others like all that are dropped.
    3. What is merged are projected rows, in the code rows before the projector.
    4. With k <= basis the first k of the basis stay, and nothing is merged; the code has no case for it.
    5. The code adds 1e-5 to the diagonal of the system that it solves.

    Attributes:
        basis: tokens of the basis, at least 1.
    """

    name = "apet_input"
    needs = frozenset({"features", "patches"})
    source = "ApET (first stage), arXiv 2602.19870 (CVPR 2026)"

    basis: int = 10

    def __post_init__(self) -> None:
        self.require(self.basis >= 1, BASIS)

    def select(self, tokens: VisualTokens) -> Selection:
        assert tokens.patches is not None  # promised by `needs`
        return compressed(tokens.patches, tokens.keep, self.basis)


@dataclass(frozen=True)
class ApET(LLMPruner):
    """What a small basis of tokens reproduces worst, once at the input and again inside the language model.

    First: `apet_input`. Second: the same on the hidden states before the layer `layer` of 32.

    1. `first` x keep rows enter the language model, and the second stage makes up for it: 96 and then 32 for an average
       of 64, as published. For large budgets all rows enter, for small ones fewer, so that one is left.
    2. The departures of `apet_input`, of which the third is none here.

    Attributes:
        first: rows that enter, as a multiple of keep, at least 1.
        layer: of a model of 32; other depths drop at the same relative one.
        basis: see `apet_input`.
    """

    name = "apet"
    needs = ApETInput.needs
    llm_needs = frozenset({"hidden"})
    source = "ApET, arXiv 2602.19870 (CVPR 2026)"

    first: float = 1.5
    layer: int = 16
    basis: int = 10

    def __post_init__(self) -> None:
        self.require(self.first >= 1 and self.basis >= 1, f"first=1.5, at least 1, and {BASIS}")

    def schedule(self, n: int, keep: int, num_layers: int) -> dict[int, int]:
        layer = same_depths((self.layer,), 32, num_layers)[0]
        enter = entering_tokens(n, keep, num_layers, layer, self.first)
        return {0: enter, **one_layer_schedule(self.name, enter, keep, num_layers, layer)}

    def select(self, tokens: VisualTokens) -> Selection:
        return ApETInput(self.basis).select(tokens)

    def select_at_layer(self, layer: int, tokens: LLMTokens) -> Selection:
        assert tokens.hidden is not None  # promised by `llm_needs`
        return compressed(tokens.hidden, tokens.keep, self.basis)
