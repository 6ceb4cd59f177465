"""The loop that every stage shares: steps, validation, checkpoints, Ctrl-C, several processes.

All random numbers come from (seed, stage, step, micro-batch), those that choose data from (seed, micro-batch), so a
run that was killed and goes on is the same run bit for bit (but for `max_minutes`: then the rate follows the clock),
and two processes with one micro-batch each are one process with two.
"""

from __future__ import annotations

import copy
import json
import math
import pickle
import time
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn

from gripvlm.errors import GripError, TrainError
from gripvlm.grip.scorer import Scorer
from gripvlm.grip.train.config import TrainConfig
from gripvlm.grip.train.data import Questions, generator, name_of
from gripvlm.grip.train.processes import Processes
from gripvlm.grip.train.rollout import BAD_QUESTION, Batch, Engine, about
from gripvlm.grip.train.stopping import Stopping
from gripvlm.grip.train.validation import Validator
from gripvlm.tasks import Sample, Task
from gripvlm.utils import disk
from gripvlm.utils.progress import Progress
from gripvlm.utils.strict_json import BadJSON, parse

__all__ = ["Interrupted", "Loop", "Stage", "Stats"]

Stats: TypeAlias = dict[str, float]
_DAMAGED = (
    *(RuntimeError, EOFError, pickle.UnpicklingError, LookupError, TypeError, ValueError),
    *(AttributeError, AssertionError, ArithmeticError),
)
"""What torch raises for a checkpoint with flipped bytes (15,000 tried)."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C in training; its text says what is kept and how to go on."""


class Stage(ABC):
    """What is particular to one way of training: a loss, and modules of its own besides the scorer."""

    name: ClassVar[str]

    def __init__(self, config: TrainConfig, scorer: Scorer, engine: Engine, steps: int, rate: float) -> None:
        self.config, self.scorer, self.engine, self.steps, self.rate = config, scorer, engine, steps, rate

    @abstractmethod
    def losses(self, batch: Batch, progress: float, random: torch.Generator) -> Iterator[tuple[Tensor, Stats]]:
        """One or more (loss, what to log) for a batch; an optimiser step is taken after each."""

    def extras(self) -> dict[str, nn.Module]:
        """Further modules that a checkpoint must hold; those that require gradients are trained."""
        return {}


