"""Questions about encoded pictures, as the scorer and the frozen model see them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeAlias

import torch
from torch import Tensor

from gripvlm.grip.pruner import ScorerInputs
from gripvlm.models.encoded import Encoded
from gripvlm.models.hooks.tower_replay import TowerStates
from gripvlm.tasks import Sample, Task
from gripvlm.types import VisualTokens

__all__ = ["Batch", "InTower", "Subsets"]

Subsets: TypeAlias = Sequence[Sequence[Tensor]]
"""[rows] lists over the row's images of the indices [k] of the tokens that stay, ascending."""


@dataclass(eq=False)
class InTower:
    """Pictures on their way through the vision tower.

    Attributes:
        seen: the states [P, t, d] of P pictures that enter the block before which tokens are dropped.
        tokens: [P] their tokens there, features being hidden states.
        shown: [B] the picture that each question is about.
        pixels: one picture's pixels, for the number of its channels and its size.
    """

    seen: TowerStates
    tokens: list[VisualTokens]
    shown: list[int]
    pixels: Tensor


@dataclass(eq=False)
class Batch:
    """B questions about encoded images, with the answers that will be forced.

    Attributes:
        tasks, samples: [B].
        answers: [B] token ids, the end token last (unless the model's own answer was cut off).
        prompts: inputs of the questions alone, left-padded, for decoding.
        inputs: inputs of question and answer, left-padded, with labels [B, L] on the answers.
        encoded: the images.
        tokens: [B] lists of `VisualTokens`, one an image.
        full_logits: what `Engine.full_logits` computed, once it was called.
        tower: what a stage inside the vision tower reads, where there is one.
    """

    tasks: list[Task]
    samples: list[Sample]
    answers: list[list[int]]
    prompts: dict[str, Any]
    inputs: dict[str, Any]
    encoded: Encoded
    tokens: list[list[VisualTokens]]
    full_logits: Tensor | None = None
    tower: InTower | None = None

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def longest(self) -> int:
        """T, tokens of the longest answer."""
        return max(map(len, self.answers))

    @cached_property
    def text_lengths(self) -> list[int]:
        """[B] tokens of each question and answer that are not visual."""
        lengths = self.inputs["attention_mask"].sum(-1).tolist()
        return [length - sum(t.n for t in tokens) for length, tokens in zip(lengths, self.tokens, strict=True)]

    @property
    def everything(self) -> Subsets:
        """The subset with every token of every image."""
        return [[torch.arange(t.n, device=t.features.device) for t in tokens] for tokens in self.tokens]

    @property
    def answer_lengths(self) -> Tensor:
        """[B] tokens of each forced answer."""
        return (self.inputs["labels"] >= 0).sum(-1)

    def by_question(self, per_image: Iterable[Tensor]) -> list[list[Tensor]]:
        """[B] lists over each question's images, of one tensor an image."""
        values = iter(per_image)
        return [[next(values) for _ in tokens] for tokens in self.tokens]

    @cached_property
    def owner(self) -> list[int]:
        """[I] the question that each image belongs to."""
        return [i for i, sample in enumerate(self.tokens) for _ in sample]

    @cached_property
    def sizes(self) -> Tensor:
        """[I] tokens of each image."""
        return torch.tensor([t.n for sample in self.tokens for t in sample], device=self.inputs["input_ids"].device)

    def for_scorer(self, question: bool, joint: bool = False) -> ScorerInputs:
        """Everything the scorer reads, padded; `joint`: the images of a question are one sequence."""
        images = [tokens for sample in self.tokens for tokens in sample]
        return ScorerInputs.of(images, question, self.owner, joint)

    def for_tower_stage(self, question: bool) -> ScorerInputs:
        """Everything that the scorer's stage inside the tower reads, a sequence a question."""
        assert self.tower is not None
        pairs = zip(self.tower.shown, self.tokens, strict=True)
        images = [replace(self.tower.tokens[picture], question=own[0].question) for picture, own in pairs]
        return ScorerInputs.of(images, question)

    def take(self, rows: Sequence[int]) -> Batch:
        """Those questions alone, in that order, padded to the longest of them."""
        index = torch.tensor(rows, device=self.inputs["input_ids"].device)
        longest = max(self.text_lengths[row] + sum(t.n for t in self.tokens[row]) for row in rows)
        return Batch(
            [self.tasks[row] for row in rows],
            [self.samples[row] for row in rows],
            [self.answers[row] for row in rows],
            {name: value[index] for name, value in self.prompts.items()},
            {name: value[index, -longest:] for name, value in self.inputs.items()},
            self.encoded.take(rows),
            [self.tokens[row] for row in rows],
            tower=None if self.tower is None else replace(self.tower, shown=[self.tower.shown[row] for row in rows]),
        )
