"""`gripvlm quickstart | eval | env`, and what commands share. Nothing heavy is imported before options are checked."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape

from gripvlm.budget import Budget
from gripvlm.cli.outputs import checked_folder, checked_json
from gripvlm.errors import GripError, Interrupted
from gripvlm.utils.terminal import columns, filled

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BUDGETS = "64, 10%, or at most so many: ≤64 or '<=64'"
SIMPLE = "downsample,random,grid,norm,pool,divprune"
"""What `eval` measures if nothing is named: baselines, and an untrained method."""

Model = Annotated[str, typer.Option("--model", "-m", help="lab, lab-dense, a local folder, or a Hugging Face hub id.")]
Device = Annotated[str | None, typer.Option(help="Such as cpu or cuda:1; by default an accelerator if there is one.")]
Positions = Annotated[Literal["original", "renumbered"], typer.Option(help="Position ids of the tokens that are kept.")]
Served = Annotated[
    str,
    typer.Option(
        "--pruners", "-p", help="Names from `gripvlm list` that requests may choose from; the first is the default."
    ),
]
KeepOfRequests = Annotated[str, typer.Option("--keep", "-k", help=f"For requests that name none: {BUDGETS}.")]
Budgets = Annotated[str, typer.Option("--keep", "-k", help=f"Budgets, separated by commas: {BUDGETS}.")]
Out = Annotated[
    Path | None,
    typer.Option("--out", "-o", dir_okay=False, writable=True, help="Results (.json); missing folders are made."),
]


def console() -> Console:
    """For results on standard output."""
    # no highlighting: rich would colour numbers and paths in answers
    return Console(width=columns(), highlight=False)


def split_names(text: str) -> list[str]:
    """The parts between commas; at least one is needed."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise GripError(f"{text!r} names nothing: type one or more names, separated by commas")
    return parts


def split_pruners(text: str) -> list[str]:
    """Names and specs, split at commas; an empty list is an error (see `split_specs`)."""
    from gripvlm.utils.spec import split_specs

    return split_specs(text) or split_names(text)


def split_numbers(text: str, option: str, example: str, least: int | None = None) -> list[int]:
    """`1,8` as [1, 8]: whole numbers, each once."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    valid = all(re.fullmatch(r"-?\d+", part) and (least is None or int(part) >= least) for part in parts)
    if not parts or not valid:
        allowed = "whole numbers" if least is None else f"whole numbers of {least} or more"
        raise GripError(f"{option} {text}: type {allowed}, separated by commas, such as {example}")
    return list(dict.fromkeys(map(int, parts)))


def quickstart_command(
    limit: Annotated[int, typer.Option(min=1, help="Questions a family.")] = 24,
    out: Annotated[Path, typer.Option(help="Folder for the pictures and the JSON.")] = Path("gripvlm-out"),
) -> None:
    """See a trained model answer with all its visual tokens and with a tenth of them."""
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
        str,
        typer.Option(
            "--pruners",
            "-p",
            help="Names from `gripvlm list`, oracle, downsample, separated by commas; or all.",
            show_default=SIMPLE.replace(",", ", "),  # breaks between names; as one word it was cut off
        ),
    ] = SIMPLE,
    keep: Budgets = "10%",
    model: Model = "lab",
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many questions a task.")] = None,
    seed: Annotated[int, typer.Option(help="Seed for drawing questions, and for the intervals.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Questions at a time.")] = 8,
    out: Out = None,
    positions: Positions = "original",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start again where results exist.")] = False,
    seeds: Annotated[
        str | None,
        typer.Option(help="Such as 0,1,2: measure pruners that have a seed option with each of these seeds."),
    ] = None,
    shard: Annotated[
        str | None,
        typer.Option(help="Such as 2/3: only the second third. After all shards, run the command without it."),
    ] = None,
    device: Device = None,
) -> None:
    """Score pruners at several budgets. After Ctrl-C the same command resumes."""
    # Cheap checks first: the imports below take seconds, the model perhaps minutes.
    budgets = [Budget(text) for text in split_names(keep)]
    numbers = [] if seeds is None else split_numbers(seeds, "--seeds", "0,1,2")
    if out is not None:
        checked_json(out)
    elif shard is not None:
        raise GripError(f"--shard {shard} without --out keeps no answers: type --out results/all.json, in every shard")
    names = split_pruners(pruners)
    # A line before all that may take minutes: importing PyTorch, downloading a data set, reading weights.
    print(filled(f"loading PyTorch, the questions of {tasks} and the model {model} ..."), file=sys.stderr, flush=True)

    from gripvlm.eval import evaluate
    from gripvlm.eval.plan import Plan, parse_shard
    from gripvlm.eval.runner import check_resume
    from gripvlm.eval.variants import make_variants
    from gripvlm.models.loading import load_model, quiet
    from gripvlm.tasks import get_tasks

    # Only to raise their errors early: evaluate makes the pruners itself, with the model.
    variants = make_variants([name for name in names if name != "all"], budgets, seeds=numbers)
    chosen = get_tasks(split_names(tasks))
    for task in chosen:
        task.take(limit, seed)  # reads the files of a task, which may be missing or damaged
    part = None if shard is None else parse_shard(shard)
    if out is not None:
        known = None if "all" in names else variants
        check_resume(out, Plan(chosen, known, limit, seed, batch, positions, part), model, overwrite)

    quiet()
    vlm, processor = load_model(model, device)
    if "all" in names:
        names = _expand_all(names, vlm, budgets)
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
        print(filled(str(stop)), file=sys.stderr)
        raise typer.Exit(130) from None
    _show(result, out, sharded=part is not None)


def _expand_all(names: list[str], model: PreTrainedModel, budgets: list[Budget]) -> list[str]:
    """The names, with `all` replaced by every pruner that this model supports; this needs the loaded model."""
    from gripvlm.eval.variants import supported_pruners

    supported, refused = supported_pruners(model, budgets)
    print(*(filled(f"not in all: {name}: {why}") for name, why in refused.items()), sep="\n", file=sys.stderr)
    return list(dict.fromkeys([*(name for name in names if name != "all"), *supported]))


def _show(result: Mapping[str, Any], out: Path | None, sharded: bool) -> None:
    """Prints the tables of an evaluation, the settings without a row, and where the files are."""
    from gripvlm.report import table
    from gripvlm.report.tables import unreached

    screen = console()
    screen.print(table([*result["rows"], *result["means"]]))
    for line in unreached(result):
        screen.print(filled(f"not measured: {line}"), markup=False, soft_wrap=True)
    if out is None:
        return
    answers = out.with_name(result["samples"])
    line = f"results: {out}, every answer: {answers.name} beside it"
    if sharded:
        line = f"answers: {answers}; with all shards' files in one folder the same command without --shard writes the "
        line += "results"
    screen.print(line, markup=False, soft_wrap=True)


def env_command() -> None:
    """Versions and hardware, for a bug report."""
    from gripvlm.eval import environment
    from gripvlm.models.compat import NEWEST_TESTED, OLDEST, newer_than_tested

    screen, parts = console(), environment()
    parts["versions"]["transformers"] += f" (tested: {OLDEST} to {NEWEST_TESTED})"
    for part, values in parts.items():
        screen.print(part, style="bold")
        for name, value in (values or {"": "installed, no checkout"}).items():
            screen.print(f"  {name:<16} {escape(str(value))}")
    if (line := newer_than_tested()) is not None:
        screen.print(escape(line))
