"""`evaluate`: tasks x pruners x budgets, each image encoded once, every answer kept as it comes."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from gripvlm.api import encode, pruned_run
from gripvlm.budget import Keep
from gripvlm.errors import BudgetError, GripError
from gripvlm.eval.answering import answer, make_inputs, question_ids
from gripvlm.eval.assemble import assembled, sample_records, utc, write_result
from gripvlm.eval.chunks import Chunk, Shard, asked_by, make_chunks
from gripvlm.eval.environment import command_line, git_state, hardware, versions
from gripvlm.eval.journal import Journal, ResumeError, samples_path
from gripvlm.eval.oracle import oracle
from gripvlm.eval.schema import SCHEMA
from gripvlm.eval.variants import BLIND, FULL, ORACLE, Arm, digest, fingerprint, make_arms
from gripvlm.models.encoded import Encoded
from gripvlm.pruners import Pruner
from gripvlm.tasks import Sample, Task, get_tasks
from gripvlm.utils.disk import one_writer
from gripvlm.utils.progress import Progress
from gripvlm.utils.strict_json import BadJSON, parse, read

__all__ = ["Interrupted", "evaluate"]


class Interrupted(KeyboardInterrupt):
    """Ctrl-C in `evaluate`; its text says what is kept and how to go on."""


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
    seeds: Sequence[int] = (),
    shard: str | Shard | None = None,
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
        progress: show how far it is on standard error: a bar, or without a terminal a line now and then.
        seeds: a pruner that has a `seed`, and is named without one, is measured with each of these.
        shard: `"2/3"` asks only the second third of the batches, for `merge`.

    Returns:
        {"schema", "header", "rows", "means", "samples"}: what is written to `out`, and "unreached": a pruner at a
        budget that it cannot reach has no row, and why is there. A row has model,
        task, pruner, pruner_config, keep (asked), keep_fraction (achieved), tokens, score, ci_low,
        ci_high (95 %, clustered by image), n, blind, majority, seconds_* a sample, peak_memory
        (bytes, None on a CPU) and extras (F1, accuracy_plus...). `means` are such rows over tasks.

    Raises:
        GripError: something named here is unknown or doesn't fit; raised before anything is written.
        ResumeError: `out` belongs to another configuration.
        BusyError: another process is writing to `out`.
        Interrupted: Ctrl-C; what is finished is kept.
    """
    if batch_size < 1:
        raise GripError(f"batch_size={batch_size}: type 1 or more")
    chosen = get_tasks(tasks)
    arms = make_arms(pruners, keeps, blind, seeds)
    drawn = {task.name: task.take(limit, seed) for task in chosen}
    part = None if shard is None else Shard.parse(shard)
    chunks = make_chunks(chosen, drawn, batch_size, part)
    asked = asked_by(chunks)
    name = model_name or getattr(model.config, "_name_or_path", "") or type(model).__name__
    device = hardware(model.device)["device"]
    config = what_is_asked(name, drawn, arms, limit, seed, batch_size, positions, part)
    config |= {
        "weights": fingerprint(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": device,
    }
    target = Path(out) if out is not None else None
    with one_writer(target) if target is not None else nullcontext():
        if target is not None:
            check_resume(target, config, overwrite)
        session = {"started": utc(), "command": command or command_line(), "git": git_state()}
        journal = Journal(samples_path(target) if target else None, config, session, overwrite)
        total, had = len(arms) * sum(map(len, asked.values())), len(journal.records)
        if progress and had:
            print(_reused(journal, had, total), file=sys.stderr)
        if had == total and target is not None and (old := _finished(target)) is not None:
            result = (
                old
                | assembled(name, config, arms, chosen, drawn, asked, journal.records, seed)
                | {"header": old["header"]}
            )
            if json.loads(json.dumps(result)) != old:  # the statistics have changed since
                write_result(target, result)
            return result
        runner = _Runner(model, processor, arms, positions, progress)
        runner.rehearse(chunks[0], {chunk.task.name: chunk.task for chunk in chunks}.values())
        began = time.monotonic()
        with journal:
            try:
                runner.run(chunks, journal)
            except KeyboardInterrupt:
                raise Interrupted(_how_to_go_on(journal, total)) from None
            reached = [arm for arm in arms if arm.key not in runner.unreached]
            result = assembled(name, config, reached, chosen, drawn, asked, journal.records, seed)
        if runner.unreached:
            result["unreached"] = [
                {"pruner": arm.label, "keep": arm.keep, "why": runner.unreached[arm.key]}
                for arm in arms
                if arm.key in runner.unreached
            ]
        result["header"] |= {
            "command": session["command"],
            "task_specs": [task.spec for task in chosen],
            "git": session["git"],
            "versions": versions(),
            "hardware": hardware(model.device),
            "attention": getattr(model.config, "_attn_implementation", None),
            "finished": utc(),
            "seconds": round(time.monotonic() - began, 3),
            "sessions": journal.sessions,
        }
        if target is not None:
            result["samples"] = samples_path(target).name
            write_result(target, result)
        return result


def what_is_asked(
    model: str,
    drawn: Mapping[str, Sequence[Sample]],
    arms: Sequence[Arm] | None,
    limit: int | None,
    seed: int,
    batch_size: int,
    positions: str,
    part: Shard | None,
) -> dict[str, Any]:
    """The part of a run's configuration that is known before the model; `arms` None where they depend on it."""
    config: dict[str, Any] = {
        "model": model,
        "tasks": [f"{name} ({len(samples)}, {digest(samples)})" for name, samples in drawn.items()],
        "limit": limit,
        "seed": seed,
        "batch_size": batch_size,
        "positions": positions,
        "versions": {key: value for key, value in versions().items() if key in ("torch", "transformers", "gripvlm")},
    }
    if arms is not None:
        config["arms"] = [f"{arm.label} {arm.keep_text} {json.dumps(arm.config, sort_keys=True)}" for arm in arms]
    return config | ({"shard": str(part)} if part is not None else {})


def check_resume(target: Path, config: Mapping[str, Any], overwrite: bool) -> None:
    """Raises ResumeError where what is there belongs to another run, as far as `config` tells; reads, never writes."""
    answers = samples_path(target)
    if overwrite or not (target.exists() or answers.exists()):
        return
    if not answers.exists():
        raise ResumeError(f"{target} exists, but its {answers.name} does not: type --overwrite, or another --out")
    with answers.open("rb") as file:
        first = file.readline()
    try:
        theirs = parse(first)["config"]
    except (BadJSON, KeyError, TypeError):
        theirs = {}
    if isinstance(theirs, dict):
        rest = {name: value for name, value in theirs.items() if name != "shard"}
        Journal(answers, {**rest, **config}, {}, overwrite)


class _Runner:
    """The loop over batches and arms.

    An arm whose budget cannot be reached (by its method in this model, or with an image this small) is not measured:
    why is in `unreached`, and the rest goes on.
    """

    def __init__(self, model: Any, processor: Any, arms: Sequence[Arm], positions: str, progress: bool = False) -> None:
        self.model, self.processor, self.arms, self.positions = model, processor, arms, positions
        self.progress = progress
        self.unreached: dict[tuple[str, str], str] = {}

    def leave_out(self, arm: Arm, why: BudgetError) -> None:
        self.unreached[arm.key] = str(why)
        if self.progress:
            print(f"not measured: {arm.named}: {why}", file=sys.stderr)

    def rehearse(self, chunk: Chunk, tasks: Any) -> None:
        """Every arm once on one batch, before anything is written: mistakes show now, and caches are warm.

        Raises:
            BudgetError: no pruner reaches any of the budgets.
        """
        if any(arm.label == ORACLE for arm in self.arms):
            for task in tasks:
                if task.evidence_grid is None:
                    raise GripError(f"task {task.name!r} marks no evidence: leave 'oracle' out")
        inputs, question, encoded = self._encoded(chunk)
        for arm in self.arms:
            if arm.label != BLIND:
                pruner = self._pruner(arm, chunk, encoded)
                options: dict[str, Any] = {"positions": self.positions, "question": question, "encoded": encoded}
                try:
                    with pruned_run(self.model, inputs, pruner, arm.keep, **options) as (arguments, record):
                        if any(s.layers for mine in record.selections for s in mine):  # chosen while it runs
                            self.model.generate(**arguments, max_new_tokens=1, do_sample=False)
                except BudgetError as why:
                    self.leave_out(arm, why)
        wanted = [arm for arm in self.arms if arm.label not in (FULL, BLIND)]
        if wanted and all(arm.key in self.unreached for arm in wanted):
            raise BudgetError("; ".join(f"{arm.named}: {self.unreached[arm.key]}" for arm in wanted))
        answer(self.model, self.processor, inputs, "keep_all", max_new_tokens=2, encoded=encoded)

    def run(self, chunks: Sequence[Chunk], journal: Journal) -> None:
        """All that the journal has not yet."""
        total = len(self.arms) * sum(len(chunk.samples) for chunk in chunks)
        with Progress("answers", total, show=self.progress) as bar:
            for chunk in chunks:
                bar.about(chunk.task.name)
                todo = [a for a in self.arms if not journal.has(chunk.task.name, a.label, a.keep_text, chunk.ids)]
                bar.advance((len(self.arms) - len(todo)) * len(chunk.samples), reused=True)
                for records in self._chunk(chunk, todo):
                    journal.add(records)
                    bar.advance(len(chunk.samples))

    def _chunk(self, chunk: Chunk, arms: Sequence[Arm]) -> Iterator[list[dict[str, Any]]]:
        """The records of one batch, arm by arm; the image goes through the vision encoder once."""
        if not arms:
            return
        inputs, question, encoded = self._encoded(chunk)
        texts = [chunk.task.prompt(sample) for sample in chunk.samples]
        for arm in arms:
            if arm.key in self.unreached:
                continue
            if arm.label == BLIND:
                bare = make_inputs(self.model, self.processor, texts, None)
                outcome = answer(self.model, self.processor, bare, None, max_new_tokens=chunk.task.max_new_tokens)
            else:
                try:
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
                except BudgetError as why:
                    self.leave_out(arm, why)
                    continue
            yield sample_records(chunk, arm, outcome, encoded)

    @torch.no_grad()
    def _encoded(self, chunk: Chunk) -> tuple[dict[str, Any], list[list[int]], Encoded]:
        texts = [chunk.task.prompt(sample) for sample in chunk.samples]
        inputs = make_inputs(self.model, self.processor, texts, [sample.image for sample in chunk.samples])
        question = question_ids(self.processor, [sample.question for sample in chunk.samples])
        return inputs, question, encode(self.model, inputs, [arm.pruner for arm in self.arms if arm.pruner is not None])

    def _pruner(self, arm: Arm, chunk: Chunk, encoded: Encoded) -> Pruner:
        if arm.pruner is not None:
            return arm.pruner
        return oracle(chunk.samples, encoded, chunk.task.evidence_grid)


def _finished(target: Path) -> dict[str, Any] | None:
    """The result that a finished run wrote, with its header; None where there is none."""
    try:
        old = read(target)
    except (OSError, ValueError):
        return None
    whole = isinstance(old, dict) and old.get("schema") == SCHEMA and isinstance(old.get("header"), dict)
    return old if whole else None


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
