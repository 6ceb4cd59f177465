"""`gripvlm bench`: what pruning buys on this machine."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Group
from rich.markup import escape
from rich.table import Table

from gripvlm.budget import Budget
from gripvlm.cli.commands import (
    Budgets,
    Device,
    Out,
    console,
    split_names,
    split_numbers,
    split_pruners,
)
from gripvlm.cli.outputs import checked_json
from gripvlm.errors import GripError
from gripvlm.utils.terminal import filled, fitted

DOWNSAMPLE = "downsample"
PHASES = ("vision", "pruner", "overhead", "other", "prefill", "decode_token", "whole")
PARTS = {
    "vision": ("vision",),
    "pruning": ("pruner", "overhead", "other"),
    "prefill": ("prefill",),
    "decode": ("decode",),
}
"""Column -> phases of the whole: where the time is spent."""


def bench_command(
    model: Annotated[
        str,
        typer.Option("--model", "-m", help="lab, lab-dense, a local folder, a hub id, or random:llava-1.5-7b..."),
    ] = "lab",
    batch: Annotated[str, typer.Option(help="Prompts at a time, such as 1,8.")] = "1",
    prompt: Annotated[str, typer.Option(help="Text tokens a prompt, such as 64 or 64,512.")] = "64",
    new: Annotated[int, typer.Option(min=2, help="Tokens to generate.")] = 16,
    pruners: Annotated[
        str, typer.Option("--pruners", "-p", help="From `gripvlm list`, or downsample.")
    ] = "norm,divprune,grip",
    keep: Budgets = "50%,10%",
    repeats: Annotated[int, typer.Option(min=1, help="Turns that count; one more warms up.")] = 7,
    fit: Annotated[int, typer.Option(min=0, help="Also find the largest batch, up to this, that fits in memory.")] = 0,
    picture: Annotated[int, typer.Option(min=1, help="Width and height of each picture in pixels.")] = 672,
    images: Annotated[int, typer.Option(min=1, help="Pictures a prompt.")] = 1,
    out: Out = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace it where it exists.")] = False,
    device: Device = None,
    dtype: Annotated[str | None, typer.Option(help="By default float32 on a CPU, else bfloat16.")] = None,
    attention: Annotated[str | None, typer.Option(help="transformers' attn_implementation.")] = None,
) -> None:
    """Time a model unpruned, with each pruner, and with few tokens from the start; Ctrl-C keeps finished results."""
    batches = split_numbers(batch, "--batch", "1,8", least=1)
    lengths = split_numbers(prompt, "--prompt", "64,512", least=1)
    budgets = list(dict.fromkeys(Budget(text) for text in split_names(keep)))
    specs = list(dict.fromkeys(split_pruners(pruners)))
    if out is not None:
        checked_json(out)
        if out.exists() and not overwrite:
            raise GripError(f"--out {out} exists: type --overwrite to replace it, or another --out")

    from gripvlm.bench import BenchInterrupted, bench, random_pruner
    from gripvlm.bench.fit import check_limit
    from gripvlm.bench.shapes import PREFIX
    from gripvlm.models.loading import chosen_device, quiet
    from gripvlm.pruners import get_pruner

    quiet()
    for spec in specs:  # before a model of gigabytes is loaded
        if spec != DOWNSAMPLE:
            get_pruner(spec)
    if fit:
        check_limit(chosen_device(device))
    is_random = model.startswith(PREFIX)
    vlm, prompts = _loaded(model, {"side": picture, "images": images}, device, dtype, attention)
    made = partial(random_pruner, model=vlm) if is_random else get_pruner
    chosen = [(spec, None if spec == DOWNSAMPLE else made(spec)) for spec in specs]
    about = {"name": model, "weights": "random" if is_random else "as loaded", "picture": picture, "images": images}
    sizes: dict[str, Any] = {"batches": batches, "lengths": lengths, "new": new, "repeats": repeats, "fit": fit}
    try:
        result = bench(vlm, prompts, chosen, budgets, **sizes, out=out, about=about, progress=True)
    except BenchInterrupted as stop:
        show(stop.result)
        print(filled(str(stop)), file=sys.stderr)
        raise typer.Exit(130) from None
    show(result)
    if out is not None:
        console().print(f"results: {escape(str(out))}", soft_wrap=True)


def _loaded(model: str, pictures: dict[str, Any], device: str | None, dtype: str | None, attention: str | None) -> Any:
    """(model, (batch, length) -> inputs): a loaded model, or a shape with random weights."""
    import torch

    from gripvlm.bench.shapes import PREFIX, architecture, random_model, random_prompts, real_prompts
    from gripvlm.models.loading import chosen_device, load_model

    if not model.startswith(PREFIX):
        vlm, processor = load_model(model, device, dtype, attention)
        return vlm, partial(real_prompts, vlm, processor, **pictures)
    shape, place = architecture(model), chosen_device(device)
    name = dtype or ("float32" if place.type == "cpu" else "bfloat16")
    if name not in ("float32", "bfloat16", "float16"):
        raise GripError(f"--dtype {dtype}: a random model takes float32, bfloat16 or float16")
    vlm = random_model(model, place, getattr(torch, name), attention)
    return vlm, partial(random_prompts, vlm, shape, **pictures)


def show(result: Mapping[str, Any]) -> None:
    """Three tables for each batch size and prompt length, why settings failed, and the largest batches."""
    screen = console()
    for batch, prompt in dict.fromkeys((row["batch"], row["prompt"]) for row in result["rows"]):
        rows = [row for row in result["rows"] if (row["batch"], row["prompt"]) == (batch, prompt)]
        done = [row for row in rows if not row["failed"]]
        where = f"batch {batch}, {prompt} text tokens"
        if done:
            screen.print(_sheet(f"{where}: milliseconds a batch, medians", done, _times))
            towers = any(row.get("to_tower_limit") for row in done)  # older results have none
            ratios = partial(_ratios, towers=towers)
            screen.print(_sheet("Ratios of whole; added: share of the unpruned prefill", done, ratios))
            screen.print(_sheet("Share of the time, % (of the roofline, %)", done, _shares))
        for row in rows:
            if row["failed"]:
                screen.print(f"{where}: {row['setting']} was not measured: {row['failed']}", markup=False)
    if result["fits"]:
        screen.print(_sheet("Largest batch that the device's memory holds", result["fits"], _largest))


def _sheet(
    title: str, rows: Sequence[Mapping[str, Any]], cells: Callable[[Mapping[str, Any]], dict[str, str]]
) -> Group:
    """Narrow enough for 80 columns; a long setting continues in a second line."""
    sheet = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", padding=(0, 0, 0, 0))
    sheet.add_column("setting", min_width=18, max_width=24, overflow="fold")
    for name in cells(rows[0]):
        sheet.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        sheet.add_row(escape(row["setting"]), *cells(row).values())
    return fitted(sheet, 1)


def _times(row: Mapping[str, Any]) -> dict[str, str]:
    seconds = {phase: row["seconds"][phase]["median"] for phase in PHASES}
    milliseconds = {phase.replace("decode_", "a "): f"{1000 * value:.3g}" for phase, value in seconds.items()}
    return {"kept": f"{row['kept']:.4g}", **milliseconds}


def _ratios(row: Mapping[str, Any], towers: bool) -> dict[str, str]:
    full, limit = row["to_full"]["whole"], (row["to_limit"] or {}).get("whole")
    tower = (row.get("to_tower_limit") or {}).get("whole")
    limits = {"/ tower": f"{tower['median']:.3f}" if tower else "-"} if towers else {}
    added, peak = row["to_full"]["added"], row["peak_memory"]
    return {
        "/ full": f"{full['median']:.3f}" if full else "-",
        "quartiles": f"{full['low']:.2f}-{full['high']:.2f}" if full else "-",
        "/ limit": f"{limit['median']:.3f}" if limit else "-",
        **limits,
        "added": f"{100 * added['median']:.1f} %" if added and row["kind"] == "pruned" else "-",
        "KV MB": f"{row['kv_bytes'] / 1e6:.3g}",
        "peak GB": f"{peak / 1e9:.3g}" if peak else "-",
    }


def _shares(row: Mapping[str, Any]) -> dict[str, str]:
    """Each part's share of the time; in bold the longest, which bounds the rest."""
    seconds = {name: sum(row["seconds"][phase]["median"] for phase in phases) for name, phases in PARTS.items()}
    cells = {}
    for name, value in seconds.items():
        share = f"{100 * value / sum(seconds.values()):.0f}"
        reached = row["roofline"].get(name)
        cells[name] = f"[bold]{share}[/]" if value == max(seconds.values()) else share
        cells[name] += "" if reached is None else f" ({100 * reached:.0f})"
    return cells


def _largest(row: Mapping[str, Any]) -> dict[str, str]:
    size = str(row["fits"]) if row["fails"] is not None else f"{row['fits']} or more"
    ratio = "-" if row["to_full"] is None else f"{row['to_full']:.2f}"
    return {"text tokens": str(row["prompt"]), "batch": size, "/ full": ratio}
