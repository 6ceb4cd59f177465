"""The micro-batches of a run: read ahead, encoded, without the questions that cannot be used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from gripvlm.errors import TrainError
from gripvlm.grip.train.batch import Batch
from gripvlm.grip.train.config import TrainConfig
from gripvlm.grip.train.data import Question, QuestionStream, generator, key_of
from gripvlm.grip.train.processes import Processes
from gripvlm.grip.train.reading import BAD_QUESTION, ReadAhead, error_about
from gripvlm.grip.train.rollout import Engine

__all__ = ["MicroBatches", "usable_of"]


class MicroBatches:
    """Encodes a process's micro-batches, and reads the next one meanwhile.

    Args:
        data: training questions.
        last: how many micro-batches the stage has, over all processes.
        log: writes a line about a question that was left out.
    """

    def __init__(
        self,
        engine: Engine,
        data: QuestionStream,
        config: TrainConfig,
        processes: Processes,
        last: int,
        log: Callable[[dict[str, Any]], None],
    ) -> None:
        self.engine, self.data, self.config, self.processes = engine, data, config, processes
        self.last, self.log, self.ahead = last, log, ReadAhead(engine.reader)
        self.left_out: list[tuple[str, dict[str, Any]]] = []  # in this step, by this process

    def take(self, number: int) -> Batch | None:
        """Micro-batch `number`, encoded; None where every one of its questions was left out.

        Raises:
            TrainError, TaskError, InputError: a question cannot be used, and `on_bad_sample` is "stop".
        """
        questions, options = self.data.batch(number), self._reading(number)
        if not questions:
            return None
        try:
            read = self.ahead.take(questions, **options)
            # Meanwhile the next one of this process; if a question of it is left out by then, it is read again.
            after = number + self.processes.count
            if after < self.last:
                self.ahead.begin(self.data.batch(after), **self._reading(after))
            return self.engine.encode(read)
        except BAD_QUESTION as error:
            batch, unusable = usable_of(self.engine, questions, self.config, error, options)
        step = number // self.config.gradient_accumulation_steps + 1
        for pair, reason in unusable:
            line = {"step": step, "skipped": pair[1].id, "task": pair[0].name, "why": reason}
            self.log(line)
            self.left_out.append((key_of(*pair), line))
            self.data.skip(pair, reason)
        return batch

    def _reading(self, number: int) -> dict[str, bool]:
        """How the questions of a micro-batch are read."""
        # In half of the batches the scorer reads the whole prompt, as `gripvlm.prune` has it read, else the question.
        whole = bool(torch.rand((), generator=generator(self.config.seed, "text", number)) < 0.5)
        return {"pseudo_labels": self.config.pseudo_labels, "whole_prompt": whole}

    def share_left_out(self, of_all: list[list[tuple[str, dict[str, Any]]]]) -> None:
        """What another process left out in this step is left out here too, and logged."""
        # In the order of the ranks, so that all processes draw from the same questions from here on.
        for rank, lines in enumerate(of_all):
            for name, line in lines:
                self.data.skipped[name] = line["why"]
                if rank:  # the first has logged its own
                    self.log(line)
        self.left_out = []


def usable_of(
    engine: Engine, questions: list[Question], config: TrainConfig, error: Exception, options: dict[str, bool]
) -> tuple[Batch | None, list[tuple[Question, str]]]:
    """Of questions that cannot be prepared together: a batch of those that can, None for no such; the others and why.

    Raises:
        TrainError: one of them cannot be used, and `on_bad_sample` is "stop".
    """
    # One by one: the error of a batch does not always name its question.
    unusable = [(pair, reason) for pair in questions if (reason := _unusable(engine, pair, config))]
    # A batch may fail where each of its questions alone does not: there is nothing to leave out then.
    if not unusable:
        raise error
    keys = {key_of(*pair) for pair, _ in unusable}
    usable = [pair for pair in questions if key_of(*pair) not in keys]
    return engine.prepare(usable, **options) if usable else None, unusable


def _unusable(engine: Engine, question: Question, config: TrainConfig) -> str:
    """Why a question cannot be used, "" where it can."""
    try:
        engine.prepare([question], pseudo_labels=config.pseudo_labels)
    except BAD_QUESTION as error:
        reason = error_about(question[1], error)
        if config.on_bad_sample == "stop":
            raise TrainError(reason) from error
        return reason
    return ""
