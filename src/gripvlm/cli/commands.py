"""The commands' options and output. Nothing heavy is imported before options are known to be right."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

import gripvlm
from gripvlm.budget import Budget
from gripvlm.errors import GripError

__all__ = ["BUDGETS", "app", "console"]

BUDGETS = "64, 10%, or at most so many: ≤64 or '<=64'"

app = typer.Typer(
    name="gripvlm",
    epilog="--debug after any command shows the traceback of an error.",
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[str, typer.Option("--model", "-m", help="lab, a local folder, or a Hugging Face hub id.")]
Device = Annotated[str | None, typer.Option(help="Such as cpu or cuda:1; by default an accelerator if there is one.")]
Positions = Annotated[str, typer.Option(help="original or renumbered.")]


def console() -> Console:
    """For results on standard output; as wide as a page where it is no terminal."""
    return Console(width=None if sys.stdout.isatty() else 80, highlight=False)


def _version(asked: bool) -> None:
    if asked:
        print(f"gripvlm {gripvlm.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    """Prune the visual tokens of vision-language models: try it, ask, evaluate."""


@app.command()
def quickstart(
    limit: Annotated[int, typer.Option(min=1, help="Questions a family.")] = 24,
    out: Annotated[Path, typer.Option(help="Folder for the pictures and the JSON.")] = Path("gripvlm-out"),
) -> None:
    """See a trained model answer with all its visual tokens and with a tenth of them."""
    from gripvlm.cli.outputs import checked_folder

    checked_folder(out, "--out")

    from gripvlm.cli.quickstart import run
    from gripvlm.models.loading import quiet

    quiet()
    run(console(), limit, out)


@app.command()
def ask(
    image: Annotated[Path, typer.Option("--image", "-i", help="A picture.")],
    question: Annotated[str, typer.Option("--question", "-q", help="What to ask about it.")],
    model: Model = "lab",
    pruner: Annotated[str, typer.Option("--pruner", "-p", help="A name from `gripvlm list`.")] = "divprune",
    keep: Annotated[
        str | None,
        typer.Option("--keep", "-k", help=f"{BUDGETS}; by default 10%, with full all."),
    ] = None,
    overlay: Annotated[
        Path | None, typer.Option(help="Write a picture of what was kept here (.png), in a folder that exists.")
    ] = None,
    positions: Positions = "original",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer.")] = 64,
    device: Device = None,
) -> None:
    """Ask one question about one picture with fewer visual tokens."""
    from gripvlm.cli.outputs import checked_picture

    # What is quickly known first: the imports below take seconds, the model perhaps minutes.
    if not question.strip():
        raise GripError("the question is empty: type --question 'what is in the picture?'")
    if image.parts[:1] in (("http:",), ("https:",)):
        raise GripError("--image takes a file: download the picture first, then type its path")
    asked = None if keep is None else Budget.parse(keep)

    from gripvlm.pruners import get_pruner
    from gripvlm.pruners.baselines.keep_all import KeepAll
    from gripvlm.tasks import open_image

    picture = open_image(image)
    chooser = get_pruner(_one_pruner(pruner))
    whole = isinstance(chooser, KeepAll)
    budget = asked or Budget(1.0 if whole else 0.1)
    if isinstance(chooser, KeepAll) and budget.is_fraction and budget.value < 1:
        raise chooser.refused(f"--keep {keep}")
    if overlay is not None:
        checked_picture(overlay, image)
    _checked_positions(positions)

    from gripvlm.api import encode
    from gripvlm.eval import answer, make_inputs, question_ids
    from gripvlm.models.loading import load_model, quiet
    from gripvlm.report import layout
    from gripvlm.report import overlay as draw

    quiet()
    vlm, processor = load_model(model, device)
    inputs = make_inputs(vlm, processor, [question], [picture])
    encoded = encode(vlm, inputs, [chooser])
    parts = layout(processor, picture.size, [item.grid for item in encoded.samples[0]]) if overlay is not None else []
    outcome = answer(
        vlm,
        processor,
        inputs,
        chooser,
        budget,
        max_new_tokens=max_new_tokens,
        positions=positions,
        question=question_ids(processor, [question]),
        encoded=encoded,
    )
    selections = outcome.selections[0]
    kept, total = round(sum(s.paid for s in selections), 1), sum(s.n for s in selections)
    kept = int(kept) if kept == int(kept) else kept
    screen = console()
    screen.print(escape(outcome.predictions[0] or "(an empty answer)"), style="bold")
    screen.print(f"{kept} of {total} visual tokens kept ({100 * kept / total:.1f} %) by {escape(chooser.name)}")
    if any(s.layers for s in selections):
        left = [sum(counts) for counts in zip(*(s.counts for s in selections), strict=True)]
        screen.print(f"that is the average over {len(left)} layers, which see {', '.join(map(str, left))}")
    times = ", ".join(f"{name} {1000 * seconds:.1f}" for name, seconds in outcome.seconds.items())
    screen.print(f"milliseconds: {times}", style="dim")
    for part in parts:
        assert overlay is not None
        path = overlay.with_stem(f"{overlay.stem}-{part.name}") if part.name else overlay
        line = f"{outcome.predictions[0]}  |  {kept} of {total} tokens, {chooser.name}"
        draw(picture, part.of(selections), part.geometry, path, f"{question}\n{line}")
        screen.print(f"picture of what was kept: {escape(str(path))}", soft_wrap=True)


@app.command(name="eval")
def evaluate_command(
    tasks: Annotated[
        str,
        typer.Option("--tasks", "-t", help="From `gripvlm list`, hf:REPO or jsonl:PATH, separated by commas."),
    ] = "lab",
    pruners: Annotated[
        str, typer.Option("--pruners", "-p", help="Names from `gripvlm list`, oracle, separated by commas; or all.")
    ] = "random,grid,norm,pool,divprune",
    keep: Annotated[
        str,
        typer.Option("--keep", "-k", help=f"Budgets, separated by commas: {BUDGETS}."),
    ] = "10%",
    model: Model = "lab",
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many questions a task.")] = None,
    seed: Annotated[int, typer.Option(help="Of the questions drawn and of the intervals.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Questions at a time.")] = 8,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="JSON file for the results; missing folders are made.")
    ] = None,
    positions: Positions = "original",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start anew where results exist.")] = False,
    seeds: Annotated[
        str | None, typer.Option(help="Such as 0,1,2: each pruner that has a seed, and none typed, with each of them.")
    ] = None,
    shard: Annotated[
        str | None,
        typer.Option(help="Such as 2/3: only the second third. Afterwards run it once without."),
    ] = None,
    device: Device = None,
) -> None:
    """Score pruners at several budgets; Ctrl-C keeps what is done and the same command resumes."""
    from gripvlm.cli.outputs import checked_json

    # What is quickly known first: the imports below take seconds, the model perhaps minutes.
    budgets, numbers = [Budget.parse(text) for text in _split(keep)], _seeds(seeds)
    if out is not None:
        checked_json(out)
    names = split_pruners(pruners)
    _known_pruners(names)

    from gripvlm.tasks import get_tasks

    chosen = get_tasks(_split(tasks))
    for task in chosen:
        task.take(limit, seed)

    from gripvlm.errors import Interrupted
    from gripvlm.eval import evaluate
    from gripvlm.eval.plan import Plan, parse_shard
    from gripvlm.eval.runner import check_resume
    from gripvlm.eval.variants import make_variants
    from gripvlm.models.loading import load_model, quiet

    variants = make_variants([name for name in names if name != "all"], budgets, seeds=numbers)
    part = None if shard is None else parse_shard(shard)
    if part is not None and out is None:
        raise GripError(f"--shard {shard} without --out keeps no answers: type --out results/all.json, in every shard")
    _checked_positions(positions)
    if out is not None:
        known = None if "all" in names else variants
        check_resume(out, Plan(chosen, known, limit, seed, batch, positions, part), model, overwrite)

    quiet()
    vlm, processor = load_model(model, device)
    if "all" in names:
        from gripvlm.eval.variants import supported_pruners

        every, left = supported_pruners(vlm, budgets)
        names = list(dict.fromkeys([*(name for name in names if name != "all"), *every]))
        print(*(f"not in all: {name}: {why}" for name, why in left.items()), sep="\n", file=sys.stderr)
    try:
        result = evaluate(
            vlm,
            processor,
            chosen,
            names,
            budgets,
            limit=limit,
            seed=seed,
            batch_size=batch,
            out=out,
            positions=positions,
            overwrite=overwrite,
            model_name=model,
            progress=True,
            seeds=numbers,
            shard=shard,
        )
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        raise typer.Exit(130) from None
    screen = console()
    show_scores(screen, result)
    if part is not None and out is not None:
        screen.print(
            f"answers: {escape(str(out.with_name(result['samples'])))}; with all shards' files in one folder the same "
            "command without --shard writes the results",
            soft_wrap=True,
        )
    elif out is not None:
        screen.print(
            f"results: {escape(str(out))}, every answer: {escape(result['samples'])} beside it", soft_wrap=True
        )


def show_scores(screen: Console, result: Mapping[str, Any]) -> None:
    """The tables of an evaluation, and below them what is not in them."""
    from gripvlm.report import table
    from gripvlm.report.tables import unreached

    screen.print(table([*result["rows"], *result["means"]]))
    for line in unreached(result):
        screen.print(f"not measured: {line}", markup=False)


@app.command()
def env() -> None:
    """Versions and hardware, for a bug report."""
    from gripvlm.eval import environment
    from gripvlm.models.compat import NEWEST_TESTED, OLDEST, newer_than_tested

    screen, found = console(), environment()
    found["versions"]["transformers"] += f" (tested: {OLDEST} to {NEWEST_TESTED})"
    for part, values in found.items():
        screen.print(part, style="bold")
        for name, value in (values or {"": "installed, no checkout"}).items():
            screen.print(f"  {name:<16} {escape(str(value))}")
    if (line := newer_than_tested()) is not None:
        screen.print(escape(line))


def _one_pruner(text: str) -> str:
    """The name or spec that `ask` was given, or what `eval` has and `ask` has not."""
    names = split_pruners(text) if text.strip(", ") else [text]
    if len(names) > 1:
        raise GripError(f"--pruner {text}: type one name; `gripvlm eval --pruners {text}` compares several")
    if names[0] == "oracle":
        raise GripError(
            "the oracle keeps the evidence that a task marks for each question, and a picture of your own has none "
            "marked: type `gripvlm eval --pruners oracle` to see it on the lab's tasks, or here a name from "
            "`gripvlm list`"
        )
    if names[0] == "blind":
        raise GripError(
            "'blind', the model without the picture, is no pruner: `gripvlm eval` measures it by itself; type here a "
            "name from `gripvlm list`"
        )
    return names[0]


def split_pruners(text: str) -> list[str]:
    """Names and specs at commas; none at all is an error (see `split_specs`)."""
    from gripvlm.utils.spec import split_specs

    return split_specs(text) or _split(text)


def _known_pruners(names: list[str]) -> None:
    """Raises for a name or an option that does not exist; `make_variants` knows `eval`'s own names."""
    from gripvlm.pruners import get_pruner

    for name in names:
        if name not in ("all", "oracle", "blind"):
            get_pruner(name)


def _split(text: str) -> list[str]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise GripError(f"{text!r} names nothing: type one or more names, separated by commas")
    return parts


def _seeds(text: str | None) -> list[int]:
    """`0,1,2`; None for none."""
    if text is None:
        return []
    parts = _split(text)
    if not all(part.removeprefix("-").isdecimal() for part in parts):
        raise GripError(f"--seeds {text}: type whole numbers separated by commas, such as 0,1,2")
    return list(dict.fromkeys(map(int, parts)))


def _checked_positions(positions: str) -> None:
    from gripvlm.engine.request import checked_positions

    checked_positions(positions)
