"""The trainer that every stage shares: steps, validation, checkpoints, Ctrl-C, several processes.

All random numbers come from (seed, stage, step, micro-batch), those that choose data from (seed, micro-batch), so a
run that was killed and resumed is the same run bit for bit,
and two processes with one micro-batch each are one process with two.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import pickle
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn

from gripvlm.budget import Budget
from gripvlm.errors import Interrupted, TrainError
from gripvlm.grip.scorer import Scorer
from gripvlm.grip.train.config import TrainConfig, parse_shares
from gripvlm.grip.train.data import Question, QuestionStream, generator, key_of
from gripvlm.grip.train.rewards import Reward, checked_reward, needs_of
from gripvlm.grip.train.rollout import BAD_QUESTION, Batch, Engine, error_about
from gripvlm.utils import disk
from gripvlm.utils.progress import Progress
from gripvlm.utils.strict_json import BadJSON, parse

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)

Stats: TypeAlias = dict[str, float]

LR_WARMUP_RATIO = 0.03
"""Share of the steps in which the learning rate rises linearly."""

# What torch raises for a checkpoint with flipped bytes (15,000 tried).
_DAMAGED = (
    *(RuntimeError, EOFError, pickle.UnpicklingError, LookupError, TypeError, ValueError),
    *(AttributeError, AssertionError, ArithmeticError),
)


class Stage(ABC):
    """One way of training: a loss, and modules in addition to the scorer.

    Attributes:
        name: of its checkpoint, its folder and its lines in metrics.jsonl.
        random_stream: names its random numbers; by default `name`.
        rate_setting: the setting that holds its learning rate, for messages.
        num_iterations: how often `losses` yields, an optimiser step each.
    """

    name: ClassVar[str]
    random_stream: ClassVar[str] = ""
    rate_setting: ClassVar[str] = "learning_rate"
    num_iterations: int = 1

    def __init__(self, config: TrainConfig, scorer: Scorer, engine: Engine, steps: int, learning_rate: float) -> None:
        self.config, self.scorer, self.engine = config, scorer, engine
        self.max_steps, self.learning_rate = steps, learning_rate

    @abstractmethod
    def losses(self, batch: Batch, progress: float, random: torch.Generator) -> Iterator[tuple[Tensor, Stats]]:
        """`num_iterations` pairs (loss, what to log) for a batch; an optimiser step is taken after each.

        Args:
            progress: share of the training that is over, in [0, 1].
            random: of this step and micro-batch.
        """

    def explore(self, batch: Batch, random: torch.Generator) -> Any:
        """What all micro-batches of a step need of this one before the first loss, on the CPU; None for nothing."""
        return None

    def pool(self, explored: list[Any]) -> None:  # noqa: B027
        """Receives what `explore` returned for each micro-batch of the step, those of all processes, in order."""

    def modules(self) -> dict[str, nn.Module]:
        """Further modules that a checkpoint must hold; those that require gradients are trained."""
        return {}


@dataclass
class TrainerState:
    """Where a stage is; part of its checkpoint.

    Attributes:
        step: optimiser steps that are done (rounds of them, with `num_iterations`).
        seconds: spent on them, without validations and checkpoints.
        best: the highest objective of a validation so far.
    """

    step: int = 0
    seconds: float = 0.0
    best: float = -math.inf


class Trainer:
    """Runs one stage to its end, or until it is stopped.

    Args:
        stage: with the scorer it trains.
        data: training questions.
        evaluator: chooses the best step.
        accelerator: the processes of this run; rank 0 writes files.
        quiet: no progress bar.
    """

    def __init__(
        self, stage: Stage, data: QuestionStream, evaluator: Evaluator, accelerator: Accelerator, quiet: bool = False
    ) -> None:
        self.stage, self.data, self.evaluator, self.accelerator = stage, data, evaluator, accelerator
        self.config, self.quiet = stage.config, quiet
        self.modules: dict[str, nn.Module] = {"scorer": stage.scorer, **stage.modules()}
        self.eval_scorer = stage.scorer  # the scorer that is validated and, in the end, returned
        if self.config.ema_decay:
            # A copy that the optimiser does not know: it only follows the weights.
            self.modules["average"] = self.eval_scorer = copy.deepcopy(stage.scorer).requires_grad_(False)
        for module in self.modules.values():
            module.to(stage.engine.model.device)
        self.weights = [p for module in self.modules.values() for p in module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.weights, lr=stage.learning_rate, betas=(0.9, 0.98), weight_decay=self.config.weight_decay
        )
        self.state = TrainerState()
        self.best_weights = copy.deepcopy(stage.scorer.state_dict())
        output_dir = Path(self.config.output_dir).expanduser()
        self.checkpoint, self.metrics = output_dir / f"{stage.name}.ckpt", output_dir / "metrics.jsonl"
        self.stop_signal = _StopSignal()
        self.left_out: list[tuple[str, dict[str, Any]]] = []  # questions, in this step, by this process

    # --- the run ----------------------------------------------------------------------------------------------

    def train(self) -> Scorer:
        """Trains; returns the scorer with the best validated weights.

        Raises:
            Interrupted: after Ctrl-C, with a checkpoint written.
            TrainError: a reward, a sample or the loss went wrong; the checkpoint before it stands.
        """
        self._load_checkpoint()
        config, state, last = self.config, self.state, self.stage.max_steps
        shown = not self.quiet and self.accelerator.is_main_process
        with self.stop_signal, Progress(f"steps of {self.stage.name}", last, state.step, show=shown) as bar:
            # The start is a candidate too: a stage that makes the scorer worse returns the scorer that it started from.
            if state.step == 0 and last:
                bar.about("first validation")
                self._evaluate()
            while state.step < last:
                began = time.monotonic()
                stats = self._step()
                state.seconds += time.monotonic() - began
                self._log({"step": state.step, **stats})
                bar.about(next((f"{name} {stats[name]:.3f}" for name in ("reward", "loss") if name in stats), ""))
                bar.advance()
                if state.step % config.eval_steps == 0 or state.step == last:
                    self._evaluate()
                # All processes stop at the same step, whichever of them received the signal.
                if self._any(self.stop_signal.received):
                    break
                if state.step % config.save_steps == 0:
                    self._save_checkpoint()
        self._save_checkpoint()
        if self._any(self.stop_signal.received):
            raise Interrupted(
                f"Stopped at step {state.step} of {last} ({self.stage.name}). The same command resumes from "
                f"{self.checkpoint}."
            )
        self.stage.scorer.load_state_dict(self.best_weights)
        return self.stage.scorer

    def _step(self) -> Stats:
        """One round: `num_iterations` optimiser steps on the micro-batches of this step."""
        config, stage = self.config, self.stage
        progress = self._set_learning_rate()
        stage.scorer.train()
        ranks, rank = self.accelerator.num_processes, self.accelerator.process_index
        # Which process computes a micro-batch changes nothing in it: its random numbers come from its number.
        numbers = range(rank, config.gradient_accumulation_steps, ranks)
        micro_batches = [self._losses(m, progress) for m in numbers]
        self._pool(dict(zip(numbers, [next(losses, None) for losses in micro_batches], strict=True)))
        collected: list[Stats] = []
        left_out: tuple[None, Stats] = (None, {})  # where every question of a micro-batch was
        for iteration in range(stage.num_iterations):
            # Zeros, not None: a process whose questions were all left out still takes part in the sum.
            self.optimizer.zero_grad(set_to_none=False)
            for losses in micro_batches:
                loss, stats = next(losses, left_out)
                if loss is None:
                    continue
                # Before backward, so that no weight is touched and the checkpoint before it stands.
                if not bool(loss.isfinite()):
                    raise self._diverged("loss", float(loss.detach()))
                # The sum over the micro-batches of all processes is then their mean.
                (loss / config.gradient_accumulation_steps).backward()
                collected.append({"loss": float(loss.detach()), **stats})
                if iteration == stage.num_iterations - 1:
                    losses.close()  # lets go of the micro-batch before the next is made
            norm = self._apply_gradients()
        self.state.step += 1
        self._share_left_out()
        return {"lr": self.optimizer.param_groups[0]["lr"], "grad_norm": norm, **self._mean_over_processes(collected)}

    def _losses(self, micro: int, progress: float) -> Generator[Any, None, None]:
        """What the stage explores in one micro-batch of this step, and then its losses (tensor, what to log)."""
        step = self.state.step
        batch = self._batch(step * self.config.gradient_accumulation_steps + micro)
        if batch is not None:
            random = generator(self.config.seed, self.stage.random_stream or self.stage.name, step, micro)
            yield self.stage.explore(batch, random)
            yield from self.stage.losses(batch, progress, random)

    def _pool(self, explored: dict[int, Any]) -> None:
        """Gives the stage what it explored in all micro-batches of this step, in the order of their numbers."""
        of_all = [pair for each in self._gather(explored) for pair in each.items()]
        self.stage.pool([found for _, found in sorted(of_all, key=lambda pair: pair[0]) if found is not None])

    def _set_learning_rate(self) -> float:
        """Sets the rate of this step: a linear rise, then a cosine to a tenth. Returns the progress, in [0, 1]."""
        step, steps = self.state.step, self.stage.max_steps
        progress = step / steps
        risen = min(1.0, (step + 1) / max(1.0, LR_WARMUP_RATIO * steps))
        cosine = 0.1 + 0.45 * (1 + math.cos(math.pi * progress))
        for group in self.optimizer.param_groups:
            group["lr"] = self.stage.learning_rate * risen * cosine
        return progress

    def _apply_gradients(self) -> float:
        """An optimiser step on the gradients of all processes; returns their norm before clipping."""
        # Not DistributedDataParallel: it waits for each process at each backward, and one may have none in a step.
        if self.accelerator.num_processes > 1:
            for weight in self.weights:
                grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
                weight.grad = self.accelerator.reduce(grad, "sum")
        norm = float(nn.utils.clip_grad_norm_(self.weights, self.config.max_grad_norm))
        if not math.isfinite(norm):
            raise self._diverged("gradient", norm)
        self.optimizer.step()
        if self.eval_scorer is not self.stage.scorer:
            with torch.no_grad():
                for average, now in zip(self.eval_scorer.parameters(), self.stage.scorer.parameters(), strict=True):
                    average.lerp_(now, 1 - self.config.ema_decay)
        return norm

    def _diverged(self, what: str, value: float) -> TrainError:
        flag = "--" + self.stage.rate_setting.replace("_", "-")
        where = " and use another --output-dir" if self.checkpoint.exists() else ""
        step = self.state.step
        return TrainError(f"the {what} of {self.stage.name} is {value} at step {step}: lower {flag}{where}")

    # --- questions that cannot be used ------------------------------------------------------------------------

    def _batch(self, number: int) -> Batch | None:
        """The micro-batch's encoded questions; None where every one of them was left out."""
        # In half of the batches the scorer reads the whole prompt, as `gripvlm.prune` has it read, else the question.
        whole = bool(torch.rand((), generator=generator(self.config.seed, "text", number)) < 0.5)
        batch, unusable = prepare_usable(self.stage.engine, self.data.batch(number), self.config, whole)
        for pair, reason in unusable:
            line = {"step": self.state.step + 1, "skipped": pair[1].id, "task": pair[0].name, "why": reason}
            self._log(line)
            self.left_out.append((key_of(*pair), line))
            self.data.skip(pair, reason)
        return batch

    def _share_left_out(self) -> None:
        """What another process left out in this step is left out here too, and logged."""
        # In the order of the ranks, so that all processes draw from the same questions from here on.
        for rank, lines in enumerate(self._gather(self.left_out)):
            for name, line in lines:
                self.data.skipped[name] = line["why"]
                if rank:  # the first has logged its own
                    self._log(line)
        self.left_out = []

    # --- several processes ------------------------------------------------------------------------------------

    def _gather(self, value: Any) -> list[Any]:
        """The value of each process, in the order of their ranks."""
        from accelerate.utils import gather_object

        values: list[Any] = gather_object([value])
        return values

    def _any(self, flag: bool) -> bool:
        """Whether any process says so."""
        return any(self._gather(flag))

    def _mean_over_processes(self, collected: list[Stats]) -> Stats:
        """Means over this process's micro-batches, then over the processes, of the numbers that all of them have."""
        keys = dict.fromkeys(key for stats in collected for key in stats)
        means = {key: _mean([stats[key] for stats in collected if key in stats]) for key in keys}
        of_all = self._gather(means)
        return {key: _mean([each[key] for each in of_all]) for key in means if all(key in each for each in of_all)}

    # --- validation, log, checkpoint --------------------------------------------------------------------------

    def _evaluate(self) -> None:
        state, skipped_before = self.state, set(self.evaluator.skipped)
        self.eval_scorer.eval()
        scores = self.evaluator.evaluate(self.eval_scorer)
        for name, line in self.evaluator.skipped.items():
            if name not in skipped_before:
                self._log({"step": state.step, **line, "validation": True})
        # Of equal steps the earlier one: it was trained less.
        if scores["objective"] > state.best:
            state.best = scores["objective"]
            self.best_weights = copy.deepcopy(self.eval_scorer.state_dict())
        self._log({"step": state.step, "minutes": round(state.seconds / 60, 3), "eval": scores})

    def _log(self, line: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            disk.append(self.metrics, json.dumps({"stage": self.stage.name, **_rounded(line)}) + "\n", new=True)
            scores = {f"eval/{name}": value for name, value in line.get("eval", {}).items()}
            numbers = {f"{self.stage.name}/{k}": v for k, v in (line | scores).items() if isinstance(v, int | float)}
            self.accelerator.log(numbers, step=self.state.step)

    def _save_checkpoint(self) -> None:
        """One file, replaced at once: `Accelerator.save_state` writes several, and a kill between two mixes steps."""
        if not self.accelerator.is_main_process:
            return
        content = {
            "config": self.config.to_dict(),
            "modules": {name: module.state_dict() for name, module in self.modules.items()},
            "optimizer": self.optimizer.state_dict(),
            "state": asdict(self.state),
            "best_weights": self.best_weights,
            "questions": self.data.digest,
            "skipped": self.data.skipped,
        }
        packed = BytesIO()
        torch.save(content, packed)
        disk.write(self.checkpoint, packed.getvalue())

    def _load_checkpoint(self) -> None:
        if self.checkpoint.exists():
            try:
                questions = self._restore(disk.read_bytes(self.checkpoint))
            except _DAMAGED as error:
                raise TrainError(
                    f"{self.checkpoint} is damaged ({type(error).__name__}): remove it to begin this stage again"
                ) from error
            if questions != self.data.digest:
                raise TrainError(
                    f"{self.checkpoint} was made with other questions than {self.config.data or 'these'} has now: "
                    "bring those back, or use another --output-dir"
                )
        if self.accelerator.is_main_process:
            self._forget_later_lines()

    def _restore(self, packed: bytes) -> str:
        """Sets everything to what a checkpoint holds; returns the digest of the questions it was made with."""
        # weights_only: a file from elsewhere must not run code.
        content = torch.load(BytesIO(packed), weights_only=True, map_location=self.stage.engine.model.device)
        for name, module in self.modules.items():
            module.load_state_dict(content["modules"][name])
        self.optimizer.load_state_dict(content["optimizer"])
        self.state = TrainerState(**content["state"])
        self.best_weights = content["best_weights"]
        self.data.skipped.update(content["skipped"])
        return str(content["questions"])

    def _forget_later_lines(self) -> None:
        """Drops log lines after the checkpoint (all lines if there is none), so that no step is logged twice."""
        if not self.metrics.exists():
            return
        text = disk.read_bytes(self.metrics)
        last = self.state.step if self.checkpoint.exists() else -1
        lines = []
        for number, line in enumerate(text[: text.rfind(b"\n") + 1].splitlines(), 1):  # a kill may leave half a line
            try:
                entry = parse(line)
                if entry["stage"] != self.stage.name or entry["step"] <= last:
                    lines.append(json.dumps(entry) + "\n")
            except (BadJSON, KeyError, TypeError) as error:
                raise TrainError(
                    f"line {number} of {self.metrics} is damaged ({error}): mend that line, or move the file away"
                ) from None
        disk.write(self.metrics, "".join(lines))


class Evaluator:
    """Scores scorers on the same held-out questions every time: what they keep at several budgets.

    Args:
        questions: (task, sample) pairs. Their images are encoded once and stay in memory.
        reward: its mean over questions and budgets is the objective.
        config: its eval_keeps, pseudo_labels and on_bad_sample.
        batch_size: questions at a time.
    """

    def __init__(
        self, engine: Engine, questions: Sequence[Question], reward: Reward, config: TrainConfig, batch_size: int = 32
    ) -> None:
        self.engine, self.questions, self.reward, self.config = engine, list(questions), reward, config
        self.keeps, self.batch_size = parse_shares(config.eval_keeps, "eval_keeps"), batch_size
        self.batches: list[Batch] | None = None
        self.skipped: dict[str, dict[str, str]] = {}
        """`key_of` -> what to log, for questions that were left out."""

    @torch.no_grad()
    def evaluate(self, scorer: Scorer) -> dict[str, float]:
        """{"objective", "reward@KEEP", "exact@KEEP", ...}: means over questions."""
        totals: dict[str, float] = {}
        batches = self._prepared()
        for batch in batches:
            inputs = batch.for_scorer(scorer.config.question, scorer.config.joint)
            for keep in self.keeps:
                counts = [sum(Budget(keep).count(n) for n in sizes) for sizes in inputs.parts]
                subsets = batch.by_question(inputs.choose(scorer, counts)[0])
                rollout = self.engine.run(batch, range(len(batch)), subsets, logits="logits" in needs_of(self.reward))
                for name, values in (("reward", checked_reward(self.reward, rollout)), ("exact", rollout.exact)):
                    key = f"{name}@{keep:g}"
                    totals[key] = totals.get(key, 0.0) + float(values.sum())
        count = sum(map(len, batches))
        means = {key: total / count for key, total in totals.items()}
        return {"objective": _mean([means[f"reward@{keep:g}"] for keep in self.keeps]), **means}

    def _prepared(self) -> list[Batch]:
        # Encoded once: the images are the same at every validation.
        if self.batches is None:
            self.batches = []
            for start in range(0, len(self.questions), self.batch_size):
                part = self.questions[start : start + self.batch_size]
                batch, unusable = prepare_usable(self.engine, part, self.config)
                self.batches += [] if batch is None else [batch]
                for pair, reason in unusable:
                    self.skipped[key_of(*pair)] = {"skipped": pair[1].id, "task": pair[0].name, "why": reason}
            if not self.batches:
                reason = next(iter(self.skipped.values()))["why"]
                raise TrainError(f"not one of {len(self.questions)} validation questions can be used: {reason}")
        return self.batches


def prepare_usable(
    engine: Engine, questions: list[Question], config: TrainConfig, whole_prompt: bool = False
) -> tuple[Batch | None, list[tuple[Question, str]]]:
    """A batch of those questions that can be used, None for no such, and the others with the reasons.

    Raises:
        TrainError: one of them cannot be used, and `on_bad_sample` is "stop".
    """
    options = {"pseudo_labels": config.pseudo_labels, "whole_prompt": whole_prompt}
    unusable = []
    if questions:
        try:
            return engine.prepare(questions, **options), []
        except BAD_QUESTION as error:
            # One by one: the error of a batch does not always name its question.
            for pair in questions:
                if reason := _unusable(engine, pair, config):
                    unusable.append((pair, reason))
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


class _StopSignal:
    """A context in which the first Ctrl-C, or SIGTERM as a scheduler sends it, only sets `received`.

    The step in hand is finished then; the second signal stops at once. Outside the main thread, which alone may handle
    signals, it does nothing.
    """

    def __init__(self) -> None:
        self.received = False

    def __enter__(self) -> _StopSignal:
        self._before = {}
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._receive)
        except ValueError:  # not the main thread: signals are its business
            pass
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            # None stands for a handler that was not set from Python, which cannot be set again.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            raise KeyboardInterrupt
        self.received = True
        logger.warning("Stopping after this step; Ctrl-C again stops at once and loses it.")


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    return {key: _rounded(part) for key, part in value.items()} if isinstance(value, dict) else value
