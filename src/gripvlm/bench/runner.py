"""The whole benchmark: every setting at every batch size and prompt length, in alternating order, into one JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gripvlm.bench.fit import check_limit, fits, free
from gripvlm.bench.machine import Machine, Weights, measured
from gripvlm.bench.measure import FULL, Cell, Counts, Runs, Setting
from gripvlm.bench.rows import row
from gripvlm.bench.words import fit_sentences, sentences
from gripvlm.budget import Budget
from gripvlm.engine.request import checked_pruner
from gripvlm.errors import BudgetError, GripError
from gripvlm.eval.environment import command_line, git_state, hardware, utc, versions
from gripvlm.pruners import Pruner
from gripvlm.utils import disk
from gripvlm.utils.progress import Progress

__all__ = ["SCHEMA", "Interrupted", "bench", "settings_of", "turns"]

SCHEMA = "gripvlm.bench/1"
"""The number grows when an older reader would misread a file."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C in `bench`; its text says what is kept, `result` is what was measured."""

    def __init__(self, text: str, result: dict[str, Any]) -> None:
        super().__init__(text)
        self.result = result


def settings_of(pruners: Sequence[tuple[str, Pruner]], keeps: Sequence[Budget]) -> list[Setting]:
    """The unpruned model, the limit at each budget, and every pruner at each."""
    limits = [Setting("limit", keep) for keep in keeps]
    return [FULL, *limits, *[Setting("pruned", keep, pruner, spec) for keep in keeps for spec, pruner in pruners]]


def turns(settings: Sequence[Setting], repeats: int) -> Iterable[tuple[int, Setting]]:
    """(turn, setting): forwards and backwards in turn, so that a drift of the machine's speed cancels."""
    for turn in range(repeats):
        for setting in reversed(settings) if turn % 2 else settings:
            yield turn, setting


