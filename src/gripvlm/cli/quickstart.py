"""`gripvlm quickstart`: the lab model with all of its visual tokens and with a tenth, in a minute or two."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import gripvlm
from gripvlm.evaluate import Outcome, answer, evaluate, make_inputs, oracle, question_ids
from gripvlm.loading import load_model
from gripvlm.models.encoded import Encoded
from gripvlm.prune import encode
from gripvlm.report import geometry, overlay, table
from gripvlm.tasks import Sample, Task, get_tasks

__all__ = ["run"]

KEEP = 0.1
COMPARED = ("oracle", "grip", "random", "grid", "norm", "divprune")
SHOWN = ("grip", "divprune")
PICTURES, EACH = 3, 2


def run(screen: Console, limit: int, out: Path) -> None:
    """Answers, overlays and the table; everything written goes to `out`."""
    began = time.monotonic()
    tasks = get_tasks("lab")
    shown = showcase(tasks)
    model, processor = load_model("lab")
    size = sum(weight.numel() for weight in model.parameters())
    screen.print(
        f"[bold]gripvlm {gripvlm.__version__}[/] with its own lab model: {size / 1e6:.1f} M parameters, {model.device}"
    )
    samples = [sample for _, sample in shown]
    outcomes = _answers(model, processor, tasks, shown)
    _print_answers(screen, samples, outcomes)
    paths = _overlays(processor, samples, outcomes, out)
    screen.print(f"\nNow {limit} questions of each of six families, with all tokens and with a tenth:")
    result = evaluate(
        model,
        processor,
        tasks,
        COMPARED,
        [KEEP],
        limit=limit,
        batch_size=16,
        out=out / "quickstart.json",
        overwrite=True,
        model_name="lab",
        progress=True,
    )
    screen.print(table([*result["rows"], *result["means"]]))
    screen.print("What was kept, picture by picture:")
    for path in [*paths, out / "quickstart.json"]:
        screen.print(f"  {escape(str(path))}")
    screen.print(f"{time.monotonic() - began:.0f} seconds in all. With a model of your own:", style="bold")
    screen.print("  with gripvlm.prune(model, 'divprune', keep=64):\n      model.generate(**inputs)", markup=False)


def showcase(tasks: Sequence[Task]) -> list[tuple[Task, Sample]]:
    """A few questions that have evidence: the first pictures that most families ask about, families in turn."""
    by_image: dict[str, list[tuple[Task, Sample]]] = {}
    for task in tasks:
        for sample in task.samples:
            if sample.evidence and not any(task is other for other, _ in by_image.get(sample.image_id, [])):
                by_image.setdefault(sample.image_id, []).append((task, sample))
    richest = sorted(by_image, key=lambda image: (-len(by_image[image]), image))[:PICTURES]
    chosen: list[tuple[Task, Sample]] = []
    for image in richest:
        uses = [sum(task is other for other, _ in chosen) for task, _ in by_image[image]]
        order = sorted(range(len(uses)), key=lambda i: (uses[i], i))
        chosen += [by_image[image][i] for i in order[:EACH]]
    return chosen


def _answers(
    model: Any, processor: Any, tasks: Sequence[Task], shown: Sequence[tuple[Task, Sample]]
) -> dict[str, Outcome]:
    """Name -> answers, with all tokens and with a tenth of them."""
    samples = [sample for _, sample in shown]
    texts = [task.prompt(sample) for task, sample in shown]
    inputs = make_inputs(model, processor, texts, [sample.image for sample in samples])
    encoded: Encoded = encode(model, inputs)
    choosers: dict[str, Any] = {name: name for name in SHOWN if name != "oracle"}
    if "oracle" in SHOWN:
        choosers["oracle"] = oracle(samples, encoded, tasks[0].evidence_grid)
    budgets = {"all": ("keep_all", 1.0)} | {name: (choosers[name], KEEP) for name in SHOWN}
    return {
        name: answer(
            model,
            processor,
            inputs,
            chooser,
            keep,
            max_new_tokens=max(task.max_new_tokens for task in tasks),
            question=question_ids(processor, texts),
            encoded=encoded,
        )
        for name, (chooser, keep) in budgets.items()
    }


def _print_answers(screen: Console, samples: Sequence[Sample], outcomes: dict[str, Outcome]) -> None:
    rows = Table(box=box.SIMPLE_HEAD)
    for name in ("picture", "question", "true answer"):
        rows.add_column(name)
    for name, outcome in outcomes.items():
        selection = outcome.selections[0][0]
        rows.add_column(f"all {selection.n} tokens" if name == "all" else f"{selection.k} tokens, {name}")
    tasks = {task.family: task for task in get_tasks("lab") if hasattr(task, "family")}
    for i, sample in enumerate(samples):
        cells = []
        for outcome in outcomes.values():
            right = tasks[sample.family].score(outcome.predictions[i], sample)
            cells.append(f"[{'green' if right else 'red'}]{'+' if right else '-'} {escape(outcome.predictions[i])}[/]")
        rows.add_row(escape(sample.image_id), escape(sample.question), escape(sample.answer), *cells)
    screen.print(rows)


def _overlays(processor: Any, samples: Sequence[Sample], outcomes: dict[str, Outcome], out: Path) -> list[Path]:
    """One picture for the first question about each image and each pruner shown."""
    paths, seen = [], set()
    for i, sample in enumerate(samples):
        if sample.image_id in seen:
            continue
        seen.add(sample.image_id)
        picture = sample.image
        for name in SHOWN:
            selection = outcomes[name].selections[i][0]
            grid = get_tasks(f"lab/{sample.family}")[0].evidence_grid
            cells = geometry(processor, picture.size, grid)
            said = f"{selection.k} of {selection.n} tokens ({name}): {outcomes[name].predictions[i]}"
            whole = f"all {selection.n}: {outcomes['all'].predictions[i]}"
            path = out / f"{Path(sample.image_id).stem}-{name}.png"
            overlay(picture, selection, cells, path, f"{sample.question}\n{said}\n{whole}   |   true: {sample.answer}")
            paths.append(path)
    return paths
