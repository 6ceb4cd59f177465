"""`gripvlm train`: the flags are the fields of `TrainConfig`."""

from __future__ import annotations

import dataclasses
import inspect
import math
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from gripvlm.errors import GripError, Interrupted
from gripvlm.utils.terminal import filled

if TYPE_CHECKING:
    from rich.console import Console

    from gripvlm.grip.pruner import Grip
    from gripvlm.grip.train import TrainConfig


def train_command(**options: Any) -> None:
    """Train a scorer for a frozen model: distil a teacher, then GRPO.

    gripvlm train --model M --data questions.jsonl --output-dir grip/

    `train distill` or `train grpo` runs one of the two stages, `train visionselector` a rival of GRPO.
    Ctrl-C keeps a checkpoint and the same command resumes.
    Several processes: accelerate launch -m gripvlm train ...
    """
    from gripvlm.cli.commands import console
    from gripvlm.grip.train.processes import EndedTogether
    from gripvlm.grip.train.run import check_settings, first_process, launched_device, train_on
    from gripvlm.models.loading import load_model, quiet, training_dtype

    dry_run, tflops = options.pop("dry_run"), options.pop("tflops")
    if tflops is not None and (not dry_run or not 0 < tflops < math.inf):
        raise GripError(f"--tflops {tflops:g}: type the speed of an accelerator beside --dry-run, such as 250")
    config, explicit = _configuration(options)
    # Flags only: a file of settings may serve several stages.
    for name, why in config.without_effect(explicit).items():
        raise GripError(f"{_flag(name)} has no effect {why}: leave it out")
    questions, held_out = check_settings(config, typed=explicit)
    _warn(config, [sample.answer for _, sample in questions + held_out])
    quiet()
    device = launched_device(config.device) or None
    dtype = config.dtype or ("bfloat16" if tflops is not None else training_dtype(device))
    if dry_run:
        console().print(_estimate(config, questions, device, dtype, tflops), soft_wrap=True, highlight=False)
        return
    model, processor = load_model(config.model, device, dtype, config.attn_implementation or None, config.max_memory)
    try:
        pruner = train_on((questions, held_out), config, model, processor, quiet=False)
    except Interrupted as stop:
        if first_process():
            _say(str(stop))
        raise typer.Exit(130) from None
    except EndedTogether:
        if first_process():  # all say the same
            raise
        raise typer.Exit(2) from None
    if not first_process():
        return
    if pruner.module is not None and (left_out := pruner.module.notes.get("left_out")):
        metrics = Path(config.output_dir).expanduser() / "metrics.jsonl"
        _say(f"left out: {left_out} questions that could not be used; why: {metrics}")
    screen = console()
    screen.print(f"trained: {pruner.scorer}", soft_wrap=True)
    if all(sample.answer for _, sample in held_out) and "," not in pruner.scorer:
        _suggest_eval(config, pruner, screen)


def _configuration(options: dict[str, Any]) -> tuple[TrainConfig, list[str]]:
    """The settings of the file and the flags, and which of them are flags."""
    from gripvlm.grip.train.config import TrainConfig, read_toml

    file: Path | None = options.pop("config")
    flags = {name: value for name, value in options.items() if value is not None}
    settings = read_toml(file) if file is not None else {}
    return TrainConfig(**settings | flags), [name for name in flags if name != "stage"]


def _warn(config: TrainConfig, answers: list[str]) -> None:
    """Prints warnings about settings that may surprise."""
    if (missing := answers.count("")) and not config.pseudo_labels:
        _say(f"{missing} of {len(answers)} questions have no answer: the model's own are taken")
    folder = Path(config.output_dir).expanduser()
    begun = (folder / "distill").exists() or (folder / "grpo.ckpt").exists()
    if config.stage == "grpo" and not config.init_from and not begun:
        _say(f"no --init-from, and no distilled scorer in {config.output_dir}: grpo begins with a new scorer")


