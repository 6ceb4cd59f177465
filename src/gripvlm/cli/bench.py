"""`gripvlm bench`: what pruning buys on this machine."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from gripvlm.budget import Budget
from gripvlm.cli.commands import BUDGETS, console, split_pruners
from gripvlm.errors import GripError

__all__ = ["bench_command"]


def bench_command(
    model: Annotated[
        str, typer.Option("--model", "-m", help="lab, a local folder, a Hugging Face hub id, or random:llava-1.5-7b...")
    ] = "lab",
    batch: Annotated[str, typer.Option(help="Prompts at a time, such as 1,8.")] = "1",
    prompt: Annotated[str, typer.Option(help="Text tokens a prompt, such as 64 or 64,512.")] = "64",
    new: Annotated[int, typer.Option(min=2, help="Tokens to generate.")] = 16,
    pruners: Annotated[
        str, typer.Option("--pruners", "-p", help="Names from `gripvlm list`, separated by commas.")
    ] = "norm,divprune,grip",
    keep: Annotated[
        str,
        typer.Option("--keep", "-k", help=f"Budgets, separated by commas: {BUDGETS}."),
    ] = "50%,10%",
    repeats: Annotated[int, typer.Option(min=1, help="Turns that count; one more warms up.")] = 7,
    fit: Annotated[
        int,
        typer.Option(min=0, help="Also find the largest batch, up to this one, that the accelerator's memory holds."),
    ] = 0,
    picture: Annotated[int, typer.Option(min=1, help="Width and height of each picture in pixels.")] = 672,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="JSON file for the results.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace it where it exists.")] = False,
    device: Annotated[
        str | None, typer.Option(help="Such as cpu or cuda:1; by default an accelerator if there is one.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; by default float32 on a CPU, else bfloat16.")
    ] = None,
    attention: Annotated[
        str | None, typer.Option(help="transformers' attn_implementation; by default its choice.")
    ] = None,
) -> None:
    """Time a model unpruned, with each pruner, and with as few tokens from the start; Ctrl-C keeps what is done."""
    from gripvlm.cli.outputs import checked_json

    batches, lengths = numbers(batch, "--batch", "1,8"), numbers(prompt, "--prompt", "64,512")
    budgets = list(dict.fromkeys(Budget.parse(part) for part in keep.split(",") if part.strip()))
    if not budgets:
        raise GripError(f"--keep {keep!r} names nothing: type one or more budgets, such as 50%,10%")
    names = list(dict.fromkeys(split_pruners(pruners)))
    if out is not None:
        checked_json(out)
        if out.exists() and not overwrite:
            raise GripError(f"--out {out} exists: type --overwrite to replace it, or another --out")

    from gripvlm.bench import Interrupted, bench
    from gripvlm.bench.architectures import random_pruner
    from gripvlm.bench.fit import check_limit
    from gripvlm.models.loading import chosen_device, quiet
    from gripvlm.pruners import get_pruner

    quiet()
    for name in names:
        _known(name)
    if fit:
        check_limit(chosen_device(device))
    vlm, prompts, is_random = _loaded(model, picture, device, dtype, attention)
    chosen = [(name, random_pruner(name, vlm) if is_random else get_pruner(name)) for name in names]
    try:
        result = bench(
            vlm,
            prompts,
            chosen,
            budgets,
            batches=batches,
            lengths=lengths,
            new=new,
            repeats=repeats,
            fit=fit,
            out=out,
            overwrite=overwrite,
            about={"name": model, "weights": "random" if is_random else "as loaded", "picture": picture},
            progress=True,
        )
    except Interrupted as stop:
        _show(stop.result)
        print(stop, file=sys.stderr)
        raise typer.Exit(130) from None
    _show(result)
    if out is not None:
        console().print(f"results: {escape(str(out))}", soft_wrap=True)


def numbers(text: str, option: str, example: str) -> list[int]:
    """`1,8` as [1, 8]: whole numbers from 1 up, each once."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdecimal() and int(part) for part in parts):
        raise GripError(f"{option} {text}: type whole numbers of 1 or more, separated by commas, such as {example}")
    return list(dict.fromkeys(map(int, parts)))


