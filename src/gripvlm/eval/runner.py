"""`evaluate`: tasks x pruners x budgets, each image encoded once, every answer kept as it comes."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from gripvlm.api import encode, pruned_run
from gripvlm.budget import Budget, Keep
from gripvlm.errors import BudgetError, GripError, Interrupted
from gripvlm.eval.answering import answer, make_inputs, question_ids
from gripvlm.eval.downsample import downsampled
from gripvlm.eval.environment import command_line, git_state, hardware, utc, versions
from gripvlm.eval.journal import Journal, ResumeError, samples_path
from gripvlm.eval.oracle import oracle
from gripvlm.eval.plan import Batch, Plan, parse_shard
from gripvlm.eval.records import make_records
from gripvlm.eval.results import (
    SCHEMA,
    ResultsError,
    majority,
    make_row,
    mean_rows,
    read_results,
    write_result,
)
from gripvlm.eval.stats import ScoresByImage
from gripvlm.eval.variants import BLIND, DOWNSAMPLE, FULL, ORACLE, Variant, fingerprint, make_variants
from gripvlm.models.encoded import Encoded
from gripvlm.pruners import Pruner
from gripvlm.tasks import Task, get_tasks
from gripvlm.utils.disk import one_writer
from gripvlm.utils.progress import Progress
from gripvlm.utils.strict_json import BadJSON, parse
from gripvlm.utils.terminal import filled

__all__ = ["check_resume", "evaluate"]


def check_resume(out: Path, plan: Plan, model_name: str, overwrite: bool) -> None:
    """Refuses files of another run at `out`, as far as is known before the model; reads, never writes.

    Raises:
        ResumeError: with what differs.
    """
    answers = samples_path(out, plan.shard)
    if overwrite or not (out.exists() or answers.exists()):
        return
    if not answers.exists():
        if plan.shard is None:
            raise ResumeError(
                f"{out} exists, but its {answers.name} does not: pass overwrite=True (--overwrite), or another out"
            )
        return
    with answers.open("rb") as file:
        first = file.readline()
    try:
        config = parse(first)["config"]
    except (BadJSON, KeyError, TypeError):
        config = None
    # What depends on the model is taken from the file: the run itself compares it once the model is loaded.
    if isinstance(config, dict):
        Journal(answers, config | plan.config(model_name))


def evaluate(
    model: PreTrainedModel,
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
    shard: str | None = None,
) -> dict[str, Any]:
    """Scores every pruner at every budget on every task.

    Args:
        model, processor: a supported transformers model and its processor.
        tasks: names for `get_tasks`, or `Task` objects.
        pruners: names, specs or objects; `"full"` is always there, `"oracle"` keeps each question's own evidence where
            the task marks it, `"downsample"` encodes a smaller picture.
        keeps: budgets, as for `gripvlm.prune`.
        limit: at most so many questions a task, drawn with `seed`.
        seed: of that draw and of the bootstrap. A pruner's own seed is its option.
        batch_size: questions at a time; times are means over a batch.
        out: where the JSON goes; the answers go beside it, to `<out>.samples.jsonl`, as they are finished, and the same
            call resumes from them. None keeps everything in memory.
        positions: "original" or "renumbered".
        overwrite: start again if `out` or its samples exist; answers of shards are then ignored.
        blind: also ask every question without the image.
        model_name, command: as the results should say; by default the model's own and `sys.argv`.
        progress: show progress on standard error: a bar, or without a terminal a line now and then.
        seeds: a pruner that has a `seed`, and is named without one, is measured with each of these.
        shard: `"2/3"` asks the second third of the batches only and writes `<out>.2of3.samples.jsonl` but no JSON. The
            same call without it takes the answers of all shards beside `out`, and asks what is missing.

    Returns:
        {"schema", "header", "rows", "means", "samples"}: what is written to `out`, and "unreached": a pruner at a
        budget that it cannot reach has no row, and why is there. A row has model, task, pruner, pruner_config, keep (as
        requested), keep_fraction (as achieved), tokens, score, ci_low, ci_high (95 %, clustered by image), n, blind,
        majority, seconds_* a sample, peak_memory (bytes, None on a CPU) and extras (F1, accuracy_plus...). `means` are
        such rows over tasks.

    Raises:
        GripError: something named here is unknown or doesn't fit; raised before anything is written.
        ResumeError: `out` belongs to another configuration.
        BusyError: another process is writing to `out`.
        Interrupted: Ctrl-C; what is finished is kept.
    """
    variants = make_variants(pruners, keeps, blind, seeds)
    part = None if shard is None else parse_shard(shard)
    plan = Plan(get_tasks(tasks), variants, limit, seed, batch_size, positions, part)
    name = model_name or getattr(model.config, "_name_or_path", "") or type(model).__name__
    config = plan.config(name) | {
        "weights": fingerprint(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": hardware(model.device)["device"],
    }
    session = {"started": utc(), "command": command or command_line(), "git": git_state()}
    target = Path(out) if out is not None else None
    answers = samples_path(target, part) if target is not None else None
    # Shards of one run may be at work side by side: each locks its own file.
    locked = target if part is None else answers
    with one_writer(locked) if locked is not None else nullcontext():
        if target is not None:
            check_resume(target, plan, name, overwrite)
        runner = _Runner(model, processor, plan, Journal(answers, config, overwrite), progress)
        # A shard answers only part of what the JSON holds, so it leaves the JSON alone.
        return runner.finish(session, target if part is None else None)


class _Runner:
    """The loop over batches and variants, and the result that it ends in.

    A variant whose budget cannot be reached (by its method in this model, or with an image this small) is not measured:
    `unreached` says why, and the other variants are.
    """

    def __init__(
        self, model: PreTrainedModel, processor: Any, plan: Plan, journal: Journal, show_progress: bool
    ) -> None:
        self.model, self.processor, self.plan, self.journal = model, processor, plan, journal
        self.show_progress = show_progress
        self.variants = plan.variants or ()
        self.total = len(self.variants) * sum(len(batch.samples) for batch in plan.batches)
        self.unreached: dict[tuple[str, str], str] = {}

    def finish(self, session: dict[str, Any], target: Path | None) -> dict[str, Any]:
        """Asks what the journal does not have, puts the result together, and writes it to `target`."""
        started, journal = time.monotonic(), self.journal
        # Only while answers are missing: a finished run does not depend on files of shards.
        if self.plan.shard is None and len(journal.records) < self.total:
            journal.read_shards()
        reused = len(journal.records)
        if self.show_progress and reused:
            print(filled(self._reused(reused)), file=sys.stderr)
        if reused == self.total and target is not None:
            # A finished file is left as it is; one that is damaged or has other scores is written again below.
            with suppress(ResultsError):
                return read_results(target).content
        if reused < self.total:
            self._rehearse()
        journal.session(session)
        try:
            self._answer_all()
        except KeyboardInterrupt:
            raise Interrupted(self._stopped()) from None
        result = self._result([variant for variant in self.variants if variant.key not in self.unreached])
        result["header"] |= {
            "command": session["command"],
            "task_specs": [task.spec for task in self.plan.tasks],
            "git": session["git"],
            "versions": versions(),
            "hardware": hardware(self.model.device),
            "attention": getattr(self.model.config, "_attn_implementation", None),
            "finished": utc(),
            "seconds": round(time.monotonic() - started, 3),
            "sessions": journal.sessions,
        }
        left_out = [variant for variant in self.variants if variant.key in self.unreached]
        if left_out:
            result["unreached"] = [{"pruner": v.label, "keep": v.keep, "why": self.unreached[v.key]} for v in left_out]
        if journal.path is not None:
            result["samples"] = journal.path.name
        if target is not None:
            write_result(target, result)
        return result

    def _answer_all(self) -> None:
        """Every batch with every variant that the journal does not have yet."""
        # Batches outside, variants inside: an image is encoded once for all variants.
        with Progress("answers", self.total, show=self.show_progress) as bar:
            for batch in self.plan.batches:
                task, ids = batch.task.name, batch.ids
                bar.about(task)
                todo = [v for v in self.variants if not self.journal.has(task, v.label, v.keep_text, ids)]
                bar.advance((len(self.variants) - len(todo)) * len(ids), reused=True)
                for records in self._answers(batch, todo):
                    self.journal.add(records)
                    bar.advance(len(ids))

    def _answers(self, batch: Batch, variants: Sequence[Variant]) -> Iterator[list[dict[str, Any]]]:
        """The records of one batch, variant by variant; the image goes through the vision encoder once."""
        if not variants:
            return
        inputs, question, encoded = self._encode(batch)
        ask = partial(answer, self.model, self.processor, max_new_tokens=batch.task.max_new_tokens)
        options: dict[str, Any] = {"positions": self.plan.positions, "question": question}
        for variant in variants:
            if variant.key in self.unreached:
                continue
            try:
                if variant.label == BLIND:
                    answers = ask(self._inputs(batch, with_images=False), None)
                else:
                    *arguments, own = self._arguments(variant, batch, inputs, encoded)
                    answers = ask(*arguments, encoded=own, **options)
            except BudgetError as error:
                self._leave_out(variant, error)
                continue
            yield make_records(batch.task, batch.samples, variant, answers, encoded)

    def _inputs(self, batch: Batch, with_images: bool = True) -> dict[str, Any]:
        texts, images = self._prompts(batch)
        return make_inputs(self.model, self.processor, texts, images if with_images else None)

    def _prompts(self, batch: Batch) -> tuple[list[str], list[Any]]:
        """The texts and the pictures of a batch."""
        return [batch.task.prompt(sample) for sample in batch.samples], [sample.images for sample in batch.samples]

    def _arguments(
        self, variant: Variant, batch: Batch, inputs: dict[str, Any], encoded: Encoded
    ) -> tuple[dict[str, Any], str | Pruner, Any, Encoded]:
        """Inputs, pruner, budget and encoding with which a variant answers."""
        if variant.label == DOWNSAMPLE and variant.keep is not None:
            texts, images = self._prompts(batch)
            small, own = downsampled(self.model, self.processor, texts, images, encoded, Budget.of(variant.keep))
            return small, "keep_all", None, own
        return inputs, _pruner_of(variant, batch, encoded), variant.keep, encoded

    @torch.no_grad()
    def _encode(self, batch: Batch) -> tuple[dict[str, Any], list[list[int]], Encoded]:
        inputs = self._inputs(batch)
        question = question_ids(self.processor, [sample.question for sample in batch.samples])
        # All variants' needs at once (attention of the tower, its states), since encoding is not repeated.
        pruners = [variant.pruner for variant in self.variants if variant.pruner is not None]
        return inputs, question, encode(self.model, inputs, pruners)

    def _rehearse(self) -> None:
        """Every variant once on the first batch, before anything is written: mistakes show now, and caches are warm.

        Raises:
            BudgetError: no pruner reaches any of the budgets.
        """
        if any(variant.label == ORACLE for variant in self.variants):
            for batch in self.plan.batches:
                # Before the first batch, not when the run reaches this task.
                if batch.task.evidence_grid is None:
                    raise GripError(f"task {batch.task.name!r} marks no evidence: leave 'oracle' out")
        batch = self.plan.batches[0]
        inputs, question, encoded = self._encode(batch)
        options: dict[str, Any] = {"positions": self.plan.positions, "question": question}
        for variant in self.variants:
            if variant.label == BLIND:
                continue
            try:
                *asked, own = self._arguments(variant, batch, inputs, encoded)
                with pruned_run(self.model, *asked, encoded=own, **options) as (arguments, record):
                    # Pruners inside the language model choose while it runs, and may fail only then.
                    if any(selection.layers for selections in record.selections for selection in selections):
                        self.model.generate(**arguments, max_new_tokens=1, do_sample=False)
            except BudgetError as error:
                self._leave_out(variant, error)
        pruned = [variant for variant in self.variants if variant.label not in (FULL, BLIND)]
        if pruned and all(variant.key in self.unreached for variant in pruned):
            raise BudgetError("; ".join(f"{variant.title}: {self.unreached[variant.key]}" for variant in pruned))
        # The first generation builds caches and picks kernels; its time must not count for the first variant.
        answer(self.model, self.processor, inputs, "keep_all", max_new_tokens=2, encoded=encoded)

    def _leave_out(self, variant: Variant, error: BudgetError) -> None:
        self.unreached[variant.key] = str(error)
        if self.show_progress:
            print(filled(f"not measured: {variant.title}: {error}"), file=sys.stderr)

    def _result(self, variants: Sequence[Variant]) -> dict[str, Any]:
        """Header, rows and means from complete records."""
        plan, records = self.plan, self.journal.records
        rows: list[dict[str, Any]] = []
        scores: dict[tuple[str, str, str], ScoresByImage] = {}
        for task in plan.tasks:
            ids = [name for batch in plan.batches if batch.task is task for name in batch.ids]
            # A shard may have no batch of a small task.
            if not ids:
                continue
            # The commonest answer is that of the whole task, in a shard too.
            common, majority_score = majority(task, plan.samples[task.name])
            blind = None
            if any(variant.label == BLIND for variant in variants):
                blind = sum(records[task.name, BLIND, "", name]["score"] for name in ids) / len(ids)
            for variant in variants:
                if variant.label == BLIND:
                    continue
                answers = [records[task.name, variant.label, variant.keep_text, name] for name in ids]
                head = {
                    "model": self.journal.config["model"],
                    "task": task.name,
                    "pruner": variant.label,
                    "pruner_config": variant.config,
                    "keep": variant.keep,
                    "trained": variant.trained,
                }
                row = make_row(head, answers, blind, majority_score, plan.seed)
                rows.append(row | {"extras": {"majority_answer": common, **task.summary(answers)}})
                by_image = [record["score"] for record in answers], [record["image_id"] for record in answers]
                scores[task.name, variant.label, variant.keep_text] = by_image
        means = mean_rows(rows, scores, plan.seed)
        return {"schema": SCHEMA, "header": dict(self.journal.config), "rows": rows, "means": means}

    def _reused(self, done: int) -> str:
        path = self.journal.path
        if done < self.total:
            return f"{done} of {self.total} answers are in {path} already; resuming from there."
        return (
            f"All {self.total} answers are in {path} already: nothing is measured again, times are those of that run. "
            "To measure again, pass overwrite=True (--overwrite) or another out."
        )

    def _stopped(self) -> str:
        if self.journal.path is None:
            return "Stopped; nothing is kept, because no --out was given."
        done = f"{len(self.journal.records)} of {self.total} answers are in {self.journal.path}"
        return f"Stopped. {done}; the same command resumes from there."


def _pruner_of(variant: Variant, batch: Batch, encoded: Encoded) -> Pruner:
    if variant.pruner is not None:
        return variant.pruner
    return oracle(batch.samples, encoded, batch.task.evidence_grid)
