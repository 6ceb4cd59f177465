"""One question, several methods: what each keeps and answers, how probable that is, and what each token is worth."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel

from gripvlm.api import encode
from gripvlm.budget import Budget, Keep
from gripvlm.errors import GripError
from gripvlm.eval import BatchAnswers, answer, make_inputs, question_ids
from gripvlm.eval.variants import FULL
from gripvlm.grip.train.reading import Read
from gripvlm.grip.train.rollout import Engine
from gripvlm.pruners import LLMPruner, Pruner, get_pruner
from gripvlm.pruners.base import TowerPruner
from gripvlm.report import GeometryError, Part, layout_of_images
from gripvlm.tasks import Sample, Task
from gripvlm.types import Selection

__all__ = ["Answered", "Asker", "Comparison"]

_OF_PROMPT = ("input_ids", "attention_mask", "mm_token_type_ids")
"""Inputs with an entry for each token of the prompt."""


@dataclass(frozen=True, eq=False)
class Answered:
    """The answer to one question with the visual tokens that one method keeps.

    Attributes:
        method: a pruner's spec, or "full" for all tokens.
        text: the greedy answer.
        ids: its tokens, the end token included.
        probability: of that answer, 0 to 1: the product over its tokens, the end token included. Like decoding it
            includes the penalties that a model's generation config may name.
        of_full: the same for the answer that the model gives with all tokens.
        seconds: vision, pruner, overhead, prefill and decode; of several runs the medians.
        selections: one a visual item (image or tile), in the prompt's order.
        alone: why no token can be taken away or added by itself, or "" where it can.
    """

    method: str
    text: str
    ids: list[int]
    probability: float
    of_full: float
    seconds: dict[str, float]
    selections: list[Selection]
    alone: str = ""

    @property
    def kept(self) -> list[bool]:
        """[n] whether the language model's last layer still has the token, items one after another."""
        return torch.cat([selection.mask() for selection in self.selections]).tolist()

    @property
    def scores(self) -> list[float] | None:
        """[n] the scores that ranked the tokens, higher is kept; None where the method has none."""
        scores = [selection.scores for selection in self.selections]
        return None if any(s is None for s in scores) else torch.cat([s.float() for s in scores]).tolist()  # type: ignore[union-attr]

    @property
    def paid(self) -> float:
        """Tokens in the language model, the mean over its layers."""
        return round(sum(selection.paid for selection in self.selections), 1)

    def plain(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {
            "method": self.method,
            "text": self.text,
            "probability": self.probability,
            "of_full": self.of_full,
            "tokens": self.paid,
            "seconds": self.seconds,
            "kept": self.kept,
            "scores": self.scores,
            "alone": self.alone,
        }


@dataclass(frozen=True, eq=False)
class Comparison:
    """What several methods make of one question.

    Attributes:
        images, prompt, question: as asked; `prompt` is the user's turn, `question` what pruners read.
        full: with all tokens.
        pruned: one a method, in the order asked for.
        refused: method -> why it cannot be used here.
        parts: where the tokens lie in the pictures; empty where that is not known.
        no_picture: why not, or "".
    """

    images: list[Image.Image]
    prompt: str
    question: str
    full: Answered
    pruned: list[Answered]
    refused: dict[str, str]
    parts: list[Part]
    no_picture: str

    def plain(self) -> dict[str, Any]:
        """As JSON holds it, without the pictures."""
        return {
            "prompt": self.prompt,
            "question": self.question,
            "full": self.full.plain(),
            "pruned": [one.plain() for one in self.pruned],
            "refused": self.refused,
            "no_picture": self.no_picture,
        }


class Asker:
    """Asks one model. Not for several threads at a time.

    Args:
        model, processor: a supported transformers model and its processor. The model is frozen.
        max_new_tokens: the longest answer.
    """

    def __init__(self, model: PreTrainedModel, processor: Any, max_new_tokens: int = 32) -> None:
        self.model, self.processor, self.max_new_tokens = model, processor, max_new_tokens

    @cached_property
    def _engine(self) -> Engine:
        return Engine(self.model, self.processor)

    def compare(
        self,
        images: Sequence[Image.Image],
        question: str,
        pruners: Sequence[str | Pruner],
        keep: Keep,
        *,
        prompt: str | None = None,
        repeats: int = 1,
    ) -> Comparison:
        """Asks with all tokens, then with those that each method keeps.

        Args:
            keep: of each image.
            prompt: the user's turn where it has more than the question.
            repeats: measure the times so often.

        Raises:
            GripError: the question cannot be asked at all. What is wrong with one method is in `refused`.
        """
        if not question.strip():
            raise GripError("the question is empty: type one, such as: what is in the picture?")
        images, prompt, budget = list(images), prompt or question, Budget.of(keep)
        inputs = make_inputs(self.model, self.processor, [prompt], [images])
        read = question_ids(self.processor, [question])
        full = self._ask(inputs, read, "keep_all", Budget(1.0), None, repeats)
        pruned, refused = [], {}
        for pruner in pruners:
            try:
                pruned.append(self._ask(inputs, read, pruner, budget, full.ids, repeats))
            except GripError as error:
                refused[pruner if isinstance(pruner, str) else pruner.name] = str(error)
        try:
            items = encode(self.model, inputs).samples[0]
            grids, tokens = [item.grid or item.rasters for item in items], [item.features.shape[0] for item in items]
            sizes = [image.size for image in images]
            parts, no_picture = layout_of_images(self.processor, sizes, grids, tokens), ""
        except GeometryError as error:
            parts, no_picture = [], str(error)
        return Comparison(images, prompt, question, full, pruned, refused, parts, no_picture)

    def worth(self, comparison: Comparison, answered: Answered, tokens: Sequence[int] | None = None) -> list[float]:
        """What each token is worth to the answer that the model gives with all tokens, by asking with and without it.

        That is the probability of this answer from the tokens that the method keeps and this one, minus the
        probability from those without this one: above 0 where the answer loses by its absence. The other kept tokens
        stay, so that of two that show the same neither may be worth anything. (Occlusion, Zeiler and Fergus, arXiv
        1311.2901, with tokens for pixels.)

        Args:
            answered: one of `comparison`.
            tokens: which, by their number among the prompt's visual tokens; None for all.

        Returns:
            A number in [-1, 1] for each of `tokens`.

        Raises:
            GripError: `answered.alone` is not empty.
        """
        if answered.alone:
            raise GripError(f"{answered.method}: {answered.alone}")
        inputs = make_inputs(self.model, self.processor, [comparison.prompt], [comparison.images])
        read = question_ids(self.processor, [comparison.question])
        prompts = {name: inputs[name] for name in _OF_PROMPT if name in inputs}
        asked = (Task(), Sample("", (), comparison.question, comparison.full.text))
        batch = self._engine.encode(Read([asked], inputs, [0], prompts, [comparison.full.ids], read))
        sizes = [selection.n for selection in answered.selections]
        kept = torch.tensor(answered.kept, device=self.model.device)
        rows = list(range(len(kept)) if tokens is None else tokens)
        masks = kept.repeat(len(rows) + 1, 1)
        for row, token in enumerate(rows):
            masks[row, token] = ~kept[token]
        subsets = [[part.nonzero()[:, 0] for part in mask.split(sizes)] for mask in masks]
        scored = self._engine.run(batch, [0] * len(subsets), subsets, logits=False)
        *changed, unchanged = scored.log_probs.sum(-1).exp().tolist()
        pairs = zip(rows, changed, strict=True)
        return [unchanged - other if answered.kept[token] else other - unchanged for token, other in pairs]

    def _ask(
        self,
        inputs: dict[str, Any],
        read: list[list[int]],
        pruner: str | Pruner,
        keep: Budget,
        full: list[int] | None,
        repeats: int,
    ) -> Answered:
        """The answer; `full`: the ids of the unpruned model's answer, None where this is that model."""
        chosen = get_pruner(pruner)

        def run(notes: _Notes, most: int) -> BatchAnswers:
            return answer(
                self.model,
                self.processor,
                inputs,
                chosen,
                keep,
                max_new_tokens=most,
                question=read,
                logits_processor=[notes],
            )

        notes = _Notes()
        runs = [run(notes, self.max_new_tokens)]
        runs += [run(_Notes(), self.max_new_tokens) for _ in range(repeats - 1)]
        forced = notes
        if full is not None and notes.ids != full:
            forced = _Notes(full)
            run(forced, len(full))
        (selections,) = runs[0].selections
        return Answered(
            method=FULL if full is None else pruner if isinstance(pruner, str) else pruner.name,
            text=runs[0].predictions[0],
            ids=notes.ids,
            probability=notes.probability,
            of_full=forced.probability,
            seconds={name: statistics.median(one.seconds[name] for one in runs) for name in runs[0].seconds},
            selections=selections,
            alone=_why_not_alone(chosen, selections),
        )


class _Notes(LogitsProcessor):
    """Notes the tokens of a greedy answer and their log-probabilities; or forces an answer, and notes its.

    Not by a forward over question and answer: a pruner inside the language model would read the answer.
    """

    def __init__(self, forced: Sequence[int] | None = None) -> None:
        self.forced = forced
        self.tokens: list[Tensor] = []
        self.log_probs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        token = scores[0].argmax() if self.forced is None else scores.new_tensor(self.forced[len(self.tokens)]).long()
        self.tokens.append(token)
        self.log_probs.append(scores[0].float().log_softmax(-1)[token])
        return scores if self.forced is None else torch.full_like(scores, -torch.inf).index_fill(1, token, 0.0)

    @property
    def ids(self) -> list[int]:
        return [int(token) for token in self.tokens]

    @property
    def probability(self) -> float:
        return float(torch.stack(self.log_probs).sum().exp())


def _why_not_alone(pruner: Pruner, selections: Sequence[Selection]) -> str:
    if isinstance(pruner, LLMPruner) or any(selection.layers for selection in selections):
        return "it drops inside the language model, where a dropped token was seen by the first layers"
    if isinstance(pruner, TowerPruner) or any(selection.merge is not None for selection in selections):
        return "it merges tokens, so that a dropped one is still part of a kept one"
    if any(selection.tower is not None for selection in selections):
        return "the vision tower did not see all tokens, so that none can be added by itself"
    return ""