def _estimate(config: TrainConfig, questions: list[Any], device: str | None, dtype: str, tflops: float | None) -> str:
    """What the run would need: here, or on an accelerator of so many TFLOP/s, which need not be here."""
    import torch

    from gripvlm.grip.train.dry_run import Sizes, report
    from gripvlm.models.loading import chosen_device, load_sizes

    model, processor = load_sizes(config.model, dtype)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    sizes = Sizes.of(model, processor, questions, config)
    if tflops is not None:
        return report(sizes, config, torch.device("cuda"), model.dtype, processes, 1e12 * tflops)
    return report(sizes, config, chosen_device(device), model.dtype, processes)


def _suggest_eval(config: TrainConfig, pruner: Grip, screen: Console) -> None:
    """Prints a command that scores the trained pruner."""
    from gripvlm.grip.pruner import SHIPPED_NAMES

    tasks = config.eval_data or config.data
    tasks = f"jsonl:{tasks}" if tasks.endswith(".jsonl") and not tasks.startswith("jsonl:") else tasks
    folder = f"./{pruner.scorer}" if pruner.scorer in SHIPPED_NAMES else pruner.scorer
    words = ["--model", config.model, "--tasks", tasks, "--pruners", f"{pruner.name}:scorer={folder},random"]
    screen.print("try it:  gripvlm eval " + shlex.join([*words, "--keep", "10%"]), soft_wrap=True)
    if not config.eval_data:
        screen.print("         (these are the training questions; name similar questions that it has not seen)")


def _say(text: str) -> None:
    print(filled(text), file=sys.stderr)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


_PANELS = {
    "model": "Model and questions",
    "width": "Scorer",
    "per_device_train_batch_size": "Batches and budgets",
    "max_steps": "Optimiser",
    "distill_steps": "Distilling",
    "num_generations": "GRPO",
    "constraint_weight": "VisionSelector",
    "save_steps": "Running",
}
"""Headings of the help, by the first setting below each."""

_METAVARS = {bool: "", int: "N", float: "X"}
"""Short, so that names are not cut off in 80 columns."""


def _signature() -> inspect.Signature:
    """One option a field, with None for "as in the config file, or the default"."""
    from gripvlm.grip.train.config import STAGES, TrainConfig, help_of

    stage = typer.Argument(help=f"{', '.join(STAGES)}; by default all", show_default=False)
    file = typer.Option("--config", help="TOML file of settings; flags override it.")
    first = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter("stage", first, default=None, annotation=Annotated[str | None, stage])]
    parameters.append(_parameter("config", Path, file))
    dry = typer.Option("--dry-run", help="Only say what memory and how many hours it will need.")
    parameters.append(_parameter("dry_run", bool, dry))
    fast = typer.Option(
        "--tflops",
        metavar="X",
        help="With --dry-run: of an accelerator that is not here, in bfloat16; hours at X TFLOP/s.",
    )
    parameters.append(_parameter("tflops", float, fast))
    hints = get_type_hints(TrainConfig)
    panel = ""
    for field in dataclasses.fields(TrainConfig):
        if field.name == "stage":
            continue
        flag, kind = _flag(field.name), hints[field.name]
        panel = _PANELS.get(field.name, panel)
        default: Any = field.default if field.default != "" else "none"
        if kind is bool:
            default = "yes" if field.default else "no"
        text = help_of(field.name)
        if default != "none" or "default" not in text:  # the text may say what "none" means
            text += f" (default: {default})"  # brackets would be markup
        option = typer.Option(
            # Two long names would both be cut off in 80 columns.
            *((f"{flag}/--no-{flag[2:].removeprefix('gradient-')}",) if kind is bool else (flag,)),
            help=text,
            show_default=False,
            rich_help_panel="Switches" if kind is bool else panel,  # "--no-..." is a column of its own
            metavar=_METAVARS.get(kind, "TEXT"),
        )
        parameters.append(_parameter(field.name, kind, option))
    return inspect.Signature(parameters)


def _parameter(name: str, kind: type, option: Any) -> inspect.Parameter:
    annotation = Annotated[kind | None, option]  # type: ignore[valid-type]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


train_command.__signature__ = _signature()  # type: ignore[attr-defined]
train_command.__annotations__ = {p.name: p.annotation for p in train_command.__signature__.parameters.values()}  # type: ignore[attr-defined]
