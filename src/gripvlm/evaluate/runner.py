"""`evaluate`: tasks x pruners x budgets, each image encoded once, every answer kept as it comes."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from gripvlm.budget import Keep
from gripvlm.errors import GripError
from gripvlm.evaluate.answering import Outcome, answer, make_inputs, question_ids
from gripvlm.evaluate.arms import BLIND, ORACLE, Arm, digest, fingerprint, make_arms
from gripvlm.evaluate.environment import command_line, git_state, hardware, versions
from gripvlm.evaluate.journal import Journal, ResumeError, samples_path, write_atomically
from gripvlm.evaluate.oracle import oracle
from gripvlm.evaluate.statistics import Scored, majority, mean_rows, row
from gripvlm.models.encoded import Encoded
from gripvlm.prune import encode, pruned_run
from gripvlm.pruners import Pruner
from gripvlm.tasks import Sample, Task, get_tasks

__all__ = ["SCHEMA", "Interrupted", "evaluate"]

SCHEMA = "gripvlm.evaluate/1"


class Interrupted(KeyboardInterrupt):
    """Ctrl-C in `evaluate`; its text says what is kept and how to go on."""


@dataclass(frozen=True, eq=False)
class _Chunk:
    """One batch of one task."""

    task: Task
    samples: list[Sample]

    @property
    def ids(self) -> list[str]:
        return [sample.id for sample in self.samples]


def evaluate(
    model: Any,
    processor: Any,
    tasks: str | Task | Sequence[str | Task],
    pruners: Sequence[str | Pruner],
    keeps: Sequence[Keep] = (),
    *,
    limit: int | None = None,
    seed: int = 0,
    batch_size: int = 8,
    out: str | Path | None = None,
    positions: str = "original",
    overwrite: bool = False,
    blind: bool = True,
    model_name: str | None = None,
    command: str | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Scores every pruner at every budget on every task.

    Args:
        model, processor: a supported transformers model and its processor.
        tasks: names for `get_tasks`, or `Task` objects.
        pruners: names, specs or objects; `"full"` is always there, `"oracle"` keeps each question's
            own evidence where the task marks it.
        keeps: budgets, as for `gripvlm.prune`.
        limit: at most so many questions a task, drawn with `seed`.
        seed: of that draw and of the bootstrap. A pruner's own seed is its option.
        batch_size: questions at a time; times are means over a batch.
        out: where the JSON goes; the answers go beside it, to `<out>.samples.jsonl`, as they are
            finished, and the same call goes on from them. None keeps everything in memory.
        positions: "original" or "renumbered".
        overwrite: start anew where `out` or its samples exist.
        blind: also ask every question without the image.
        model_name, command: as the results should say; by default the model's own and `sys.argv`.
        progress: show a bar with the time left, on standard error.

    Returns:
        {"schema", "header", "rows", "means", "samples"}: what is written to `out`. A row has model,
        task, pruner, pruner_config, keep (asked), keep_fraction (achieved), tokens, score, ci_low,
        ci_high (95 %, clustered by image), n, blind, majority, seconds_* a sample, peak_memory
        (bytes, None on a CPU) and extras (F1, accuracy_plus...). `means` are such rows over tasks.

    Raises:
        GripError: something named here is unknown or doesn't fit; raised before anything is written.
        ResumeError: `out` belongs to another configuration.
        Interrupted: Ctrl-C; what is finished is kept.
    """
    if batch_size < 1:
        raise GripError(f"batch_size={batch_size}: type 1 or more")
    chosen = get_tasks(tasks)
    arms = make_arms(pruners, keeps, blind)
    drawn = {task.name: task.take(limit, seed) for task in chosen}
    chunks = [
        _Chunk(task, drawn[task.name][start : start + batch_size])
        for task in chosen
        for start in range(0, len(drawn[task.name]), batch_size)
    ]
    name = model_name or getattr(model.config, "_name_or_path", "") or type(model).__name__
    device = hardware(model.device)["device"]
    config = {
        "model": name,
        "weights": fingerprint(model),
        "tasks": [f"{task.name} ({len(drawn[task.name])}, {digest(drawn[task.name])})" for task in chosen],
        "arms": [f"{arm.label} {arm.keep_text} {json.dumps(arm.config, sort_keys=True)}" for arm in arms],
        "limit": limit,
        "seed": seed,
        "batch_size": batch_size,
        "positions": positions,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": device,
        "versions": {key: value for key, value in versions().items() if key in ("torch", "transformers", "gripvlm")},
    }
    target = Path(out) if out is not None else None
    if target is not None and target.exists() and not samples_path(target).exists() and not overwrite:
        raise ResumeError(
            f"{target} exists, but its {samples_path(target).name} does not: type --overwrite, or another --out"
        )
    session = {"started": _utc(), "command": command or command_line(), "git": git_state()}
    journal = Journal(samples_path(target) if target else None, config, session, overwrite)
    total, had = len(arms) * sum(map(len, drawn.values())), len(journal.records)
    if progress and had:
        print(_reused(journal, had, total), file=sys.stderr)
    if had == total and target is not None and (old := _finished(target)) is not None:
        result = old | _result(name, config, arms, chosen, drawn, journal, seed) | {"header": old["header"]}
        if json.loads(json.dumps(result)) != old:  # the statistics have changed since
            _write(target, result)
        return result
    runner = _Runner(model, processor, arms, positions)
    runner.rehearse(chunks[0], {chunk.task.name: chunk.task for chunk in chunks}.values())
    began = time.monotonic()
    with journal:
        try:
            runner.run(chunks, journal, progress)
        except KeyboardInterrupt:
            raise Interrupted(_how_to_go_on(journal, total)) from None
        result = _result(name, config, arms, chosen, drawn, journal, seed)
    result["header"] |= {
        "command": session["command"],
        "git": session["git"],
        "versions": versions(),
        "hardware": hardware(model.device),
        "attention": getattr(model.config, "_attn_implementation", None),
        "finished": _utc(),
        "seconds": round(time.monotonic() - began, 3),
        "sessions": journal.sessions,
    }
    if target is not None:
        result["samples"] = samples_path(target).name
        _write(target, result)
    return result