class Loop:
    """Runs one stage to its end, or until it is stopped.

    Args:
        stage: with the scorer it trains.
        data, validator: training questions and the judge of the best step.
        folder: of the run.
        processes: how many there are and how they add gradients.
        quiet: no progress bar.
    """

    def __init__(
        self,
        stage: Stage,
        data: Questions,
        validator: Validator,
        folder: Path,
        processes: Processes,
        quiet: bool = False,
    ) -> None:
        self.stage, self.data, self.validator, self.folder = stage, data, validator, folder
        self.processes, self.quiet, self.config = processes, quiet, stage.config
        self.modules: dict[str, nn.Module] = {"scorer": stage.scorer, **stage.extras()}
        self.kept = stage.scorer  # what is validated, and in the end returned
        if self.config.ema_decay:
            self.modules["average"] = self.kept = copy.deepcopy(stage.scorer).requires_grad_(False)
        for module in self.modules.values():
            module.to(stage.engine.model.device)
        self.weights = [p for module in self.modules.values() for p in module.parameters() if p.requires_grad]
        self.optimiser = torch.optim.AdamW(
            self.weights, lr=stage.rate, betas=(0.9, 0.98), weight_decay=self.config.weight_decay
        )
        self.step, self.spent, self.best, self.stale, self.judged = 0, 0.0, -math.inf, 0, -1
        self.best_state = copy.deepcopy(stage.scorer.state_dict())
        self.checkpoint = folder / f"{stage.name}.ckpt"
        self.metrics = folder / "metrics.jsonl"
        self.stop = Stopping()
        self.left_out: list[tuple[str, dict[str, Any]]] = []  # questions, in this step, by this process

    # --- the run ----------------------------------------------------------------------------------------------

    def run(self) -> Scorer:
        """Trains; returns the scorer with the best validated weights.

        Raises:
            Interrupted: after Ctrl-C, with a checkpoint written.
            TrainError: a reward, a sample or the loss went wrong; the checkpoint before it stands.
        """
        self._resume()
        saved = time.monotonic()
        with self.stop, self._progress() as bar:
            if self.step == 0 and self.stage.steps:
                self._validate()
            while not self._over():
                began, tried = time.monotonic(), self.stage.engine.subsets
                stats = self._one_step()
                took = time.monotonic() - began  # validations and checkpoints are not counted
                self.spent += took
                if scored := self.stage.engine.subsets - tried:
                    stats["subsets_per_second"] = scored / took
                self._log({"step": self.step, **stats})
                bar.about(_said(stats))
                bar.advance()
                if self.step % self.config.val_every == 0 or self.step == self.stage.steps:
                    self._validate()
                if self.processes.any(self.stop.asked):
                    self._save()
                    raise Interrupted(
                        f"Stopped at step {self.step} of {self.stage.steps} ({self.stage.name}). The same command "
                        f"goes on from {self.checkpoint}."
                    )
                if time.monotonic() - saved > 60 * self.config.save_minutes:
                    self._save()
                    saved = time.monotonic()
            if self.judged < self.step:  # out of time between two validations
                self._validate()
        self._save()
        if self.stop.asked:
            raise Interrupted(
                f"Stopped at the end of {self.stage.name}. The same command goes on from {self.checkpoint}."
            )
        self.stage.scorer.load_state_dict(self.best_state)
        return self.stage.scorer

    def _over(self) -> bool:
        config = self.config
        late = bool(config.max_minutes) and self.spent > 60 * config.max_minutes
        tired = bool(config.patience) and self.stale >= config.patience
        return self.step >= self.stage.steps or self.processes.any(late) or tired

    def _one_step(self) -> Stats:
        config, stage = self.config, self.stage
        progress = self.step / max(stage.steps, 1)
        if config.max_minutes:
            progress = max(progress, min(1.0, self.spent / (60 * config.max_minutes)))
            progress = self.processes.largest(progress)
        for group in self.optimiser.param_groups:
            begun = max((self.step + 1) / max(1.0, 0.03 * stage.steps), progress / 0.03)
            group["lr"] = stage.rate * min(1.0, begun) * _cosine(progress)
        stage.scorer.train()
        mine = [m for m in range(config.accumulate) if m % self.processes.count == self.processes.rank]
        running = [self._losses(micro, progress) for micro in mine]
        collected: list[Stats] = []
        rounds = config.num_iterations if stage.name == "grpo" else 1
        norm = 0.0
        for last in (iteration == rounds - 1 for iteration in range(rounds)):
            self.optimiser.zero_grad(set_to_none=False)
            for losses in running:
                loss, stats = next(losses, (None, {}))
                if loss is None:  # every question of the micro-batch was left out
                    continue
                if not bool(loss.isfinite()):
                    raise self._diverged("loss", float(loss.detach()))
                (loss / config.accumulate).backward()
                collected.append({"loss": float(loss.detach()), **stats})
                if last:
                    losses.close()  # lets go of the micro-batch before the next is made
            self.processes.add_gradients(self.weights)
            norm = float(nn.utils.clip_grad_norm_(self.weights, config.max_grad_norm))
            if not math.isfinite(norm):
                raise self._diverged("gradient", norm)
            self.optimiser.step()
            self._average()
        self.step += 1
        keys = dict.fromkeys(key for stats in collected for key in stats)
        means = {key: _mean([stats[key] for stats in collected if key in stats]) for key in keys}
        means = self.processes.average(means)
        self._share_left_out()
        return {"lr": self.optimiser.param_groups[0]["lr"], "grad_norm": norm, **means}

    def _diverged(self, what: str, value: float) -> TrainError:
        flag = "--warmup-learning-rate" if self.stage.name == "warmup" else "--learning-rate"
        where = " and type another --out" if self.checkpoint.exists() else ""
        return TrainError(f"the {what} of {self.stage.name} is {value} at step {self.step}: lower {flag}{where}")

    def _losses(self, micro: int, progress: float) -> Generator[tuple[Tensor, Stats], None, None]:
        """The stage's losses of one micro-batch of this step, which is prepared when the first is asked for."""
        batch = self._batch(self.step * self.config.accumulate + micro)
        if batch is not None:
            random = generator(self.config.seed, self.stage.name, self.step, micro)
            yield from self.stage.losses(batch, progress, random)

    @torch.no_grad()
    def _average(self) -> None:
        """Moves the running average of the scorer's weights, where there is one, towards what they are now."""
        if self.kept is not self.stage.scorer:
            for average, now in zip(self.kept.parameters(), self.stage.scorer.parameters(), strict=True):
                average.lerp_(now, 1 - self.config.ema_decay)

    def _batch(self, number: int) -> Batch | None:
        """The micro-batch's encoded questions; None where every one of them was left out."""
        config = self.config
        whole = bool(torch.rand((), generator=generator(config.seed, "text", number)) < 0.5)
        while questions := self.data.batch(number):
            try:
                return self.stage.engine.prepare(questions, own=config.own_answers, whole=whole)
            except BAD_QUESTION as error:
                self._leave_out(questions, error)
        return None

    def _leave_out(self, questions: list[tuple[Task, Sample]], error: GripError) -> None:
        """Finds the bad questions of a batch, one by one, and leaves them out from now on, or stops."""
        found = False
        for pair in questions:
            try:
                self.stage.engine.prepare([pair], own=self.config.own_answers)
            except BAD_QUESTION as one:
                why = about(pair[1], one)
                if self.config.on_bad == "stop":
                    raise TrainError(why) from one
                found = True
                line = {"step": self.step + 1, "skipped": pair[1].id, "task": pair[0].name, "why": why}
                self._log(line)
                self.left_out.append((name_of(*pair), line))
                self.data.skip(pair, why)
        if not found:
            raise error

    def _share_left_out(self) -> None:
        """What another process left out in this step is left out here too, and logged."""
        for rank, found in enumerate(self.processes.everyones(self.left_out)):
            for name, line in found:
                self.data.skipped[name] = line["why"]
                if rank:  # the first has logged its own
                    self._log(line)
        self.left_out = []

    # --- validation, log, checkpoint --------------------------------------------------------------------------

    def _validate(self) -> None:
        self.kept.eval()
        told = set(self.validator.skipped)
        found = self.validator.judge(self.kept)
        for name, line in self.validator.skipped.items():
            if name not in told:
                self._log({"step": self.step, **line, "validation": True})
        self.judged = self.step
        if found["objective"] > self.best:
            self.best, self.stale = found["objective"], 0
            self.best_state = copy.deepcopy(self.kept.state_dict())
        else:
            self.stale += 1
        self._log({"step": self.step, "minutes": round(self.spent / 60, 3), "val": found})

    def _log(self, line: dict[str, Any]) -> None:
        if self.processes.rank:
            return
        disk.append(self.metrics, json.dumps({"stage": self.stage.name, **_rounded(line)}) + "\n", new=True)
        self.processes.log({f"{self.stage.name}/{k}": v for k, v in _flat(line).items()}, self.step)

    def _save(self) -> None:
        if self.processes.rank:
            return
        state = {
            "config": self.config.to_dict(),
            "modules": {name: module.state_dict() for name, module in self.modules.items()},
            "optimiser": self.optimiser.state_dict(),
            "step": self.step,
            "spent": self.spent,
            "best": self.best,
            "stale": self.stale,
            "judged": self.judged,
            "questions": self.data.digest,
            "best_state": self.best_state,
            "skipped": self.data.skipped,
        }
        packed = BytesIO()
        torch.save(state, packed)
        disk.write(self.checkpoint, packed.getvalue())

    def _resume(self) -> None:
        if not self.checkpoint.exists():
            if self.processes.rank == 0:
                self._forget_later_lines()
            return
        try:
            packed, device = BytesIO(disk.read_bytes(self.checkpoint)), self.stage.engine.model.device
            state = torch.load(packed, weights_only=True, map_location=device)
            for name, module in self.modules.items():
                module.load_state_dict(state["modules"][name])
            self.optimiser.load_state_dict(state["optimiser"])
            self.step, self.spent, self.best = state["step"], state["spent"], state["best"]
            self.stale, self.best_state = state["stale"], state["best_state"]
            self.judged = state.get("judged", self.step)
            self.data.skipped.update(state["skipped"])
        except _DAMAGED as error:
            raise TrainError(
                f"{self.checkpoint} is damaged ({type(error).__name__}): remove it to begin this stage again"
            ) from error
        if state.get("questions", self.data.digest) != self.data.digest:
            raise TrainError(
                f"{self.checkpoint} was made with other questions than {self.config.data or 'these'} has now: bring "
                "those back, or type another --out"
            )
        if self.processes.rank == 0:
            self._forget_later_lines()

    def _forget_later_lines(self) -> None:
        """Drops what was logged after the checkpoint (all of it without one), so that no step is there twice."""
        if not self.metrics.exists():
            return
        text = disk.read_bytes(self.metrics)
        last = self.step if self.checkpoint.exists() else -1
        kept = []
        for number, line in enumerate(text[: text.rfind(b"\n") + 1].splitlines(), 1):  # a kill may leave half a line
            try:
                one = parse(line)
                if one["stage"] != self.stage.name or one["step"] <= last:
                    kept.append(json.dumps(one) + "\n")
            except (BadJSON, KeyError, TypeError) as error:
                raise TrainError(
                    f"line {number} of {self.metrics} is damaged ({error}): mend that line, or move the file away"
                ) from None
        disk.write(self.metrics, "".join(kept))

    def _progress(self) -> Progress:
        shown = not self.quiet and not self.processes.rank
        bar = Progress(f"steps of {self.stage.name}", self.stage.steps, self.step, show=shown)
        bar.about("first validation" if self.step == 0 else "")
        return bar


def _said(stats: Stats) -> str:
    """The number that tells how it goes."""
    return next((f"{name} {stats[name]:.3f}" for name in ("reward", "loss") if name in stats), "")


def _cosine(progress: float) -> float:
    """From 1 down to 0.1."""
    return 0.1 + 0.45 * (1 + math.cos(math.pi * min(progress, 1.0)))


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    return {key: _rounded(one) for key, one in value.items()} if isinstance(value, dict) else value


def _flat(line: dict[str, Any], before: str = "") -> dict[str, float]:
    """Numbers only, nested names joined by a slash."""
    found: dict[str, float] = {}
    for key, value in line.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{before}{key}/")
        elif isinstance(value, (int, float)):
            found[before + key] = value
    return found