def _known(spec: str) -> None:
    """Said before a model of gigabytes is loaded."""
    from gripvlm.pruners import get_pruner

    if spec in ("oracle", "blind"):
        raise GripError(f"--pruners {spec}: it belongs to `gripvlm eval`; type names from `gripvlm list`")
    get_pruner(spec)


def _loaded(model: str, picture: int, device: str | None, dtype: str | None, attention: str | None) -> Any:
    """(model, (batch, length) -> inputs, whether its weights are random)."""
    from gripvlm.bench import architectures, random_prompts, real_prompts
    from gripvlm.models.loading import load_model

    if not model.startswith(architectures.PREFIX):
        vlm, processor = load_model(model, device, dtype, attention)
        return vlm, lambda batch, length: real_prompts(vlm, processor, batch, length, picture), False

    shape = architectures.architecture(model)
    place, kind = _place(device, dtype)
    vlm = architectures.random_model(model, place, kind, attention)
    return vlm, lambda batch, length: random_prompts(vlm, shape, batch, length, picture), True


def _place(device: str | None, dtype: str | None) -> Any:
    """The device and dtype of a random model."""
    import torch

    from gripvlm.models.loading import chosen_device

    place = chosen_device(device)
    name = dtype or ("float32" if place.type == "cpu" else "bfloat16")
    if name not in ("float32", "bfloat16", "float16"):
        raise GripError(f"--dtype {dtype}: a random model takes float32, bfloat16 or float16")
    return place, getattr(torch, name)


def _show(result: Mapping[str, Any]) -> None:
    """Two tables for each batch size and prompt length, and the sentences below."""
    screen = console()
    memory = any(row.get("peak_memory") for row in result["rows"])
    ratios = ("/ full", "quartiles", "/ limit", "KV MB", *(["peak GB"] if memory else []))
    for cell in dict.fromkeys((row["batch"], row["prompt"]) for row in result["rows"]):
        mine = [row for row in result["rows"] if (row["batch"], row["prompt"]) == cell]
        where = f"batch {cell[0]}, {cell[1]} text tokens"
        times = _sheet(f"{where}: milliseconds a batch, medians", ("kept", *PHASES))
        bought = _sheet(f"{where}: ratios of whole; KV", ratios)
        for row in mine:
            times.add_row(escape(row["setting"]), *_times(row))
            if not row["failed"]:
                bought.add_row(escape(row["setting"]), *_ratios(row)[: len(ratios)])
        screen.print(times, bought)
    for sentence in result["sentences"]:
        screen.print(sentence, markup=False)


PHASES = {
    "vision": "vision",
    "pruner": "pruner",
    "overhead": "overhead",
    "other": "other",
    "prefill": "prefill",
    "a token": "decode_token",
    "whole": "whole",
}
"""Column -> what it is in the results."""


def _sheet(title: str, columns: Iterable[str]) -> Table:
    """Narrow enough for 80 columns; a long setting goes on in a second line. Why a row is empty is said below."""
    sheet = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", padding=(0, 0, 0, 0))
    sheet.add_column("setting", min_width=18, max_width=24, overflow="fold")
    for name in columns:
        sheet.add_column(name, justify="right", no_wrap=True)
    return sheet


def _times(row: Mapping[str, Any]) -> list[str]:
    if row["failed"]:
        return ["-"] * (1 + len(PHASES))
    return [f"{row['kept']:.4g}", *(f"{1000 * row['seconds'][phase]['median']:.3g}" for phase in PHASES.values())]


def _ratios(row: Mapping[str, Any]) -> list[str]:
    full, limit = row["to_full"]["whole"], (row["to_limit"] or {}).get("whole")
    peak = row["peak_memory"]
    return [
        f"{full['median']:.3f}" if full else "-",
        f"{full['low']:.2f}-{full['high']:.2f}" if full else "-",
        f"{limit['median']:.3f}" if limit else "-",
        f"{row['kv_bytes'] / 1e6:.3g}",
        f"{peak / 1e9:.3g}" if peak else "-",
    ]