class _Runner:
    """The loop over batches and arms."""

    def __init__(self, model: Any, processor: Any, arms: Sequence[Arm], positions: str) -> None:
        self.model, self.processor, self.arms, self.positions = model, processor, arms, positions

    def rehearse(self, chunk: _Chunk, tasks: Any) -> None:
        """Every arm once on one batch, before anything is written: mistakes show now, and caches are warm."""
        if any(arm.label == ORACLE for arm in self.arms):
            for task in tasks:
                if task.evidence_grid is None:
                    raise GripError(f"task {task.name!r} marks no evidence: leave 'oracle' out")
        inputs, question, encoded = self._encoded(chunk)
        for arm in self.arms:
            if arm.label != BLIND:
                pruner = self._pruner(arm, chunk, encoded)
                options: dict[str, Any] = {"positions": self.positions, "question": question, "encoded": encoded}
                with pruned_run(self.model, inputs, pruner, arm.keep, **options) as (arguments, record):
                    if any(s.layers for mine in record.selections for s in mine):  # chosen while it runs
                        self.model.generate(**arguments, max_new_tokens=1, do_sample=False)
        answer(self.model, self.processor, inputs, "keep_all", max_new_tokens=2, encoded=encoded)

    def run(self, chunks: Sequence[_Chunk], journal: Journal, progress: bool) -> None:
        """All that the journal has not yet."""
        total = len(self.arms) * sum(len(chunk.samples) for chunk in chunks)
        bar = _bar(progress)
        with bar:
            shown = bar.add_task("", total=total)
            for chunk in chunks:
                bar.update(shown, description=chunk.task.name)
                todo = [a for a in self.arms if not journal.has(chunk.task.name, a.label, a.keep_text, chunk.ids)]
                bar.advance(shown, (len(self.arms) - len(todo)) * len(chunk.samples))
                for records in self._chunk(chunk, todo):
                    journal.add(records)
                    bar.advance(shown, len(chunk.samples))

    def _chunk(self, chunk: _Chunk, arms: Sequence[Arm]) -> Iterator[list[dict[str, Any]]]:
        """The records of one batch, arm by arm; the image goes through the vision encoder once."""
        if not arms:
            return
        inputs, question, encoded = self._encoded(chunk)
        texts = [chunk.task.prompt(sample) for sample in chunk.samples]
        for arm in arms:
            if arm.label == BLIND:
                bare = make_inputs(self.model, self.processor, texts, None)
                outcome = answer(self.model, self.processor, bare, None, max_new_tokens=chunk.task.max_new_tokens)
            else:
                outcome = answer(
                    self.model,
                    self.processor,
                    inputs,
                    self._pruner(arm, chunk, encoded),
                    arm.keep,
                    max_new_tokens=chunk.task.max_new_tokens,
                    positions=self.positions,
                    question=question,
                    encoded=encoded,
                )
            yield _records(chunk, arm, outcome)

    @torch.no_grad()
    def _encoded(self, chunk: _Chunk) -> tuple[dict[str, Any], list[list[int]], Encoded]:
        texts = [chunk.task.prompt(sample) for sample in chunk.samples]
        inputs = make_inputs(self.model, self.processor, texts, [sample.image for sample in chunk.samples])
        question = question_ids(self.processor, [sample.question for sample in chunk.samples])
        return inputs, question, encode(self.model, inputs, [arm.pruner for arm in self.arms if arm.pruner is not None])

    def _pruner(self, arm: Arm, chunk: _Chunk, encoded: Encoded) -> Pruner:
        if arm.pruner is not None:
            return arm.pruner
        return oracle(chunk.samples, encoded, chunk.task.evidence_grid)


