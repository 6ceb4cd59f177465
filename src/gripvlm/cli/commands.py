"""`gripvlm quickstart | eval | env`, and what commands share. Nothing heavy is imported before options are checked."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape

from gripvlm.budget import Budget
from gripvlm.errors import GripError

__all__ = ["BUDGETS", "console", "env_command", "evaluate_command", "filled", "quickstart_command", "split_pruners"]

BUDGETS = "64, 10%, or at most so many: ≤64 or '<=64'"

Model = Annotated[str, typer.Option("--model", "-m", help="lab, a local folder, or a Hugging Face hub id.")]
Device = Annotated[str | None, typer.Option(help="Such as cpu or cuda:1; by default an accelerator if there is one.")]
Positions = Annotated[Literal["original", "renumbered"], typer.Option(help="Position ids of the tokens that are kept.")]


def console() -> Console:
    """For results on standard output; as wide as a page where it is no terminal."""
    return Console(width=None if sys.stdout.isatty() else 80, highlight=False)


def filled(text: str, width: int = 80, indent: str = "") -> str:
    """A paragraph. Filled here, as rich would break long words, such as file names."""
    text = " ".join(text.split())
    return textwrap.fill(text, width, initial_indent=indent, subsequent_indent=indent, **_WHOLE_WORDS)


_WHOLE_WORDS: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}


def quickstart_command(
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


def evaluate_command(
    tasks: Annotated[
        str, typer.Option("--tasks", "-t", help="From `gripvlm list`, hf:REPO or jsonl:PATH, separated by commas.")
    ] = "lab",
    pruners: Annotated[
        str, typer.Option("--pruners", "-p", help="Names from `gripvlm list`, oracle, separated by commas; or all.")
    ] = "random,grid,norm,pool,divprune",
    keep: Annotated[str, typer.Option("--keep", "-k", help=f"Budgets, separated by commas: {BUDGETS}.")] = "10%",
    model: Model = "lab",
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many questions a task.")] = None,
    seed: Annotated[int, typer.Option(help="Of the questions drawn and of the intervals.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Questions at a time.")] = 8,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", dir_okay=False, writable=True, help="Results (.json); missing folders are made."),
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

    # Cheap checks first: the imports below take seconds, the model perhaps minutes.
    budgets, numbers = [Budget(text) for text in _split(keep)], _seeds(seeds)
    if out is not None:
        checked_json(out)
    names = split_pruners(pruners)

    from gripvlm.pruners import get_pruner
    from gripvlm.tasks import get_tasks

    # For its errors only: evaluate makes the pruners itself, with the model.
    for name in names:
        if name not in ("all", "oracle", "blind"):
            get_pruner(name)
    chosen = get_tasks(_split(tasks))
    for task in chosen:
        task.take(limit, seed)  # reads the files of a task, which may be missing or damaged

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
    if out is not None:
        known = None if "all" in names else variants
        check_resume(out, Plan(chosen, known, limit, seed, batch, positions, part), model, overwrite)

    quiet()
    vlm, processor = load_model(model, device)
    # Which pruners a model can serve is known only when it is there.
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


def env_command() -> None:
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


def split_pruners(text: str) -> list[str]:
    """Names and specs at commas; none at all is an error (see `split_specs`)."""
    from gripvlm.utils.spec import split_specs

    return split_specs(text) or _split(text)


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
