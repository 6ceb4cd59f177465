"""`gripvlm quickstart`: the lab model with all of its visual tokens and with a tenth, in less than a minute."""

from __future__ import annotations

import json
import textwrap
import time
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

import gripvlm
from gripvlm.eval import Outcome, answer, evaluate, make_inputs, question_ids
from gripvlm.eval.results import Results, read_results
from gripvlm.eval.variants import FULL
from gripvlm.models.loading import load_model
from gripvlm.pruners import get_pruner
from gripvlm.report import geometry, overlay, table
from gripvlm.tasks import Sample, Task, get_tasks

__all__ = ["run"]

KEEP = 0.1
COMPARED = ("oracle", "grip", "random", "grid", "norm", "divprune")
SHOWN = ("grip", "divprune")


class Example(NamedTuple):
    """A question, and why it is shown."""

    why: str
    task: Task
    sample: Sample


def run(screen: Console, limit: int, out: Path) -> None:
    """Examples, the table, what it costs, pictures; everything written goes to `out`."""
    began = time.monotonic()
    tasks = get_tasks("lab")
    model, processor = load_model("lab")
    size = sum(weight.numel() for weight in model.parameters())
    screen.print(
        f"[bold]gripvlm {gripvlm.__version__}[/] with its own lab model ({size / 1e6:.1f} M parameters, "
        f"{model.device}): {limit} questions\nof each of six families, with all visual tokens and with a tenth."
    )
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
    drawn = [(task, sample) for task in tasks for sample in task.take(limit, 0)]
    chosen = examples(drawn, read_results(out / "quickstart.json"))
    outcomes = _answers(model, processor, tasks, chosen)
    _print_examples(screen, chosen, outcomes)
    screen.print()
    screen.print(table([*result["rows"], *result["means"]]))
    screen.print(_filled(what_it_costs(model)), markup=False, soft_wrap=True)
    screen.print("\nWhat was kept, picture by picture:")
    for path in [*_overlays(processor, chosen, outcomes, out), out / "quickstart.json"]:
        screen.print(f"  {path}", markup=False, soft_wrap=True)
    screen.print(f"\n{time.monotonic() - began:.0f} seconds in all. Next, with a model of your own:", style="bold")
    screen.print("  with gripvlm.prune(model, 'divprune', keep=64):\n      model.generate(**inputs)", markup=False)
    screen.print("and `gripvlm list`, which says which pruner to take at which budget.", markup=False)


def examples(drawn: Sequence[tuple[Task, Sample]], measured: Results) -> list[Example]:
    """For each of three rules the first question that fits, of a family that is not shown yet if there is one."""
    good, bad = SHOWN

    def right(name: str, keep: float, task: Task, sample: Sample) -> bool:
        return measured.of(task.name, name, str(keep))[sample.id]["score"] >= 1

    rules = (
        ("A tenth of the tokens is enough", (True, True, True)),
        (f"It depends on which tenth: with {bad}'s the answer is wrong", (True, True, False)),
        ("Where pruning fails: a tenth is too few for both", (True, False, False)),
    )
    found: list[Example] = []
    for why, wanted in rules:
        seen = {one.task.name for one in found}
        able = [
            pair
            for pair in drawn
            if tuple(right(*arm, *pair) for arm in ((FULL, 1.0), (good, KEEP), (bad, KEEP))) == wanted
        ]
        if able:
            found.append(Example(why, *min(able, key=lambda pair: pair[0].name in seen)))
    return found or [Example("The first question", *drawn[0])]


def _answers(model: Any, processor: Any, tasks: Sequence[Task], chosen: Sequence[Example]) -> dict[str, Outcome]:
    """Name -> answers to the examples and what was kept, with all tokens and with a tenth of them."""
    texts = [one.task.prompt(one.sample) for one in chosen]
    inputs = make_inputs(model, processor, texts, [one.sample.image for one in chosen])
    return {
        name: answer(
            model,
            processor,
            inputs,
            chooser,
            keep,
            max_new_tokens=max(task.max_new_tokens for task in tasks),
            question=question_ids(processor, [one.sample.question for one in chosen]),
        )
        for name, chooser, keep in [(FULL, "keep_all", 1.0), *((name, name, KEEP) for name in SHOWN)]
    }


def _print_examples(screen: Console, chosen: Sequence[Example], outcomes: dict[str, Outcome]) -> None:
    for number, one in enumerate(chosen):
        screen.print(f"\n{one.why}:", style="bold", markup=False)
        screen.print(f"  {one.sample.question}  (true: {one.sample.answer})", markup=False)
        for name, outcome in outcomes.items():
            said, kept = outcome.predictions[number], outcome.selections[number][0].k
            good = one.task.score(said, one.sample) >= 1
            head = f"    {'all' if name == FULL else name}, {kept} tokens"
            screen.print(f"{head:<26}{'right' if good else 'WRONG'}  {said or '(nothing)'}", markup=False)
    screen.print("\nChosen for what they show; how often each happens is in the table.", style="dim")


def what_it_costs(model: Any) -> str:
    """What Grip costs here and why, and what it costs a model of a real size; measured numbers only."""
    known = json.loads(files("gripvlm.cli").joinpath("measured.json").read_text(encoding="utf-8"))
    toy, small = known["costs"]
    module: Any = get_pruner("grip").module  # type: ignore[attr-defined]
    scorer = sum(weight.numel() for weight in module.parameters())
    reader = sum(weight.numel() for weight in model.get_decoder().parameters())
    return (
        f"Grip's own cost is a toy's here: its scorer has {scorer / 1e6:.1f} M weights, this language model "
        f"{reader / 1e6:.1f} M, so that pruning adds {100 * toy['added']:.0f} % of the unpruned prefill and a "
        f"question takes {toy['whole']:.2f} of its time. With a language model of 0.5 B it adds "
        f"{100 * small['added']:.1f} % and a question takes {small['whole']:.2f}; of a 7 B model's prefill the scorer "
        f"is {100 * known['share_of_7b']:.2g} %, by FLOPs. ({100 * toy['kept'] / toy['tokens']:g} % of the tokens, "
        f"{toy['hardware']}; {toy['file']}, {small['file']} with random weights.)"
    )


def _overlays(processor: Any, chosen: Sequence[Example], outcomes: dict[str, Outcome], out: Path) -> list[Path]:
    """One picture for each example and pruner shown."""
    paths = []
    for number, (_, task, sample) in enumerate(chosen):
        for name in SHOWN:
            selection = outcomes[name].selections[number][0]
            cells = geometry(processor, sample.image.size, task.evidence_grid)
            said = f"{selection.k} of {selection.n} tokens ({name}): {outcomes[name].predictions[number]}"
            whole = f"all {selection.n}: {outcomes[FULL].predictions[number]}"
            path = out / f"kept-{number + 1}-{name}.png"
            told = f"{sample.question}\n{said}\n{whole}   |   true: {sample.answer}"
            overlay(sample.image, selection, cells, path, told)
            paths.append(path)
    return paths


def _filled(text: str) -> str:
    return textwrap.fill(text, 80, break_long_words=False, break_on_hyphens=False)
