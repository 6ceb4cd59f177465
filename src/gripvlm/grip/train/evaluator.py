"""Validation: what a scorer keeps at several budgets is worth on held-out questions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from gripvlm.budget import Budget
from gripvlm.errors import TrainError
from gripvlm.grip.scorer import Scorer
from gripvlm.grip.train.batch import Batch
from gripvlm.grip.train.config import TrainConfig, parse_shares
from gripvlm.grip.train.data import Question, key_of
from gripvlm.grip.train.micro_batches import usable_of
from gripvlm.grip.train.reading import BAD_QUESTION
from gripvlm.grip.train.rewards import Reward, needs_of, scores_of
from gripvlm.grip.train.rollout import Engine
from gripvlm.grip.train.stage import mean, means
from gripvlm.grip.train.two_stages import best_of_two_stages

__all__ = ["Evaluator", "Scores", "fallen"]

Scores: TypeAlias = dict[str, float]


class Evaluator:
    """Scores scorers on the same held-out questions every time: what they keep at several budgets.

    Args:
        questions: (task, sample) pairs.
        reward: its mean over questions and budgets is the objective.
        config: its eval_keeps, pseudo_labels and on_bad_sample.
        batch_size: questions at a time.
    """

    def __init__(
        self, engine: Engine, questions: Sequence[Question], reward: Reward, config: TrainConfig, batch_size: int = 32
    ) -> None:
        self.engine, self.questions, self.reward, self.config = engine, list(questions), reward, config
        self.keeps, self.batch_size = parse_shares(config.eval_keeps, "eval_keeps"), batch_size
        # On an accelerator the features of 256 pictures take gigabytes, and encoding them again little time.
        self.keeps_batches = engine.device.type == "cpu"
        self.kept: dict[int, Batch | None] = {}  # batches by their first question
        self.skipped: dict[str, dict[str, str]] = {}
        """`key_of` -> what to log, for questions that were left out."""

    def evaluate(self, scorer: Scorer) -> dict[str, float]:
        """{"objective", "reward@KEEP", "exact@KEEP", ...}: means over questions."""
        return self.means(self.scores(scorer))

    @torch.no_grad()
    def scores(self, scorer: Scorer, shard: tuple[int, int] = (0, 1)) -> dict[int, Scores]:
        """{number of a question: {"reward@KEEP", "exact@KEEP", ...}}.

        Args:
            shard: (i, n), the i-th of n parts of the questions. A part has whole batches, so that what else is in a
                batch does not depend on n.
        """
        found: dict[int, Scores] = {}
        for start in range(0, len(self.questions), self.batch_size)[shard[0] :: shard[1]]:
            batch = self._batch(start)
            if batch is None:
                continue
            numbers = {key_of(*pair): start + i for i, pair in enumerate(self._part(start))}
            names = [numbers[key_of(*pair)] for pair in zip(batch.tasks, batch.samples, strict=True)]
            for keep in self.keeps:
                for name, values in self._at(scorer, batch, keep).items():
                    for number, value in zip(names, values.tolist(), strict=True):
                        found.setdefault(number, {})[f"{name}@{keep:g}"] = value
        return found

    def _at(self, scorer: Scorer, batch: Batch, keep: float) -> dict[str, Tensor]:
        """[B] rewards and exact matches of the batch's questions at one budget, the tower's being `tower_low`."""
        needed = "logits" in needs_of(self.reward)
        if scorer.config.tower_features:
            left, subsets = best_of_two_stages(self.engine, scorer, batch, keep, self.config.tower_low, needed)
            rollout = self.engine.run(left, range(len(batch)), subsets, logits=needed)
            return {"reward": scores_of(self.reward, rollout)[0], "exact": rollout.exact}
        inputs = batch.for_scorer(scorer.config.question, scorer.config.joint)
        counts = [sum(Budget(keep).count(n) for n in sizes) for sizes in inputs.parts]
        chosen, _ = inputs.choose(scorer, counts)
        rollout = self.engine.run(batch, range(len(batch)), batch.by_question(chosen), logits=needed)
        return {"reward": scores_of(self.reward, rollout)[0], "exact": rollout.exact}

    def objective(self, scores: Scores) -> float:
        """The mean reward over the budgets."""
        return mean([scores[f"reward@{keep:g}"] for keep in self.keeps])

    def means(self, scores: dict[int, Scores]) -> Scores:
        """Means over questions, and the objective.

        Raises:
            TrainError: no question could be used.
        """
        if not scores:
            reason = next(iter(self.skipped.values()))["why"]
            raise TrainError(f"not one of {len(self.questions)} validation questions can be used: {reason}")
        found = means([scores[number] for number in sorted(scores)])  # the order of the sum must not vary
        return {"objective": self.objective(found), **found}

    def _part(self, start: int) -> list[Question]:
        return self.questions[start : start + self.batch_size]

    def _batch(self, start: int) -> Batch | None:
        """The batch that begins with that question; None where none of it can be used."""
        if start in self.kept:
            return self.kept[start]
        part, options = self._part(start), {"pseudo_labels": self.config.pseudo_labels}
        batch: Batch | None
        try:
            batch = self.engine.prepare(part, **options)
        except BAD_QUESTION as error:
            batch, unusable = usable_of(self.engine, part, self.config, error, options)
            for pair, reason in unusable:
                self.skipped[key_of(*pair)] = {"skipped": pair[1].id, "task": pair[0].name, "why": reason}
        if self.keeps_batches:
            self.kept[start] = batch
        return batch


def fallen(before: dict[int, float], now: dict[int, float]) -> str:
    """By how much the objective has fallen, if by more than chance; else ""."""
    falls = torch.tensor([before[number] - now[number] for number in before if number in now], dtype=torch.float64)
    if len(falls) < 2:
        return ""
    error = float(falls.std()) / math.sqrt(len(falls))
    fall = float(falls.mean())
    return f"its objective has fallen by {fall:.3g}, {fall / error:.1f} standard errors" if fall > 2 * error > 0 else ""
