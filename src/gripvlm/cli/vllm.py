"""`gripvlm vllm serve`: vLLM's own server, with pruning."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from gripvlm.budget import Budget
from gripvlm.cli.commands import KeepOfRequests, Positions, Served, split_pruners

app = typer.Typer(add_completion=False)


@app.callback()
def root() -> None:
    """vLLM with pruned pictures."""


@app.command(name="serve", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve_command(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="lab, lab-dense, a local folder, or a Hugging Face hub id.")],
    pruners: Served = "divprune",
    keep: KeepOfRequests = "25%",
    positions: Positions = "original",
    cache_mb: Annotated[
        float, typer.Option(min=0, help="Encoded pictures kept on the device for further questions.")
    ] = 256,
) -> None:
    """Serve a model with vLLM, which prunes its pictures; all other options are vLLM's own.

    With --trust-request-mm-kwargs requests may choose keep, pruner and question. docs/serving.md has examples.
    """
    # Cheap checks first: the imports below take seconds, vLLM a minute.
    Budget(keep)
    names = split_pruners(pruners)

    from gripvlm.integrations.vllm.launch import check_installed, command

    check_installed()
    line = command(model, names, keep, context.args, positions=positions, cache_mb=cache_mb)
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")  # the one that is tested; see engine_config.py
    # vLLM takes this process over, with its signals and its exit code.
    os.execv(line[0], line)
