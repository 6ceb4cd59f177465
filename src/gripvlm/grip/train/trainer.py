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
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from io import BytesIO
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from gripvlm.budget import Budget
from gripvlm.errors import Interrupted, TrainError
from gripvlm.grip.scorer import Scorer
from gripvlm.grip.train.config import TrainConfig, parse_shares
from gripvlm.grip.train.data import Question, QuestionStream, generator, key_of
from gripvlm.grip.train.processes import EndedTogether, Processes
from gripvlm.grip.train.rewards import Reward, needs_of, scores_of
from gripvlm.grip.train.rollout import BAD_QUESTION, Batch, Engine, ReadAhead, error_about
from gripvlm.utils import disk
from gripvlm.utils.progress import Progress
from gripvlm.utils.strict_json import BadJSON, parse

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)

T = TypeVar("T")
Stats: TypeAlias = dict[str, float]
Scores: TypeAlias = dict[str, float]

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
        tokens: that the model ran on for them, in all processes.
        first: the objective of each validation question, by its number, before the first step.
    """

    step: int = 0
    seconds: float = 0.0
    tokens: int = 0
    first: dict[int, float] = field(default_factory=dict)


class Callback:
    """What a user of `train` is told of it, in the first process; an error in a method ends the training."""

    def on_step_end(self, stage: str, step: int, metrics: Stats) -> None:
        """After a step, with what is logged about it."""

    def on_evaluate(self, stage: str, step: int, metrics: Stats) -> None:
        """After a validation, with its means."""

    def on_save(self, stage: str, step: int, checkpoint: Path) -> None:
        """After a checkpoint was written."""


class Trainer:
    """Runs one stage to its end, or until it is stopped.

    All processes begin with the first one's weights and checkpoint, take them over again at each validation, and end
    together: an error in one is an error in all.

    Args:
        stage: with the scorer it trains.
        data: training questions.
        evaluator: measures the scorer while it is trained.
        accelerator: the processes of this run; rank 0 reads and writes files.
        quiet: no progress bar.
        callbacks: told of steps, validations and checkpoints.
        first_step: steps of this run before the stage, which trackers count on from.
    """

    def __init__(
        self,
        stage: Stage,
        data: QuestionStream,
        evaluator: Evaluator,
        accelerator: Accelerator,
        quiet: bool = False,
        callbacks: Sequence[Callback] = (),
        first_step: int = 0,
    ) -> None:
        self.stage, self.data, self.evaluator, self.accelerator = stage, data, evaluator, accelerator
        self.processes, self.callbacks, self.first_step = Processes(accelerator), callbacks, first_step
        self.config, self.quiet = stage.config, quiet
        self.ahead = ReadAhead(stage.engine)
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
        output_dir = Path(self.config.output_dir).expanduser()
        self.checkpoint, self.metrics = output_dir / f"{stage.name}.ckpt", output_dir / "metrics.jsonl"
        self.stop_signal = _StopSignal()
        self.left_out: list[tuple[str, dict[str, Any]]] = []  # questions, in this step, by this process
        self.weights_of_all = [value for module in self.modules.values() for value in module.state_dict().values()]

    # --- the run ----------------------------------------------------------------------------------------------

    def train(self) -> Scorer:
        """Trains; returns the scorer with the running average of the weights, or those of the last step.

        Raises:
            Interrupted: after Ctrl-C, with a checkpoint written.
            TrainError: a reward, a sample or the loss went wrong, in this process or another; the checkpoint before it
                stands.
        """
        self.processes.agree("training questions", self.data.digest)
        self._load_checkpoint()
        config, state, last = self.config, self.state, self.stage.max_steps
        shown = not self.quiet and self.processes.first
        with self.stop_signal, Progress(f"steps of {self.stage.name}", last, state.step, show=shown) as bar:
            # What the stage started from is what its end is compared with.
            if state.step == 0 and last:
                bar.about("first validation")
                self._evaluate()
            stopped = False
            while state.step < last and not stopped:
                stats = self._step()
                bar.about(next((f"{name} {stats[name]:.3f}" for name in ("reward", "loss") if name in stats), ""))
                bar.advance()
                # All processes stop at the same step, whichever of them received the signal.
                stopped = any(self.processes.everyone(partial(self._after_step, stats)))
                if state.step % config.eval_steps == 0 or state.step == last:
                    self._evaluate()
                if state.step % config.save_steps == 0 and not stopped and state.step < last:
                    self._save_checkpoint()
        self._save_checkpoint()
        if stopped:
            raise Interrupted(
                f"Stopped at step {state.step} of {last} ({self.stage.name}). The same command resumes from "
                f"{self.checkpoint}."
            )
        self.stage.scorer.load_state_dict(self.eval_scorer.state_dict())
        return self.stage.scorer

    def _step(self) -> Stats:
        """One round: `num_iterations` optimiser steps on the micro-batches of this step."""
        config, stage, state = self.config, self.stage, self.state
        began, tokens = time.monotonic(), stage.engine.tokens
        progress = self._set_learning_rate()
        stage.scorer.train()
        # Which process computes a micro-batch changes nothing in it: its random numbers come from its number.
        mine = range(self.processes.rank, config.gradient_accumulation_steps, self.processes.count)
        micro_batches = [self._losses(m, progress) for m in mine]
        explored = self._everyone(partial(_explored, dict(zip(mine, micro_batches, strict=True))))
        in_order = sorted((pair for of_one in explored for pair in of_one.items()), key=lambda pair: pair[0])
        self._everyone(partial(stage.pool, [found for _, found in in_order if found is not None]))
        collected: list[Stats] = []
        for iteration in range(stage.num_iterations):
            # Zeros, not None: a process whose questions were all left out still takes part in the sum.
            self.optimizer.zero_grad(set_to_none=False)
            work = partial(self._backward, micro_batches, collected, iteration == stage.num_iterations - 1)
            self._everyone(work)
            norm = self._apply_gradients()
        state.step += 1
        of_all = self.processes.gather((_means(collected), stage.engine.tokens - tokens, self.left_out))
        self._share_left_out([lines for _, _, lines in of_all])
        seconds = time.monotonic() - began
        state.seconds += seconds
        state.tokens += sum(tokens for _, tokens, _ in of_all)
        stats = {"learning_rate": self.optimizer.param_groups[0]["lr"], "grad_norm": norm}
        return stats | _means([means for means, _, _ in of_all]) | {"num_tokens": state.tokens, "step_time": seconds}

    def _backward(self, micro_batches: list[Generator[Any, None, None]], collected: list[Stats], last: bool) -> None:
        """Adds the gradients of this process's micro-batches.

        Args:
            collected: gets what to log of each.
            last: whether this is the last iteration on these rollouts.
        """
        for losses in micro_batches:
            left_out: tuple[None, Stats] = (None, {})
            loss, stats = next(losses, left_out)
            if loss is None:  # every question of the micro-batch was left out
                continue
            # Before backward, so that no weight is touched and the checkpoint before it stands.
            if not bool(loss.isfinite()):
                raise self._diverged("loss", float(loss.detach()))
            # The sum over the micro-batches of all processes is then their mean.
            (loss / self.config.gradient_accumulation_steps).backward()
            collected.append({"loss": float(loss.detach()), **stats})
            if last:
                losses.close()  # lets go of the micro-batch before the next is made

    def _everyone(self, work: Callable[[], T]) -> list[T]:
        """`Processes.everyone` for work with the model."""

        def done() -> T:
            try:
                return work()
            except torch.OutOfMemoryError as error:
                raise TrainError(
                    f"{self.stage.name} ran out of memory: use a smaller --max-tokens-per-forward; if that is not "
                    "enough, a smaller --per-device-train-batch-size or --questions-per-image, with another "
                    "--output-dir (--dry-run says what needs how much)"
                ) from error

        return self.processes.everyone(done)

    def _after_step(self, stats: Stats) -> bool:
        """Logs and calls back; returns whether this process was told to stop."""
        self._log({"step": self.state.step, **stats})
        self._call("on_step_end", stats)
        return self.stop_signal.received

    def _call(self, event: str, about: Any) -> None:
        if self.processes.first:
            for callback in self.callbacks:
                getattr(callback, event)(self.stage.name, self.state.step, about)

    def _losses(self, micro: int, progress: float) -> Generator[Any, None, None]:
        """What the stage explores in one micro-batch of this step, and then its losses (tensor, what to log)."""
        step = self.state.step
        batch = self._batch(step * self.config.gradient_accumulation_steps + micro)
        if batch is not None:
            random = generator(self.config.seed, self.stage.random_stream or self.stage.name, step, micro)
            yield self.stage.explore(batch, random)
            yield from self.stage.losses(batch, progress, random)

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
        for weight in self.weights:
            weight.grad = self.processes.sum(torch.zeros_like(weight) if weight.grad is None else weight.grad)
        norm = float(nn.utils.clip_grad_norm_(self.weights, self.config.max_grad_norm))
        if not math.isfinite(norm):
            raise EndedTogether(str(self._diverged("gradient", norm)))  # the sum is the same in all processes
        self.optimizer.step()
        if self.eval_scorer is not self.stage.scorer:
            # In the first steps over fewer of them, so that the average soon forgets where the stage began.
            decay = min(self.config.ema_decay, (1 + self.state.step) / (10 + self.state.step))
            with torch.no_grad():
                for average, now in zip(self.eval_scorer.parameters(), self.stage.scorer.parameters(), strict=True):
                    average.lerp_(now, 1 - decay)
        return norm

    def _diverged(self, what: str, value: float) -> TrainError:
        flag = "--" + self.stage.rate_setting.replace("_", "-")
        where = " and use another --output-dir" if self.checkpoint.exists() else ""
        step = self.state.step
        return TrainError(f"the {what} of {self.stage.name} is {value} at step {step}: lower {flag}{where}")

    # --- questions that cannot be used ------------------------------------------------------------------------

    def _batch(self, number: int) -> Batch | None:
        """The micro-batch's encoded questions; None where every one of them was left out."""
        questions, options = self.data.batch(number), self._reading(number)
        if not questions:
            return None
        try:
            read = self.ahead.take(questions, **options)
            # Meanwhile the next one of this process; if a question of it is left out by then, it is read again.
            after = number + self.processes.count
            if after < self.stage.max_steps * self.config.gradient_accumulation_steps:
                self.ahead.begin(self.data.batch(after), **self._reading(after))
            return self.stage.engine.encode(read)
        except BAD_QUESTION as error:
            batch, unusable = usable_of(self.stage.engine, questions, self.config, error, options)
        for pair, reason in unusable:
            line = {"step": self.state.step + 1, "skipped": pair[1].id, "task": pair[0].name, "why": reason}
            self._log(line)
            self.left_out.append((key_of(*pair), line))
            self.data.skip(pair, reason)
        return batch

    def _reading(self, number: int) -> dict[str, bool]:
        """How the questions of a micro-batch are read."""
        # In half of the batches the scorer reads the whole prompt, as `gripvlm.prune` has it read, else the question.
        whole = bool(torch.rand((), generator=generator(self.config.seed, "text", number)) < 0.5)
        return {"pseudo_labels": self.config.pseudo_labels, "whole_prompt": whole}

    def _share_left_out(self, of_all: list[list[tuple[str, dict[str, Any]]]]) -> None:
        """What another process left out in this step is left out here too, and logged."""
        # In the order of the ranks, so that all processes draw from the same questions from here on.
        for rank, lines in enumerate(of_all):
            for name, line in lines:
                self.data.skipped[name] = line["why"]
                if rank:  # the first has logged its own
                    self._log(line)
        self.left_out = []

    # --- validation, log, checkpoint --------------------------------------------------------------------------

    def _evaluate(self) -> None:
        state, evaluator = self.state, self.evaluator
        # Sums on unlike machines may differ in their last bits; from here on all go on with the same weights again.
        self.processes.copy_first(self.weights_of_all)
        self.eval_scorer.eval()
        skipped_before = set(evaluator.skipped)
        shard = (self.processes.rank, self.processes.count)
        of_all = self._everyone(lambda: (evaluator.scores(self.eval_scorer, shard), evaluator.skipped))
        scores: dict[int, Scores] = {}
        for mine, skipped in of_all:
            scores |= mine
            evaluator.skipped |= skipped
        means = evaluator.means(scores)
        line: dict[str, Any] = {"step": state.step, "minutes": round(state.seconds / 60, 3), "eval": means}
        objectives = {number: evaluator.objective(each) for number, each in scores.items()}
        if state.step == 0:
            state.first = objectives
        elif worse := _fallen(state.first, objectives):
            line["warning"] = f"the scorer is worse than before {self.stage.name}: {worse}"
            if self.processes.first:
                logger.warning("Step %d: %s", state.step, line["warning"])
        for name, left_out in evaluator.skipped.items():
            if name not in skipped_before:
                self._log({"step": state.step, **left_out, "validation": True})
        self._log(line)
        self.processes.together(partial(self._call, "on_evaluate", means))

    def _log(self, line: dict[str, Any]) -> None:
        if self.processes.first:
            disk.append(self.metrics, json.dumps({"stage": self.stage.name, **_rounded(line)}) + "\n", new=True)
            scores = {f"eval/{name}": value for name, value in line.get("eval", {}).items()}
            numbers = {f"{self.stage.name}/{k}": v for k, v in (line | scores).items() if isinstance(v, int | float)}
            self.accelerator.log(numbers, step=self.first_step + self.state.step)

    def _save_checkpoint(self) -> None:
        """One file, replaced at once: `Accelerator.save_state` writes several, and a kill between two mixes steps."""
        self.processes.together(self._write_checkpoint)

    def _write_checkpoint(self) -> None:
        if not self.processes.first:
            return
        content = {
            "config": self.config.to_dict(),
            "modules": {name: module.state_dict() for name, module in self.modules.items()},
            "optimizer": self.optimizer.state_dict(),
            "state": asdict(self.state),
            "questions": self.data.digest,
            "skipped": self.data.skipped,
        }
        packed = BytesIO()
        torch.save(content, packed)
        disk.write(self.checkpoint, packed.getvalue())
        self._call("on_save", self.checkpoint)

    def _load_checkpoint(self) -> None:
        """What the first process finds on its disk, in all of them; its weights where it finds nothing."""
        first = self.processes.first
        (packed, *_) = self.processes.everyone(
            lambda: disk.read_bytes(self.checkpoint) if first and self.checkpoint.exists() else None
        )
        if packed is None:
            self.processes.copy_first(self.weights_of_all)
        else:
            self.processes.together(partial(self._restored, packed))
        self.processes.together(lambda: self._forget_later_lines(packed is not None) if first else None)

    def _restored(self, packed: bytes) -> None:
        """`_restore`, and what is said where that cannot be."""
        try:
            questions = self._restore(packed)
        except _DAMAGED as error:
            raise TrainError(
                f"{self.checkpoint} is damaged ({type(error).__name__}): remove it to begin this stage again"
            ) from error
        if questions != self.data.digest:
            raise TrainError(
                f"{self.checkpoint} was made with other questions than {self.config.data or 'these'} has now: "
                "bring those back, or use another --output-dir"
            )

    def _restore(self, packed: bytes) -> str:
        """Sets everything to what a checkpoint holds; returns the digest of the questions it was made with."""
        # weights_only: a file from elsewhere must not run code.
        content = torch.load(BytesIO(packed), weights_only=True, map_location=self.stage.engine.model.device)
        for name, module in self.modules.items():
            module.load_state_dict(content["modules"][name])
        self.optimizer.load_state_dict(content["optimizer"])
        self.state = TrainerState(**content["state"])
        self.data.skipped.update(content["skipped"])
        return str(content["questions"])

    def _forget_later_lines(self, resumed: bool) -> None:
        """Drops log lines after the checkpoint (all lines if there is none), so that no step is logged twice."""
        if not self.metrics.exists():
            return
        text = disk.read_bytes(self.metrics)
        last = self.state.step if resumed else -1
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
        self.keeps_batches = engine.model.device.type == "cpu"
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
        """[B] rewards and exact matches of the batch's questions at one budget."""
        inputs = batch.for_scorer(scorer.config.question, scorer.config.joint)
        counts = [sum(Budget(keep).count(n) for n in sizes) for sizes in inputs.parts]
        chosen, _ = inputs.choose(scorer, counts)
        needed = "logits" in needs_of(self.reward)
        rollout = self.engine.run(batch, range(len(batch)), batch.by_question(chosen), logits=needed)
        return {"reward": scores_of(self.reward, rollout)[0], "exact": rollout.exact}

    def objective(self, scores: Scores) -> float:
        """The mean reward over the budgets."""
        return _mean([scores[f"reward@{keep:g}"] for keep in self.keeps])

    def means(self, scores: dict[int, Scores]) -> Scores:
        """Means over questions, and the objective.

        Raises:
            TrainError: no question could be used.
        """
        if not scores:
            reason = next(iter(self.skipped.values()))["why"]
            raise TrainError(f"not one of {len(self.questions)} validation questions can be used: {reason}")
        means = _means([scores[number] for number in sorted(scores)])  # the order of the sum must not vary
        return {"objective": self.objective(means), **means}

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


def _explored(micro_batches: dict[int, Generator[Any, None, None]]) -> dict[int, Any]:
    """What the stage explored in each micro-batch; None where every question of it was left out."""
    return {number: next(losses, None) for number, losses in micro_batches.items()}


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


def _fallen(before: dict[int, float], now: dict[int, float]) -> str:
    """By how much the objective has fallen, if by more than chance; else ""."""
    falls = torch.tensor([before[number] - now[number] for number in before if number in now], dtype=torch.float64)
    if len(falls) < 2:
        return ""
    error = float(falls.std()) / math.sqrt(len(falls))
    fall = float(falls.mean())
    return f"its objective has fallen by {fall:.3g}, {fall / error:.1f} standard errors" if fall > 2 * error > 0 else ""


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _means(collected: list[Stats]) -> Stats:
    """The mean of each number over those that have it."""
    keys = dict.fromkeys(key for stats in collected for key in stats)
    return {key: _mean([stats[key] for stats in collected if key in stats]) for key in keys}


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    return {key: _rounded(part) for key, part in value.items()} if isinstance(value, dict) else value
