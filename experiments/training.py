"""Trains a stage that is a study's own, as `gripvlm train` does: its settings and the study's are flags."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, get_type_hints

import torch
from transformers import PreTrainedModel

from gripvlm.errors import GripError, Interrupted
from gripvlm.grip.pruner import place_of
from gripvlm.grip.scorer import ModelFingerprint, Scorer
from gripvlm.grip.train import Engine, Stage, TrainConfig
from gripvlm.grip.train.config import help_of, read_toml
from gripvlm.grip.train.run import check_settings, make_accelerator, make_engine, new_scorer, record_run, run_stage
from gripvlm.models.loading import load_model
from gripvlm.tasks import Task

Config = TypeVar("Config", bound=TrainConfig)


def train_stage(
    config: Config,
    make_stage: Callable[[Config, Scorer, Engine], Stage],
    model: PreTrainedModel,
    processor: Any,
    data: Task | None = None,
) -> Scorer:
    """Trains the scorer in `config.init_from`, or a new one; the same call resumes."""
    questions = check_settings(config, data)
    torch.manual_seed(config.seed)
    if config.init_from:
        scorer = Scorer.from_pretrained(place_of(config.init_from))
    else:
        base = ModelFingerprint.of(model)
        scorer = Scorer(new_scorer(config, base.features), base)
    stage = make_stage(config, scorer.to(model.device), make_engine(config, model, processor))
    record_run(config)
    scorer = run_stage(stage, questions, make_accelerator(config, model.device), quiet=False)
    scorer.save_pretrained(config.output_dir)
    return scorer


def main(
    kind: type[Config],
    make_stage: Callable[[Config, Scorer, Engine], Stage],
    description: str | None,
    arguments: Sequence[str] | None = None,
) -> None:
    """The command: a flag for each field of `kind`, and --config for a TOML file of them."""
    logging.basicConfig(format="%(message)s")
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--config", help="TOML file of settings; flags win over it")
    hints = get_type_hints(kind)
    for field in dataclasses.fields(kind):
        flag, of = "--" + field.name.replace("_", "-"), hints[field.name]
        how: dict[str, Any] = {"action": argparse.BooleanOptionalAction} if of is bool else {"type": of}
        # `gripvlm train` has --no-checkpointing, as --no-gradient-checkpointing is too long for a table of 80 columns.
        names = dict.fromkeys((flag, flag.replace("--gradient-", "--")))
        parser.add_argument(*names, **how, dest=field.name, help=help_of(field.name, kind).replace("%", "%%"))
    given = vars(parser.parse_args(arguments))
    file = given.pop("config")
    settings = read_toml(file, kind) if file else {}
    try:
        config = kind(**settings | {name: value for name, value in given.items() if value is not None})
        train_stage(config, make_stage, *load_model(config.model, config.device or None))
    except GripError as error:
        sys.exit(f"Error: {error}")
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        sys.exit(130)
