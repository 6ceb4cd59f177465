"""The trainer that every stage shares: steps, validation and checkpoints, in one process or several.

All random numbers come from (seed, stage, step, micro-batch), those that choose data from (seed, micro-batch), so a
run that was killed and resumed is the same run bit for bit, and two processes with one micro-batch each are one
process with two.
"""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from gripvlm.errors import Interrupted, TrainError
from gripvlm.grip.scorer import Scorer
from gripvlm.grip.train.checkpoint import Checkpoint, TrainerState
from gripvlm.grip.train.data import QuestionStream, generator
from gripvlm.grip.train.evaluator import Evaluator, Scores, fallen
from gripvlm.grip.train.journal import Callback, Journal
from gripvlm.grip.train.micro_batches import MicroBatches
from gripvlm.grip.train.processes import EndedTogether, Processes
from gripvlm.grip.train.stage import Stage, Stats, means
from gripvlm.grip.train.stop_signal import StopSignal
from gripvlm.utils.progress import Progress

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["Trainer"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

LR_WARMUP_RATIO = 0.03
"""Share of the steps in which the learning rate rises linearly."""


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
        self.stage, self.data, self.evaluator, self.quiet = stage, data, evaluator, quiet
        self.config, self.processes, self.state = stage.config, Processes(accelerator), TrainerState()
        self.eval_scorer = stage.scorer  # the scorer that is validated and, in the end, returned
        modules: dict[str, nn.Module] = {"scorer": stage.scorer, **stage.modules()}
        if self.config.ema_decay:
            # A copy that the optimiser does not know: it only follows the weights.
            modules["average"] = self.eval_scorer = copy.deepcopy(stage.scorer).requires_grad_(False)
        for module in modules.values():
            module.to(stage.engine.device)
        self.weights = [p for module in modules.values() for p in module.parameters() if p.requires_grad]
        self.weights_of_all = [value for module in modules.values() for value in module.state_dict().values()]
        self.optimizer = torch.optim.AdamW(
            self.weights, lr=stage.learning_rate, betas=(0.9, 0.98), weight_decay=self.config.weight_decay
        )
        folder = Path(self.config.output_dir).expanduser()
        self.checkpoint = Checkpoint(folder / f"{stage.name}.ckpt", self.config, modules, self.optimizer, data)
        self.journal = Journal(stage.name, folder / "metrics.jsonl", self.processes, callbacks, first_step)
        last = stage.max_steps * self.config.gradient_accumulation_steps
        self.micro_batches = MicroBatches(stage.engine, data, self.config, self.processes, last, self.journal.log)
        self.stop_signal = StopSignal()

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
                f"{self.checkpoint.path}."
            )
        self.stage.scorer.load_state_dict(self.eval_scorer.state_dict())
        return self.stage.scorer

    def _step(self) -> Stats:
        """One round: explore, then `num_iterations` optimiser steps on what was found."""
        stage, state = self.stage, self.state
        began, engine = time.monotonic(), stage.engine
        before = engine.rollouts, engine.tokens
        progress = self._set_learning_rate()
        stage.scorer.train()
        losses: list[Iterator[tuple[Tensor, Stats]]] = []  # of each micro-batch of this process
        explored = self._everyone(partial(self._explore, progress, losses))
        in_order = sorted((pair for of_one in explored for pair in of_one), key=lambda pair: pair[0])
        self._everyone(partial(stage.pool, [found for _, found in in_order if found is not None]))
        collected: list[Stats] = []
        for _ in range(stage.num_iterations):
            # Zeros, not None: a process whose questions were all left out still takes part in the sum.
            self.optimizer.zero_grad(set_to_none=False)
            self._everyone(partial(self._backward, losses, collected))
            norm = self._apply_gradients()
        state.step += 1
        mine = engine.rollouts - before[0], engine.tokens - before[1]
        averages, counts, left_out = zip(
            *self.processes.gather((means(collected), mine, self.micro_batches.left_out)), strict=True
        )
        self.micro_batches.share_left_out(list(left_out))
        state.rollouts += sum(rollouts for rollouts, _ in counts)
        state.tokens += sum(tokens for _, tokens in counts)
        state.seconds += (seconds := time.monotonic() - began)
        spent = {"num_rollouts": state.rollouts, "num_tokens": state.tokens, "step_time": seconds}
        return {"learning_rate": self.optimizer.param_groups[0]["lr"], "grad_norm": norm} | means([*averages]) | spent

    def _explore(self, progress: float, losses: list[Iterator[tuple[Tensor, Stats]]]) -> list[tuple[int, Any]]:
        """(number, what the stage explored) of this process's micro-batches of the step; their losses, to come."""
        found, config, stage = [], self.config, self.stage
        # Which process computes a micro-batch changes nothing in it: its random numbers come from its number.
        for micro in range(self.processes.rank, config.gradient_accumulation_steps, self.processes.count):
            batch = self.micro_batches.take(self.state.step * config.gradient_accumulation_steps + micro)
            if batch is not None:
                random = generator(config.seed, stage.random_stream or stage.name, self.state.step, micro)
                found.append((micro, stage.explore(batch, random)))
                losses.append(stage.losses(batch, progress, random))
        return found

    def _backward(self, losses: list[Iterator[tuple[Tensor, Stats]]], collected: list[Stats]) -> None:
        """Adds the gradients of this process's micro-batches; `collected` gets what to log of each."""
        for each in losses:
            loss, stats = next(each)
            # Before backward, so that no weight is touched and the checkpoint before it stands.
            if not bool(loss.isfinite()):
                raise self._diverged("loss", float(loss.detach()))
            # The sum over the micro-batches of all processes is then their mean.
            (loss / self.config.gradient_accumulation_steps).backward()
            collected.append({"loss": float(loss.detach()), **stats})

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

    def _set_learning_rate(self) -> float:
        """Sets the rate of this step: a linear rise, then a cosine to a tenth. Returns the progress, in [0, 1]."""
        step, steps = self.state.step, self.stage.max_steps
        progress = step / steps
        risen = min(1.0, (step + 1) / max(1.0, LR_WARMUP_RATIO * steps))
        cosine = 0.1 + 0.45 * (1 + math.cos(math.pi * progress))
        for group in self.optimizer.param_groups:
            group["lr"] = self.stage.learning_rate * risen * cosine
        return progress

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

    def _diverged(self, what: str, value: float) -> TrainError:
        flag = "--" + self.stage.rate_setting.replace("_", "-")
        where = " and use another --output-dir" if self.checkpoint.exists() else ""
        step = self.state.step
        return TrainError(f"the {what} of {self.stage.name} is {value} at step {step}: lower {flag}{where}")

    def _after_step(self, stats: Stats) -> bool:
        """Logs and calls back; returns whether this process was told to stop."""
        self.journal.log({"step": self.state.step, **stats})
        self.journal.call("on_step_end", self.state.step, stats)
        return self.stop_signal.received

    # --- validation and checkpoint ----------------------------------------------------------------------------

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
        averages = evaluator.means(scores)
        line: dict[str, Any] = {"step": state.step, "minutes": round(state.seconds / 60, 3), "eval": averages}
        objectives = {number: evaluator.objective(each) for number, each in scores.items()}
        if state.step == 0:
            state.first = objectives
        elif worse := fallen(state.first, objectives):
            line["warning"] = f"the scorer is worse than before {self.stage.name}: {worse}"
            if self.processes.first:
                logger.warning("Step %d: %s", state.step, line["warning"])
        for name, left_out in evaluator.skipped.items():
            if name not in skipped_before:
                self.journal.log({"step": state.step, **left_out, "validation": True})
        self.journal.log(line)
        self.processes.together(partial(self.journal.call, "on_evaluate", state.step, averages))

    def _save_checkpoint(self) -> None:
        def write() -> None:
            if self.processes.first:
                self.checkpoint.write(self.state)
                self.journal.call("on_save", self.state.step, self.checkpoint.path)

        self.processes.together(write)

    def _load_checkpoint(self) -> None:
        """What the first process finds on its disk, in all of them; its weights where it finds nothing."""
        first = self.processes.first
        (packed, *_) = self.processes.everyone(lambda: self.checkpoint.read() if first else None)
        if packed is None:
            self.processes.copy_first(self.weights_of_all)
        else:
            device = self.stage.engine.device
            self.state = self.processes.together(partial(self.checkpoint.restore, packed, device))
        step = -1 if packed is None else self.state.step
        self.processes.together(partial(self.journal.forget_after, step))
