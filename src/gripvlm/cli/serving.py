"""`gripvlm serve`: an OpenAI-compatible server."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated

import typer

from gripvlm.budget import Budget
from gripvlm.cli.commands import BUDGETS, Device, Model, Positions, split_names, split_pruners
from gripvlm.errors import GripError

LOCAL = ("127.0.0.1", "::1", "localhost")


def serve_command(
    model: Model = "lab",
    pruners: Annotated[
        str,
        typer.Option(
            "--pruners", "-p", help="Names from `gripvlm list` that requests may choose from; the first is the default."
        ),
    ] = "divprune",
    keep: Annotated[str, typer.Option("--keep", "-k", help=f"For requests that name none: {BUDGETS}.")] = "25%",
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 for any free one.")] = 8000,
    name: Annotated[str | None, typer.Option(help="What requests call the model; by default as --model.")] = None,
    api_key: Annotated[
        list[str],
        typer.Option(
            envvar="GRIPVLM_API_KEY",
            show_envvar=True,
            help="A key that requests must have; once for each of several. Others on this machine see what is typed: "
            "better set the variable.",
        ),
    ] = [],  # noqa: B006  typer reads it
    allow_folder: Annotated[
        Path | None,
        typer.Option(exists=True, file_okay=False, help="Pictures may be file:// URLs of files in this folder."),
    ] = None,
    allow_host: Annotated[
        list[str],
        typer.Option(help="Pictures may be downloaded from this host; once for each of several. By default from none."),
    ] = [],  # noqa: B006
    target_ms: Annotated[
        float | None,
        typer.Option(
            help="Milliseconds to the first token that 95 % of requests should have: keep then follows the load, along "
            "--ladder."
        ),
    ] = None,
    ladder: Annotated[
        str, typer.Option(help="Budgets for --target-ms, from the largest to the smallest that may be used.")
    ] = "50%,25%,10%",
    max_batch: Annotated[int, typer.Option(min=1, help="Requests that run at a time.")] = 8,
    max_queue: Annotated[int, typer.Option(min=0, help="Requests that may wait; more get a 429.")] = 64,
    max_tokens: Annotated[int, typer.Option(min=1, help="The longest answer, and the default.")] = 512,
    max_prompt: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of prompt (before pruning) and answer; by default what the model allows."),
    ] = None,
    max_pictures: Annotated[int, typer.Option(min=0, help="Pictures of a request.")] = 8,
    max_megapixels: Annotated[float, typer.Option(min=0.01, help="Size of a picture.")] = 16,
    max_body_mb: Annotated[float, typer.Option(min=0.001, help="Size of a request.")] = 32,
    cache_mb: Annotated[float, typer.Option(min=0, help="Encoded pictures kept for further questions.")] = 512,
    grace: Annotated[int, typer.Option(min=0, help="Seconds that running requests have after Ctrl-C or SIGTERM.")] = 30,
    positions: Positions = "original",
    device: Device = None,
) -> None:
    """Serve a model with OpenAI's chat API; each request may choose its own keep.

    POST /v1/chat/completions, GET /v1/models, /health and /metrics; requests may have the further fields keep and
    pruner. It needs the extra named serve, and docs/serving.md has examples.
    """
    # Cheap checks first: the imports below take seconds, the model perhaps minutes.
    budget, names = Budget(keep), split_pruners(pruners)
    keys = [key for text in api_key for key in text.split()]
    if api_key and not keys:
        raise GripError("--api-key is empty: type a key, or leave the option and GRIPVLM_API_KEY out")

    try:
        import uvicorn

        from gripvlm.serve.app import create_app
        from gripvlm.serve.controller import Ladder
        from gripvlm.serve.settings import Limits, Settings
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("gripvlm"):
            raise
        raise GripError(
            f'{error.name} is not installed, which the server needs: pip install "gripvlm[serve]"'
        ) from None
    from gripvlm.models.loading import load_model, quiet

    rungs = None
    if target_ms is not None:
        rungs = Ladder(tuple(Budget(text) for text in split_names(ladder)), target_ms / 1000)
    settings = Settings(
        model=name or model,
        pruners=tuple(names),
        keep=budget,
        positions=positions,
        keys=tuple(keys),
        folder=allow_folder,
        hosts=frozenset(host.lower() for host in allow_host),
        ladder=rungs,
        limits=Limits(
            batch=max_batch,
            queue=max_queue,
            tokens=max_tokens,
            prompt=max_prompt or 0,
            pictures=max_pictures,
            pixels=int(max_megapixels * 1e6),
            body=int(max_body_mb * 1e6),
            cache_bytes=int(cache_mb * 1e6),
        ),
    )
    quiet()
    app = create_app(*load_model(model, device), settings)
    if host not in LOCAL and not keys:
        print(f"Anyone who reaches {host}:{port} may use this server: set GRIPVLM_API_KEY to a key.", file=sys.stderr)
    logging.basicConfig(format="%(asctime)s %(message)s")
    for speaker in ("gripvlm", "uvicorn"):
        logging.getLogger(speaker).setLevel(logging.INFO)
    # After Ctrl-C or SIGTERM it takes no new connections, running requests have their time, then the worker ends.
    uvicorn.run(
        app,
        host=host,
        port=port,
        log_config=None,
        access_log=False,  # our own lines have the request's id
        server_header=False,
        timeout_graceful_shutdown=grace,
    )
