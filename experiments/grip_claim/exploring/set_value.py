"""A guess of what a subset is worth, from the features alone: the control variate of `Exploring`."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gripvlm.grip.policy import samples_to_mask
from gripvlm.grip.pruner import ScorerInputs
from gripvlm.grip.train.grpo import sum_by

__all__ = ["SetValue"]


class SetValue(nn.Module):
    """V(set) = MLP(mean and soft maximum over the set's tokens, each seen with the question).

    A sum over tokens explains a third to a half of a group's variance at best; the maximum is what knows that a second
    token of the same thing brings less than the first. It begins as 0.
    """

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.enter = nn.Sequential(nn.LayerNorm(features), nn.Linear(features, width))
        self.ask = nn.Linear(width, width)
        self.mix = nn.Linear(2 * width, width)
        self.leave = nn.Linear(width, 1)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(self, inputs: ScorerInputs, samples: Tensor, questions: int) -> Tensor:
        """[B, G] guesses for the subsets samples [S, G, K] of B questions, summed over a question's sequences."""
        x = self.enter(inputs.features.float())  # [S, n, width]
        if inputs.question is not None and inputs.question_mask is not None:
            words = self.enter(inputs.question.float()) * inputs.question_mask[..., None]
            x = x + self.ask(words.sum(1) / inputs.question_mask.sum(1, keepdim=True).clamp(min=1))[:, None]
        x = F.gelu(x).clamp(max=20.0)
        member = samples_to_mask(samples, x.shape[1]).to(x)  # [S, G, n]
        kept = member.sum(-1, keepdim=True).clamp(min=1)
        most = (torch.einsum("sgn,snw->sgw", member, x.exp()) / kept).clamp(min=1e-9).log()
        mean = torch.einsum("sgn,snw->sgw", member, x) / kept
        worth = self.leave(F.gelu(self.mix(torch.cat((mean, most), -1)))).squeeze(-1)
        return sum_by(worth, inputs.owner, questions)
