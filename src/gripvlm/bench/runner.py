"""The whole benchmark: every setting at every batch size and prompt length, in alternating order, into one JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from gripvlm.bench.fit import check_limit, fits, free
from gripvlm.bench.measure import FULL, Cell, Setting
from gripvlm.bench.roofline import Counts, Runs, Weights, measured, row
from gripvlm.budget import Budget
from gripvlm.engine.request import checked_pruner
from gripvlm.errors import BudgetError, GripError, Interrupted
from gripvlm.eval.environment import command_line, git_state, hardware, utc, versions
from gripvlm.pruners import Pruner
from gripvlm.pruners.wrappers.tower import Tower
from gripvlm.utils import disk
from gripvlm.utils.progress import Progress

SCHEMA = "gripvlm.bench/1"
"""The number grows when an older reader would misread a file."""

Prompts = Callable[..., Mapping[str, Any]]
"""(batch, text tokens) -> inputs, all prompts of a batch alike in length; with `keep=` a budget the same prompts with
smaller pictures."""


class BenchInterrupted(Interrupted):
    """Ctrl-C in `bench`; its text says which rows are saved, `result` has the measurements so far."""

    def __init__(self, text: str, result: dict[str, Any]) -> None:
        super().__init__(text)
        self.result = result


def settings_of(pruners: Sequence[tuple[str, Pruner | None]], keeps: Sequence[Budget]) -> list[Setting]:
    """The unpruned model, the limits and every pruner at each budget; no pruner stands for smaller pictures."""
    shares = {spec: made.tower_budget if isinstance(made, Tower) else None for spec, made in pruners}
    settings = [FULL, *[Setting("limit", keep) for keep in keeps]]
    for keep in keeps:
        settings += [
            Setting("tower_limit", keep, tower_keep=share) for share in dict.fromkeys(shares.values()) if share
        ]
    for keep in keeps:
        settings += [
            Setting("pruned" if made else "downsample", keep, made, spec, shares[spec]) for spec, made in pruners
        ]
    return settings


def turns(settings: Sequence[Setting], repeats: int) -> Iterable[tuple[int, Setting]]:
    """(turn, setting): forwards and backwards in turn, so that a drift of the machine's speed cancels."""
    for turn in range(repeats):
        for setting in reversed(settings) if turn % 2 else settings:
            yield turn, setting


