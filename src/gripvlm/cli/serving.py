"""`gripvlm serve`: an OpenAI-compatible server. Its limits are the fields of `Limits`."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import sys
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from gripvlm.budget import Budget
from gripvlm.cli.commands import Device, KeepOfRequests, Model, Positions, Served, split_names, split_pruners
from gripvlm.errors import GripError
from gripvlm.serve.controller import Ladder
from gripvlm.serve.settings import Limits, Settings

LOCAL = ("127.0.0.1", "::1", "localhost")
ACCESS = "Who may use it, and what it reads"
UNDER_LOAD = "Under load"


def serve_command(
    *,
    model: Model = "lab",
    pruners: Served = "divprune",
    keep: KeepOfRequests = "25%",
    name: Annotated[str | None, typer.Option(help="What requests call the model; by default as --model.")] = None,
    positions: Positions = "original",
    device: Device = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 for any free one.")] = 8000,
    grace: Annotated[int, typer.Option(min=0, help="Seconds that running requests have after Ctrl-C or SIGTERM.")] = 30,
    api_key: Annotated[
        list[str],
        typer.Option(
            envvar="GRIPVLM_API_KEY",
            show_envvar=True,
            help="A key that requests must have; once for each of several. Others on this machine see what is typed: "
            "better set the variable.",
            rich_help_panel=ACCESS,
        ),
    ] = [],  # noqa: B006  typer reads it
    allow_folder: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            file_okay=False,
            help="Pictures may be file:// URLs of files in this folder.",
            rich_help_panel=ACCESS,
        ),
    ] = None,
    allow_host: Annotated[
        list[str],
        typer.Option(
            help="Pictures may be downloaded from this host; once for each of several. By default from none.",
            rich_help_panel=ACCESS,
        ),
    ] = [],  # noqa: B006
    target_ms: Annotated[
        float | None,
        typer.Option(
            help="Milliseconds to the first token that 95 % of requests should have: keep then follows the load, along "
            "--ladder.",
            rich_help_panel=UNDER_LOAD,
        ),
    ] = None,
    ladder: Annotated[
        str,
        typer.Option(
            help="Budgets for --target-ms, from the largest to the smallest that may be used.",
            rich_help_panel=UNDER_LOAD,
        ),
    ] = "50%,25%,10%",
    **limits: Any,
) -> None:
    """Serve a model with OpenAI's chat API; each request may choose its own keep.

    POST /v1/chat/completions, GET /v1/models, /health and /metrics; requests may have the further fields keep and
    pruner. It needs the extra named serve, and docs/serving.md has examples.
    """
    # Cheap checks first: the imports below take seconds, the model perhaps minutes.
    keys = tuple(key for text in api_key for key in text.split())
    if api_key and not keys:
        raise GripError("--api-key is empty: type a key, or leave the option and GRIPVLM_API_KEY out")
    along = None
    if target_ms is not None:
        along = Ladder(tuple(Budget(text) for text in split_names(ladder)), target_ms / 1000)
    settings = Settings(
        model=name or model,
        pruners=tuple(split_pruners(pruners)),
        keep=Budget(keep),
        positions=positions,
        keys=keys,
        folder=allow_folder,
        hosts=frozenset(host.lower() for host in allow_host),
        ladder=along,
        limits=Limits(**limits),
    )
    try:
        import uvicorn

        from gripvlm.serve.app import create_app
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("gripvlm"):
            raise
        raise GripError(
            f'{error.name} is not installed, which the server needs: pip install "gripvlm[serve]"'
        ) from None
    from gripvlm.models.loading import load_model, quiet

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


def _signature() -> inspect.Signature:
    """That of `serve_command`, with an option for each field of `Limits`."""
    own = get_type_hints(serve_command, include_extras=True)
    kinds = get_type_hints(Limits)
    parameters = [
        parameter.replace(annotation=own[parameter.name])
        for parameter in inspect.signature(serve_command).parameters.values()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    for field in dataclasses.fields(Limits):
        about = typer.Option(min=field.metadata["min"], help=field.metadata["help"], rich_help_panel="Limits")
        parameters.append(_option(field.name, field.default, kinds[field.name], about))
    return inspect.Signature(parameters)


def _option(name: str, default: Any, kind: type, about: Any) -> inspect.Parameter:
    annotation = Annotated[kind, about]  # type: ignore[valid-type]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


serve_command.__signature__ = _signature()  # type: ignore[attr-defined]
serve_command.__annotations__ = {p.name: p.annotation for p in serve_command.__signature__.parameters.values()}  # type: ignore[attr-defined]
