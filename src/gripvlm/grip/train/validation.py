"""How good a scorer is while it trains: hard top-k at several budgets on questions that it never learns from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gripvlm.budget import Budget
from gripvlm.errors import TrainError
from gripvlm.grip.scorer import Scorer
from gripvlm.grip.train.data import name_of
from gripvlm.grip.train.rewards import Reward, checked, log_prob, reads_logits
from gripvlm.grip.train.rollout import BAD_QUESTION, Batch, Engine, about
from gripvlm.pruners.base import top_k_of_each
from gripvlm.tasks import Sample, Task

__all__ = ["Validator"]


class Validator:
    """Judges scorers on the same questions every time.

    Args:
        questions: (task, sample) pairs.
        keeps: fractions.
        reward: its mean over questions and budgets is the objective.
        size: questions at a time. Images are encoded once and kept.
    """

    def __init__(
        self,
        engine: Engine,
        questions: Sequence[tuple[Task, Sample]],
        keeps: Sequence[float],
        reward: Reward = log_prob,
        own: bool = False,
        skip: bool = False,
        size: int = 32,
    ) -> None:
        self.engine, self.keeps, self.reward = engine, keeps, reward
        self.questions, self.own, self.skip, self.size = list(questions), own, skip, size
        self.batches: list[Batch] | None = None
        self.skipped: dict[str, dict[str, str]] = {}
        """"task/id" -> what to log, for questions that were left out."""

    @torch.no_grad()
    def judge(self, scorer: Scorer) -> dict[str, float]:
        """{"objective", "reward@KEEP", "exact@KEEP", ...}: means over questions."""
        totals: dict[str, float] = {}
        count = 0
        for batch in self._prepared():
            count += len(batch)
            seen = batch.for_scorer(scorer.config.question)
            for keep in self.keeps:
                kept = torch.tensor([Budget(keep).count(n) for n in seen.sizes.tolist()], device=seen.sizes.device)
                subsets = top_k_of_each(seen.score(scorer, kept), kept.tolist())
                rows: list[list[Tensor]] = [[] for _ in range(len(batch))]
                for sample, subset in zip(seen.owner.tolist(), subsets, strict=True):
                    rows[sample].append(subset)
                rollout = self.engine.run(batch, range(len(batch)), rows, logits=reads_logits(self.reward))
                for name, values in (("reward", checked(self.reward, rollout)), ("exact", rollout.exact)):
                    key = f"{name}@{keep:g}"
                    totals[key] = totals.get(key, 0.0) + float(values.sum())
        means = {key: total / count for key, total in totals.items()}
        return {"objective": sum(means[f"reward@{keep:g}"] for keep in self.keeps) / len(self.keeps), **means}

    def _prepared(self) -> list[Batch]:
        if self.batches is None:
            self.batches = []
            for start in range(0, len(self.questions), self.size):
                part = self.questions[start : start + self.size]
                try:
                    self.batches.append(self.engine.prepare(part, own=self.own))
                except BAD_QUESTION as error:
                    self.batches += self._good_ones(part)
                    if not self.skip:  # and each by itself can be used
                        raise error
            if not self.batches:
                why = next(iter(self.skipped.values()))["why"]
                raise TrainError(f"not one of {len(self.questions)} validation questions can be used: {why}")
        return self.batches

    def _good_ones(self, part: Sequence[tuple[Task, Sample]]) -> list[Batch]:
        found = []
        for pair in part:
            try:
                found.append(self.engine.prepare([pair], own=self.own))
            except BAD_QUESTION as why:
                if not self.skip:
                    raise TrainError(about(pair[1], why)) from why
                line = {"skipped": pair[1].id, "task": pair[0].name, "why": about(pair[1], why)}
                self.skipped[name_of(*pair)] = line
        return found