def bench(
    model: Any,
    prompts: Callable[[int, int], Mapping[str, Any]],
    pruners: Sequence[tuple[str, Pruner]],
    keeps: Sequence[Budget],
    *,
    batches: Sequence[int] = (1,),
    lengths: Sequence[int] = (64,),
    new: int = 16,
    repeats: int = 7,
    fit: int = 0,
    out: Path | None = None,
    overwrite: bool = False,
    about: Mapping[str, Any] | None = None,
    command: str | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Measures a model with all visual tokens, with fewer from the start, and with each pruner.

    Args:
        model: a supported transformers model.
        prompts: (batch, text tokens) -> inputs, all prompts of a batch alike in length.
        pruners: (as typed, object).
        keeps: budgets.
        batches, lengths: B and text tokens; every pair is a cell.
        new: tokens to generate, at least 2.
        repeats: turns that count; one more warms up. FLOPs are counted on one prompt.
        fit: also look for the largest batch, up to this one, that the accelerator's memory holds; 0 does not.
        out: where the JSON goes, after each cell and at the end.
        overwrite: replace it where it exists.
        about: what the result should say of the model besides its type, dtype, device and size.
        command: by default `sys.argv`.
        progress: show how far it is on standard error: a bar, or without a terminal a line now and then.

    Returns:
        {"schema", "command", "started", "environment", "model", "protocol", "machine", "finished", "cells", "rows",
        "fits", "sentences"}; docs/bench.md says what each means.

    Raises:
        GripError: `out` exists; a pruner that does not serve this model; no pruner reaches any of the budgets (one that
            does not reach one of them has a row that says why); `fit` on a CPU.
        Interrupted: Ctrl-C; what is done is in `out`.
    """
    if out is not None and out.exists() and not overwrite:
        raise GripError(f"--out {out} exists: type --overwrite to replace it, or another --out")
    if min([*batches, *lengths, repeats]) < 1 or new < 2:
        raise GripError("batch, prompt and repeats are 1 or more, and new is 2 or more, so that there is decoding")
    if fit:
        check_limit(model.device)
    for _, pruner in pruners:
        checked_pruner(pruner, model)
    started, settings = utc(), settings_of(pruners, keeps)
    machine, weights = measured(model.device, model.dtype), Weights.of(model)
    cells: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    fitted: list[dict[str, Any]] = []
    known: dict[tuple[int, Setting], Counts] = {}
    unreached: set[Setting] = set()

    def result(finished: bool) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "command": command or command_line(),
            "started": started,
            "environment": {"versions": versions(), "hardware": hardware(model.device), "git": git_state()},
            "model": {**_model(model), **(about or {})},
            "protocol": {
                "new": new,
                "repeats": repeats,
                "warm_up": 1,
                "order": "settings forwards in even turns, backwards in odd ones",
                "spread": "lower and upper quartile",
                "flops": "torch FlopCounterMode: matrix products, convolutions, attention (whole squares)",
            },
            "machine": asdict(machine) | {"weights": asdict(weights)},
            "finished": finished,
            "cells": cells,
            "rows": rows,
            "fits": fitted,
            "sentences": [*sentences(rows), *fit_sentences(fitted)],
        }

    def write(finished: bool) -> dict[str, Any]:
        found = result(finished)
        if out is not None:
            disk.write(out, json.dumps(found, indent=1, ensure_ascii=False) + "\n")
        return found

    pairs = [(batch, length) for batch in batches for length in lengths]
    total = sum(batch for batch, _ in pairs) * len(settings) * (repeats + 1)
    with disk.one_writer(out) if out is not None else nullcontext(), Progress("prompts", total, show=progress) as bar:
        for batch, length in pairs:
            bar.about(f"batch {batch}, prompt {length}")
            runs: dict[Setting, Runs] = {setting: Runs() for setting in settings}
            try:
                step = partial(bar.advance, batch)
                why = _measured(model, prompts, (batch, length), new, repeats, runs, known, step)
            except KeyboardInterrupt:
                rows += _rows(runs, batch, length, new, machine, weights)
                cells.append(_cell(batch, length, runs, repeats, ""))
                raise Interrupted(_kept(out, rows, len(pairs) * len(settings)), write(False)) from None
            rows += _rows(runs, batch, length, new, machine, weights)
            cells.append(_cell(batch, length, runs, repeats, why))
            unreached |= {setting for setting, found in runs.items() if found.unreached}
            if fit or (batch, length) != pairs[-1]:
                write(False)
        try:
            if fit:
                able = [setting for setting in settings if setting not in unreached]
                fitted.extend(fits(model, prompts, able, lengths, new, fit, bar.about))
        except KeyboardInterrupt:
            raise Interrupted(_kept(out, rows, len(pairs) * len(settings)), write(False)) from None
        return write(True)


def _measured(
    model: Any,
    prompts: Callable[[int, int], Mapping[str, Any]],
    shape: tuple[int, int],
    new: int,
    repeats: int,
    runs: dict[Setting, Runs],
    known: dict[tuple[int, Setting], Counts],
    step: Callable[[], None],
) -> str:
    """Fills `runs`, and `known` with the counts of one prompt; why nothing could be measured, or empty."""
    keeps = [setting.keep for setting in runs if setting.kind == "limit" and setting.keep is not None]
    batch, length = shape
    counted = batch > 1 and all((length, setting) in known for setting in runs)
    try:
        cell = Cell(model, prompts(batch, length), keeps, new)
        one = cell if batch == 1 or counted else Cell(model, prompts(1, length), keeps, new)
    except torch.OutOfMemoryError as error:
        free(model)
        return f"out of memory before any setting ran: {_first_line(error)}"
    for setting, found in runs.items():
        if not counted:
            _attempt(model, found, partial(_count, known, one, length, setting))
        if batch > 1 and not found.failed:
            _attempt(model, found, partial(cell.timed, setting))  # warms up, as counting does for one prompt
        if not found.failed:
            found.counts = known[length, setting].times(batch)
        step()
    pruned = {setting: found for setting, found in runs.items() if setting.kind == "pruned"}
    if pruned and all(found.unreached for found in pruned.values()):
        raise BudgetError("; ".join(f"{_typed(setting)}: {found.failed}" for setting, found in pruned.items()))
    for turn, setting in turns(list(runs), repeats):
        if not runs[setting].failed:
            _attempt(model, runs[setting], partial(_time, runs[setting], cell, setting, turn))
        step()
    return ""


def _count(known: dict[tuple[int, Setting], Counts], one: Cell, length: int, setting: Setting) -> None:
    known[length, setting] = one.counted(setting)


def _time(found: Runs, cell: Cell, setting: Setting, turn: int) -> None:
    found.turns[turn], peak = cell.timed(setting)
    found.peak = peak if found.peak is None or peak is None else max(found.peak, peak)


def _attempt(model: Any, found: Runs, work: Callable[[], Any]) -> None:
    """Does it, or notes that the device's memory does not hold it or that its budget cannot be reached."""
    try:
        work()
    except BudgetError as why:
        found.failed, found.unreached = str(why), True
    except torch.OutOfMemoryError as error:
        found.failed, found.turns = f"out of memory: {_first_line(error)}", {}
        free(model)


def _typed(setting: Setting) -> str:
    return f"{setting.spec} at {setting.keep.short}" if setting.keep is not None else setting.name


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0][:200]


def _rows(
    runs: Mapping[Setting, Runs], batch: int, length: int, new: int, machine: Machine, weights: Weights
) -> list[dict[str, Any]]:
    """One row a setting that was measured, or that failed."""
    full, limits = runs[FULL], {setting.keep: found for setting, found in runs.items() if setting.kind == "limit"}
    return [
        {"batch": batch, "prompt": length, "kind": setting.kind, "setting": setting.name}
        | {"pruner": setting.spec or None, "keep": None if setting.keep is None else setting.keep.plain}
        | row(found, full, limits.get(setting.keep), new, batch, machine, weights)
        for setting, found in runs.items()
        if found.turns or found.failed
    ]


def _cell(batch: int, length: int, runs: Mapping[Setting, Runs], repeats: int, why: str) -> dict[str, Any]:
    asked = len(runs) * repeats
    done = sum(len(found.turns) for found in runs.values())
    return {"batch": batch, "prompt": length, "runs_asked": asked, "runs_done": done, "failed": why or None}


def _kept(out: Path | None, rows: Sequence[Mapping[str, Any]], planned: int) -> str:
    if out is None:
        return "Stopped; nothing is kept, because no --out was given."
    return f"Stopped. {len(rows)} of {planned} rows are in {out}, some perhaps with fewer repeats than asked for."


def _model(model: Any) -> dict[str, Any]:
    return {
        "type": model.config.model_type,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "attention": model.config.get_text_config()._attn_implementation,
        "parameters": sum(p.numel() for p in model.parameters()),
    }
