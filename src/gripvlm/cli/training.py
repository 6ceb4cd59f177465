"""`gripvlm train`: the flags are the fields of `TrainConfig`."""

from __future__ import annotations

import dataclasses
import inspect
import shlex
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from gripvlm.errors import GripError

if TYPE_CHECKING:
    from rich.console import Console

    from gripvlm.grip.pruner import Learned
    from gripvlm.grip.train import TrainConfig

__all__ = ["train_command"]


def train_command(**given: Any) -> None:
    """Train a scorer for a frozen model: a supervised warm-up, then GRPO (or a relaxed baseline).

    gripvlm train --model M --data questions.jsonl --out grip/        both stages
    gripvlm train warmup ... | grpo ... | relaxed ...                 one of them

    Ctrl-C keeps a checkpoint and the same command goes on. Several processes: accelerate launch -m gripvlm train ...
    """
    from gripvlm.cli.commands import console
    from gripvlm.grip.train import Interrupted, TrainConfig, read_toml
    from gripvlm.grip.train.processes import launched_device
    from gripvlm.grip.train.run import check_settings, train_on
    from gripvlm.models.loading import load_model, quiet

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
    if (lacking := sum(not sample.answer for _, sample in questions + held)) and not config.own_answers:
        _say(f"{lacking} of {len(questions + held)} questions have no answer: the model's own are taken")
    folder = Path(config.out).expanduser()
    begun = (folder / "warmup").exists() or (folder / f"{config.stage}.ckpt").exists()
    if config.stage in ("grpo", "relaxed") and not config.start and not begun:
        _say(f"no --start, and no warm-up in {config.out}: {config.stage} begins with a new scorer")
    quiet()
    model, processor = load_model(config.model, launched_device(config.device) or None)
    try:
        pruner = train_on(questions, held, config, model, processor, quiet=False)
    except Interrupted as stop:
        _say(textwrap.fill(str(stop), width=100, break_long_words=False, break_on_hyphens=False))
        raise typer.Exit(130) from None
    if pruner.module is not None and (left_out := pruner.module.notes.get("left_out")):
        _say(f"left out: {left_out} questions that could not be used; why: {folder / 'metrics.jsonl'}")
    screen = console()
    screen.print(f"trained: {pruner.scorer}", soft_wrap=True)
    if all(sample.answer for _, sample in held) and "," not in pruner.scorer:
        _try_it(config, pruner, screen)


def _try_it(config: TrainConfig, pruner: Learned, screen: Console) -> None:
    """Prints a command that scores what was trained."""
    from gripvlm.grip.pruner import SHIPPED_NAMES

    tasks = config.val_data or config.data
    tasks = f"jsonl:{tasks}" if tasks.endswith(".jsonl") and not tasks.startswith("jsonl:") else tasks
    folder = f"./{pruner.scorer}" if pruner.scorer in SHIPPED_NAMES else pruner.scorer
    words = ["--model", config.model, "--tasks", tasks, "--pruners", f"{pruner.name}:scorer={folder},random"]
    screen.print("try it:  gripvlm eval " + shlex.join([*words, "--keep", "10%"]), soft_wrap=True)
    if not config.val_data:
        screen.print("         (questions that it has learnt from; name others that are like them)")


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


_PANELS = {
    "model": "Model and questions",
    "width": "Scorer",
    "images": "Batches and budgets",
    "steps": "Optimiser",
    "warmup_steps": "Warm-up",
    "policy": "GRPO",
    "relaxation": "Relaxed baselines",
    "save_minutes": "Running",
}
"""Headings of the help, by the first setting below each."""


def _signature() -> inspect.Signature:
    """One option a field, with None for "as in the config file, or the default"."""
    from gripvlm.grip.train.config import STAGES, TrainConfig, help_of

    stage = typer.Argument(help=f"{', '.join(STAGES)}; by default all", show_default=False)
    config = typer.Option("--config", help="TOML file of settings; flags win over it.")
    kind, keyword = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    parameters = [
        inspect.Parameter("stage", kind, default=None, annotation=Annotated[str | None, stage]),
        inspect.Parameter("config", keyword, default=None, annotation=Annotated[Path | None, config]),
    ]
    hints = get_type_hints(TrainConfig)
    panel = ""
    for field in dataclasses.fields(TrainConfig):
        if field.name == "stage":
            continue
        flag = _flag(field.name)
        names = (f"{flag}/--no-{flag[2:]}",) if hints[field.name] is bool else (flag,)
        default = ("no", "yes")[field.default] if isinstance(field.default, bool) else field.default
        default = "none" if default == "" else default
        told = f"{help_of(field.name)} (default: {default})"  # brackets would be markup
        panel = _PANELS.get(field.name, panel)
        group = "Switches" if hints[field.name] is bool else panel  # "--no-..." is a column of its own
        kinds = {bool: "", int: "N", float: "X"}  # short, so that names are not cut off in 80 columns
        shown = kinds.get(hints[field.name], "TEXT")
        option = typer.Option(*names, help=told, show_default=False, rich_help_panel=group, metavar=shown)
        parameters.append(
            inspect.Parameter(field.name, keyword, default=None, annotation=Annotated[hints[field.name] | None, option])
        )
    return inspect.Signature(parameters)


train_command.__signature__ = _signature()  # type: ignore[attr-defined]
train_command.__annotations__ = {p.name: p.annotation for p in train_command.__signature__.parameters.values()}  # type: ignore[attr-defined]