def bench(
    model: PreTrainedModel,
    prompts: Prompts,
    pruners: Sequence[tuple[str, Pruner | None]],
    keeps: Sequence[Budget],
    *,
    batches: Sequence[int] = (1,),
    lengths: Sequence[int] = (64,),
    new: int = 16,
    repeats: int = 7,
    fit: int = 0,
    out: Path | None = None,
    about: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Measures a model with all visual tokens, with fewer from the start, and with each pruner.

    Args:
        model: a supported transformers model.
        prompts: see `Prompts`.
        pruners: (as typed, object); ("downsample", None) encodes smaller pictures.
        keeps: budgets.
        batches, lengths: B and text tokens; every pair is a cell.
        new: tokens to generate, at least 2.
        repeats: turns that count; one more warms up. FLOPs are counted on one prompt.
        fit: also look for the largest batch, up to this one, that the accelerator's memory holds; 0 does not.
        out: where the JSON is written, after each cell and at the end; an existing file is replaced.
        about: what the result should say of the model besides its type, dtype, device and size.
        progress: show how far it is on standard error: a bar, or without a terminal a line now and then.

    Returns:
        {"schema", "command", "started", "environment", "model", "protocol", "machine", "finished", "cells", "rows",
        "fits"}; docs/bench.md says what each means.

    Raises:
        GripError: a pruner that does not serve this model; no pruner reaches any of the budgets (one that does not
            reach one of them has a row that says why); `fit` on a CPU.
        BenchInterrupted: Ctrl-C; what is done is in `out`.
    """
    if min([*batches, *lengths, repeats]) < 1 or new < 2:
        raise GripError("batch, prompt and repeats are 1 or more, and new is 2 or more, so that there is decoding")
    if fit:
        check_limit(model.device)
    for _, pruner in pruners:
        if pruner is not None:
            checked_pruner(pruner, model)
    settings = settings_of(pruners, keeps)
    pairs = [(batch, length) for batch in batches for length in lengths]
    total = sum(batch for batch, _ in pairs) * len(settings) * (repeats + 1)
    # locked first: a second run with the same file is refused before it has measured anything
    with disk.one_writer(out) if out is not None else nullcontext(), Progress("prompts", total, show=progress) as bar:
        run = _Run(model, prompts, settings, new, repeats, bar)
        run.result["model"] |= about or {}
        try:
            for batch, length in pairs:
                run.cell(batch, length)
                # long runs are written as they go; the last cell is written below, as finished
                if fit or (batch, length) != pairs[-1]:
                    run.write(out)
            # a pruner that never reached its budget would end the search
            if fit:
                reached = [setting for setting in settings if setting not in run.unreached]
                run.result["fits"].extend(fits(model, prompts, reached, lengths, new, fit, bar.about))
        except KeyboardInterrupt:
            run.write(out)
            done, planned = len(run.result["rows"]), len(pairs) * len(settings)
            text = "Stopped; nothing is kept, because no --out was given."
            if out is not None:
                text = (
                    f"Stopped. {done} of {planned} rows are in {out}, some perhaps with fewer repeats than requested."
                )
            raise BenchInterrupted(text, run.result) from None
        run.result["finished"] = True
        run.write(out)
        return run.result


class _Run:
    """A running benchmark: its settings, and its measurements so far (`result`, ready to be written)."""

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: Prompts,
        settings: Sequence[Setting],
        new: int,
        repeats: int,
        bar: Progress,
    ) -> None:
        self.model, self.prompts, self.settings, self.bar = model, prompts, settings, bar
        self.new, self.repeats = new, repeats
        self.keeps = [setting.keep for setting in settings if setting.kind == "limit" and setting.keep is not None]
        self.counts: dict[tuple[int, Setting], Counts] = {}  # of one prompt, by its length
        self.unreached: set[Setting] = set()
        started = utc()
        # measured here and not in a file of its own: shares of the roofline are of this machine, now
        self.machine, self.weights = measured(model.device, model.dtype), Weights.of(model)
        self.result: dict[str, Any] = {
            "schema": SCHEMA,
            "command": command_line(),
            "started": started,
            "environment": {"versions": versions(), "hardware": hardware(model.device), "git": git_state()},
            "model": {
                "type": model.config.model_type,
                "dtype": str(model.dtype).removeprefix("torch."),
                "device": str(model.device),
                "attention": model.config.get_text_config()._attn_implementation,
                "parameters": sum(p.numel() for p in model.parameters()),
            },
            "protocol": {
                "new": self.new,
                "repeats": self.repeats,
                "warm_up": 1,
                "order": "settings forwards in even turns, backwards in odd ones",
                "spread": "lower and upper quartile",
                "flops": "torch FlopCounterMode: matrix products, convolutions, attention (whole squares)",
            },
            "machine": asdict(self.machine) | {"weights": asdict(self.weights)},
            "finished": False,
            "cells": [],
            "rows": [],
            "fits": [],
        }

    def write(self, out: Path | None) -> None:
        if out is not None:
            disk.write(out, json.dumps(self.result, indent=1, ensure_ascii=False) + "\n")

    def cell(self, batch: int, length: int) -> None:
        """Measures all settings at one batch size and prompt length; what was measured counts also after Ctrl-C."""
        self.bar.about(f"batch {batch}, prompt {length}")
        runs = {setting: Runs() for setting in self.settings}
        failed = ""
        try:
            self._measure(runs, batch, length)
        except torch.OutOfMemoryError as error:
            failed = f"out of memory before any setting ran: {_first_line(error)}"
            free(self.model)
        finally:
            self.unreached |= {setting for setting, run in runs.items() if run.unreached}
            done = sum(len(run.turns) for run in runs.values())
            about = {"batch": batch, "prompt": length}
            progress = {"runs_asked": len(runs) * self.repeats, "runs_done": done, "failed": failed or None}
            self.result["cells"].append(about | progress)
            limits = {s.keep: run for s, run in runs.items() if s.kind == "limit"}
            towers = {(s.keep, s.tower_keep): run for s, run in runs.items() if s.kind == "tower_limit"}
            for setting, run in runs.items():
                if run.turns or run.failed:
                    shape, hardware = (batch, self.new), (self.machine, self.weights)
                    tower = towers.get((setting.keep, setting.tower_keep))
                    numbers = row(run, runs[FULL], limits.get(setting.keep), tower, shape, hardware)
                    self.result["rows"].append(about | setting.columns | numbers)

    def _cell(self, batch: int, length: int) -> Cell:
        smaller: dict[Budget, Mapping[str, Any] | BudgetError] = {}
        for keep in [setting.keep for setting in self.settings if setting.kind == "downsample" and setting.keep]:
            try:
                smaller[keep] = self.prompts(batch, length, keep=keep)
            except BudgetError as error:
                smaller[keep] = error
        return Cell(self.model, self.prompts(batch, length), self.keeps, self.new, smaller)

    def _measure(self, runs: dict[Setting, Runs], batch: int, length: int) -> None:
        """Fills `runs`: counts and warm-up first, then the turns.

        Raises:
            BudgetError: no pruner reaches any of the budgets.
            torch.OutOfMemoryError: not even the vision encoder fits.
        """
        # counting slows each operation down and counts grow with the batch, so one prompt is counted, once a length
        counted = batch > 1 and all((length, setting) in self.counts for setting in runs)
        cell = self._cell(batch, length)
        single = cell if batch == 1 or counted else self._cell(1, length)
        for setting, run in runs.items():
            with _attempt(self.model, run):
                if not counted:
                    self.counts[length, setting] = single.counted(setting)
                if batch > 1:
                    cell.timed(setting)  # warms up, as counting does for one prompt
                run.counts = self.counts[length, setting].times(batch)
            self.bar.advance(batch)
        # where no pruner reaches its budget the command is wrong, and timing the rest would hide it
        pruned = {setting: run for setting, run in runs.items() if setting.kind in ("pruned", "downsample")}
        if pruned and all(run.unreached for run in pruned.values()):
            reasons = [f"{s.spec} at {s.keep.short}: {run.failed}" for s, run in pruned.items() if s.keep is not None]
            raise BudgetError("; ".join(reasons))
        for turn, setting in turns(list(runs), self.repeats):
            run = runs[setting]
            if not run.failed:
                with _attempt(self.model, run):
                    run.turns[turn], peak = cell.timed(setting)
                    run.peak = peak if run.peak is None or peak is None else max(run.peak, peak)
            self.bar.advance(batch)


@contextmanager
def _attempt(model: Any, run: Runs) -> Iterator[None]:
    """A setting that the device's memory does not hold, or whose budget cannot be reached, fails alone."""
    try:
        yield
    except BudgetError as error:
        run.failed, run.unreached = str(error), True
    except torch.OutOfMemoryError as error:
        # a median over the turns before would be of another state of the memory
        run.failed, run.turns = f"out of memory: {_first_line(error)}", {}
        free(model)


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0][:200]
