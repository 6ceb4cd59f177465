"""`gripvlm quickstart`: the lab model with all of its visual tokens and with a tenth, in less than a minute."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

import gripvlm
from gripvlm.cli.listing import measured
from gripvlm.eval import BatchAnswers, answer, evaluate, make_inputs, question_ids
from gripvlm.eval.results import Results, read_results
from gripvlm.eval.variants import FULL
from gripvlm.models.loading import load_model
from gripvlm.pruners import get_pruner
from gripvlm.report import geometry, overlay, table
from gripvlm.tasks import Sample, Task, get_tasks
from gripvlm.utils.terminal import filled

KEEP = 0.1
PRUNERS = ("oracle", "grip", "random", "grid", "norm", "divprune")
GOOD, BAD = "grip", "divprune"
# What an example shows -> whether full, GOOD and BAD answer it right.
EXAMPLES = {
    "A tenth of the tokens is enough": (True, True, True),
    f"It depends on which tenth: with {BAD}'s the answer is wrong": (True, True, False),
    "Where pruning fails: a tenth is too few for both": (True, False, False),
}


class Example(NamedTuple):
    """A question, and why it is shown."""

    why: str
    task: Task
    sample: Sample


def run(screen: Console, limit: int, out: Path) -> None:
    """Prints examples, the table and the costs, and draws pictures; all files go to `out`."""
    start = time.monotonic()
    tasks = get_tasks("lab")
    model, processor = load_model("lab")
    # 24 questions a family take some twelve seconds on two cores, which is what a first try may cost.
    screen.print(
        f"[bold]gripvlm {gripvlm.__version__}[/] with its own lab model ({_millions(model):.1f} M parameters, "
        f"{model.device}): {limit} questions of each of six families, with all visual tokens and with a tenth."
    )
    file = out / "quickstart.json"
    # Measured again each time: results of an older version must not show here.
    result = evaluate(
        model,
        processor,
        tasks,
        PRUNERS,
        [KEEP],
        limit=limit,
        batch_size=16,
        out=file,
        overwrite=True,
        model_name="lab",
        progress=True,
    )
    questions = [(task, sample) for task in tasks for sample in task.take(limit, 0)]
    shown = examples(questions, read_results(file))
    outcomes = _answers(model, processor, shown)
    _print_examples(screen, shown, outcomes)
    screen.print()
    screen.print(table([*result["rows"], *result["means"]]))
    screen.print(what_it_costs(model), markup=False, soft_wrap=True)
    screen.print("\nPictures of the kept tokens:")
    for path in [*_draw(processor, shown, outcomes, out), file]:
        screen.print(f"  {path}", markup=False, soft_wrap=True)
    screen.print(f"\n{time.monotonic() - start:.0f} seconds in all. Next, with a model of your own:", style="bold")
    screen.print("  with gripvlm.prune(model, 'divprune', keep=64):\n      model.generate(**inputs)", markup=False)
    screen.print("and `gripvlm list`, which recommends a pruner for each budget.", markup=False)


def examples(questions: Sequence[tuple[Task, Sample]], results: Results) -> list[Example]:
    """The first question for each of EXAMPLES, of a family that is not shown yet if there is one."""
    chosen: list[Example] = []
    for why, wanted in EXAMPLES.items():
        families = {example.task.name for example in chosen}
        fitting = [pair for pair in questions if _answered(*pair, results) == wanted]
        if fitting:
            chosen.append(Example(why, *min(fitting, key=lambda pair: pair[0].name in families)))
    return chosen or [Example("The first question", *questions[0])]


def _answered(task: Task, sample: Sample, results: Results) -> tuple[bool, ...]:
    """Whether full, GOOD and BAD answer it right."""
    settings = ((FULL, 1.0), (GOOD, KEEP), (BAD, KEEP))
    return tuple(results.of(task.name, name, str(keep))[sample.id]["score"] >= 1 for name, keep in settings)


def _answers(model: Any, processor: Any, shown: Sequence[Example]) -> dict[str, BatchAnswers]:
    """Name -> answers to the examples, with all tokens and with a tenth of them."""
    texts = [example.task.prompt(example.sample) for example in shown]
    inputs = make_inputs(model, processor, texts, [example.sample.images for example in shown])
    question = question_ids(processor, [example.sample.question for example in shown])
    longest = max(example.task.max_new_tokens for example in shown)
    return {
        name: answer(model, processor, inputs, pruner, keep, max_new_tokens=longest, question=question)
        for name, pruner, keep in ((FULL, "keep_all", 1.0), (GOOD, GOOD, KEEP), (BAD, BAD, KEEP))
    }


def _print_examples(screen: Console, shown: Sequence[Example], outcomes: Mapping[str, BatchAnswers]) -> None:
    for number, (why, task, sample) in enumerate(shown):
        screen.print(f"\n{why}:", style="bold", markup=False)
        screen.print(f"  {sample.question}  (true: {sample.answer})", markup=False)
        for name, outcome in outcomes.items():
            text, count = outcome.predictions[number], outcome.selections[number][0].k
            head = f"    {'all' if name == FULL else name}, {count} tokens"
            verdict = "right" if task.score(text, sample) >= 1 else "WRONG"
            screen.print(f"{head:<26}{verdict}  {text or '(nothing)'}", markup=False)
    screen.print("\nThese examples were chosen; the table shows how often each case occurs.", style="dim")


def _draw(processor: Any, shown: Sequence[Example], outcomes: Mapping[str, BatchAnswers], out: Path) -> list[Path]:
    """A picture of the kept tokens, for each example and pruner."""
    paths = []
    for number, (_, task, sample) in enumerate(shown):
        (image,) = sample.images  # the lab's questions are about one each
        cells = geometry(processor, image.size, task.evidence_grid)
        for name in (GOOD, BAD):
            selection = outcomes[name].selections[number][0]
            pruned = f"{selection.k} of {selection.n} tokens ({name}): {outcomes[name].predictions[number]}"
            full = f"all {selection.n}: {outcomes[FULL].predictions[number]}   |   true: {sample.answer}"
            paths.append(out / f"kept-{number + 1}-{name}.png")
            overlay(image, selection, cells, paths[-1], f"{sample.question}\n{pruned}\n{full}")
    return paths


def what_it_costs(model: Any) -> str:
    """The cost of Grip on the lab's model, and on models of real size; measured numbers only."""
    known = measured()
    toy, small = known["costs"]
    module: Any = get_pruner("grip").module  # type: ignore[attr-defined]
    return filled(
        f"Grip is expensive for this small model: the scorer has {_millions(module):.1f} M weights, the language model "
        f"{_millions(model.get_decoder()):.1f} M, so that pruning adds {100 * toy['added']:.0f} % of the unpruned "
        f"prefill and a question takes {toy['whole']:.2f} of its time. With a language model of 0.5 B it adds "
        f"{100 * small['added']:.1f} % and a question takes {small['whole']:.2f}; of a 7 B model's prefill the scorer "
        f"is {100 * known['share_of_7b']:.2g} %, by FLOPs. ({100 * toy['kept'] / toy['tokens']:g} % of the tokens, "
        f"{toy['hardware']}; {toy['file']}, {small['file']} with random weights.)"
    )


def _millions(module: Any) -> float:
    return sum(weight.numel() for weight in module.parameters()) / 1e6
