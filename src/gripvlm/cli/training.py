"""`gripvlm train`: the flags are the fields of `TrainConfig`."""

from __future__ import annotations

import dataclasses
import inspect
import shlex
import sys
import textwrap
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from gripvlm.errors import GripError

__all__ = ["train_command"]


def train_command(**given: Any) -> None:
    """Train a scorer for a frozen model: a supervised warm-up, then GRPO (or a relaxed baseline).

    gripvlm train --model M --data questions.jsonl --out grip/        both stages
    gripvlm train warmup ... | grpo ... | relaxed ...                 one of them

    Ctrl-C keeps a checkpoint and the same command goes on. Several processes: accelerate launch -m gripvlm train ...
    """
    from gripvlm.cli.commands import console
    from gripvlm.loading import load_model, quiet
    from gripvlm.train import Interrupted, TrainConfig, read_toml
    from gripvlm.train.processes import launched_device
    from gripvlm.train.run import check_settings, train_on

    file: Path | None = given.pop("config")
    stage: str | None = given.pop("stage")
    settings = read_toml(file) if file is not None else {}
    settings |= {name: value for name, value in given.items() if value is not None}
    if stage is not None:
        settings["stage"] = stage
    config = TrainConfig(**settings)
    typed = [name for name, value in given.items() if value is not None]
    for name, why in config.without_effect(typed).items():
        raise GripError(f"{_flag(name)} has no effect {why}: leave it out")
    questions, held = check_settings(config, typed=typed)
    quiet()
    model, processor = load_model(config.model, launched_device(config.device) or None)
    try:
        pruner = train_on(questions, held, config, model, processor, quiet=False)
    except Interrupted as stop:
        print(textwrap.fill(str(stop), width=100, break_long_words=False, break_on_hyphens=False), file=sys.stderr)
        raise typer.Exit(130) from None
    screen = console()
    screen.print(f"trained: {pruner.scorer}")
    tasks = config.val_data or config.data
    tasks = f"jsonl:{tasks}" if tasks.endswith(".jsonl") and not tasks.startswith("jsonl:") else tasks
    words = ["--model", config.model, "--tasks", tasks, "--pruners", f"{pruner.name}:scorer={pruner.scorer},random"]
    screen.print("try it:  gripvlm eval " + shlex.join([*words, "--keep", "10%"]), soft_wrap=True)
    if not config.val_data:
        screen.print("         (questions that it has learnt from; name others that are like them)")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _signature() -> inspect.Signature:
    """One option a field, with None for "as in the config file, or the default"."""
    from gripvlm.train.config import STAGES, TrainConfig, help_of

    stage = typer.Argument(help=f"{', '.join(STAGES)}; by default all", show_default=False)
    config = typer.Option("--config", help="TOML file of settings; flags win over it.")
    kind, keyword = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    parameters = [
        inspect.Parameter("stage", kind, default=None, annotation=Annotated[str | None, stage]),
        inspect.Parameter("config", keyword, default=None, annotation=Annotated[Path | None, config]),
    ]
    hints = get_type_hints(TrainConfig)
    for field in dataclasses.fields(TrainConfig):
        if field.name == "stage":
            continue
        flag = _flag(field.name)
        names = (f"{flag}/--no-{flag[2:]}",) if hints[field.name] is bool else (flag,)
        told = f"{help_of(field.name)} [default: {field.default if field.default != '' else 'none'}]"
        option = typer.Option(*names, help=told, show_default=False)
        parameters.append(
            inspect.Parameter(field.name, keyword, default=None, annotation=Annotated[hints[field.name] | None, option])
        )
    return inspect.Signature(parameters)


train_command.__signature__ = _signature()  # type: ignore[attr-defined]
train_command.__annotations__ = {p.name: p.annotation for p in train_command.__signature__.parameters.values()}  # type: ignore[attr-defined]