def _whole(number: float) -> int | float:
    """An int where it is one, so that counts look like counts."""
    return int(number) if number == int(number) else round(number, 4)


def _records(chunk: _Chunk, arm: Arm, outcome: Outcome) -> list[dict[str, Any]]:
    """One record a sample; the batch's seconds are shared out evenly."""
    share = {name: seconds / len(chunk.samples) for name, seconds in outcome.seconds.items()}
    return [
        {
            "task": chunk.task.name,
            "pruner": arm.label,
            "keep": arm.keep_text,
            "id": sample.id,
            "image_id": sample.image_id,
            "answer": sample.answer,
            "prediction": prediction,
            "score": chunk.task.score(prediction, sample),
            "k": _whole(sum(selection.paid for selection in selections)),
            "n": sum(selection.n for selection in selections),
            "seconds": share,
            "peak_memory": outcome.peak_memory,
            **({"layers": [s.counts for s in selections]} if any(s.layers for s in selections) else {}),
        }
        for sample, prediction, selections in zip(chunk.samples, outcome.predictions, outcome.selections, strict=True)
    ]


def _result(
    name: str,
    config: Mapping[str, Any],
    arms: Sequence[Arm],
    tasks: Sequence[Task],
    drawn: Mapping[str, list[Sample]],
    journal: Journal,
    seed: int,
) -> dict[str, Any]:
    """Header, rows and means from a complete journal."""
    rows: list[dict[str, Any]] = []
    scored: dict[tuple[str, str, str], Scored] = {}
    for task in tasks:
        mine = drawn[task.name]
        common, common_score = majority(task, mine)

        def of(arm: Arm, task: Task = task, mine: list[Sample] = mine) -> list[dict[str, Any]]:
            return [journal.records[task.name, arm.label, arm.keep_text, sample.id] for sample in mine]

        blind = next((sum(r["score"] for r in of(arm)) / len(mine) for arm in arms if arm.label == BLIND), None)
        for arm in arms:
            if arm.label == BLIND:
                continue
            records = of(arm)
            head = {
                "model": name,
                "task": task.name,
                "pruner": arm.label,
                "pruner_config": arm.config,
                "keep": arm.keep,
            }
            extras = {"majority_answer": common, **task.summary(records)}
            rows.append(row(head, records, blind, common_score, seed) | {"extras": extras})
            scored[task.name, arm.label, arm.keep_text] = (
                [record["score"] for record in records],
                [record["image_id"] for record in records],
            )
    return {"schema": SCHEMA, "header": dict(config), "rows": rows, "means": mean_rows(rows, scored, seed)}


def _finished(target: Path) -> dict[str, Any] | None:
    """The result that a finished run wrote, with its header; None where there is none."""
    try:
        old = json.loads(target.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    whole = isinstance(old, dict) and old.get("schema") == SCHEMA and isinstance(old.get("header"), dict)
    return old if whole else None


def _write(target: Path, result: Mapping[str, Any]) -> None:
    write_atomically(target, json.dumps(result, indent=1, ensure_ascii=False) + "\n")


def _reused(journal: Journal, had: int, total: int) -> str:
    if had < total:
        return f"{had} of {total} answers are in {journal.path} already; going on from there."
    return (
        f"All {total} answers are in {journal.path} already: nothing is measured again, times are those of that run. "
        "To measure anew, type --overwrite or another --out."
    )


def _how_to_go_on(journal: Journal, total: int) -> str:
    if journal.path is None:
        return "Stopped; nothing is kept, because no --out was given."
    kept = f"{len(journal.records)} of {total} answers are in {journal.path}"
    return f"Stopped. {kept}; the same command goes on from there."


def _bar(show: bool) -> Progress:
    return Progress(
        TextColumn("{task.description:<16}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("answers, time left"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not show,
    )


def _utc() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
